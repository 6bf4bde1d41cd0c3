"""Tiny random text encoders of several kinds, with tokenizers, written by transformers and tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
# On a busy machine, the threads of such small operations mostly wait for each other.
torch.set_num_threads(1)

WORDS = ("a", "red", "green", "fox", "cat", "dog", "sleeps", "under", "the", "tree", "at", "night")
WORDS += ("one", "two", "three")
WIDTH, POSITIONS = 32, 40
# The special tokens that are added to a text, and those with a role.
_TOKENS = {
    "bert": ("[CLS] $A [SEP]", dict(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]")),
    # RoBERTa counts positions from that after the padding token, here 2.
    "roberta": ("[CLS] $A [SEP]", dict(unk="[UNK]", pad="[PAD]", cls="[CLS]", sep="[SEP]")),
    # One token for the end, padding and the unknown.
    "clip": ("<s> $A </s>", dict(bos="<s>", eos="</s>", unk="</s>", pad="</s>")),
    "gemma": ("<bos> $A", dict(pad="<pad>", eos="<eos>", bos="<bos>", unk="<unk>")),
    # Adds no tokens, and has none for padding.
    "gpt2": ("$A", dict(eos="<end>", unk="<unk>")),
    "umt5": ("$A </s>", dict(pad="<pad>", eos="</s>", unk="<unk>")),
}
_TOKENS["clip_text_model"] = _TOKENS["clip"]
KINDS = tuple(_TOKENS)


def save_encoder(folder: Path, kind: str):
    """Saves an encoder of a kind and its tokenizer in one folder.

    Returns:
      the PyTorch model that reads text, and the tokenizer.
    """
    tokenizer = _tokenizer(kind)
    torch.manual_seed(0)
    model = _model(
        kind, len(tokenizer), {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    parts = {"clip": "text_model", "umt5": "encoder"}
    return (getattr(model, parts[kind]) if kind in parts else model).eval(), tokenizer


def _tokenizer(kind: str):
    template, roles = _TOKENS[kind]
    special = list(dict.fromkeys(roles.values()))
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=roles["unk"]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special if token in template]
    )
    # As in the files of sentence-transformers: settings for other users, which must not matter here.
    words.enable_truncation(5)
    words.enable_padding(length=20)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **{f"{role}_token": token for role, token in roles.items()}
    )


def _model(kind: str, vocab_size: int, ids: dict[str, int | None]):
    shape = dict(vocab_size=vocab_size, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
    inner = dict(intermediate_size=48, max_position_embeddings=POSITIONS)
    ids = {f"{name}_token_id": value for name, value in ids.items()}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**shape, **inner))
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**shape, **inner, **ids))
    if kind == "clip_text_model":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape, **inner, **ids))
    if kind == "clip":
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        text = transformers.CLIPTextConfig(**shape, **inner, **ids)
        vision = transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        )
    if kind == "gemma":
        config = transformers.Gemma2Config(**shape, **inner, **ids, num_key_value_heads=2, head_dim=8)
        return transformers.Gemma2ForCausalLM(config).model
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=POSITIONS
        )
        return transformers.GPT2Model(config)
    if kind == "umt5":
        config = transformers.UMT5Config(
            vocab_size=vocab_size, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ids
        )
        return transformers.UMT5EncoderModel(config)
    raise ValueError(kind)
