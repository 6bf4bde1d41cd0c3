"""Tiny image-to-text models of transformers with random weights."""

from pixart_jax.captioning.run import INSTRUCTION


def tokenizer(**special):
    """Returns a tokenizer whose tokens are the words of a fixed list; `special` names special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT", *(f"w{i}" for i in range(90))]
    words += INSTRUCTION.split()
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special or {"image_token": "<image>"},
    )


def enlarge(model):
    """Scales up the random weights, so that captions differ between images."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(64 if "crossattention" in name else 8)
    return model


def save_llava(path):
    """Saves a LLaVA with its processor and chat template."""
    import torch
    import transformers

    words = tokenizer()
    template = (
        "<s>{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT"
    )
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(path)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=16)
    text = transformers.LlamaConfig(
        **size, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config = transformers.LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = enlarge(transformers.LlavaForConditionalGeneration(config))
    model.generation_config.temperature = 0.2  # as in released models; must be overridden without a warning
    model.generation_config.do_sample = True
    model.save_pretrained(path)


# Sizes of the networks below. Without the range, transformers initializes BLIP's image encoders with zeros.
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = {**_SMALL, "image_size": 16, "patch_size": 8, "initializer_range": 0.02}


def bert_tokenizer():
    """Returns a tokenizer with BERT's special tokens, as BLIP and Q-Formers have."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(90))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _image_processor():
    import transformers

    return transformers.BlipImageProcessorPil(size={"height": 16, "width": 16})


def save_blip(path):
    import torch
    import transformers

    words = bert_tokenizer()
    transformers.BlipProcessor(_image_processor(), words).save_pretrained(path)
    # As in released models, the tokenizer does not know the token that begins a caption.
    text = transformers.BlipTextConfig(
        **_SMALL, vocab_size=len(words) + 2, encoder_hidden_size=32, bos_token_id=len(words), pad_token_id=0,
        eos_token_id=2, sep_token_id=3,
    )  # fmt: skip
    vision = transformers.BlipVisionConfig(**_IMAGES)
    config = transformers.BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    torch.manual_seed(0)
    enlarge(transformers.BlipForConditionalGeneration(config)).save_pretrained(path)


def save_blip2(path, language="opt", instruct=False):
    """Saves a BLIP-2, or an InstructBLIP, whose language model is an OPT or a T5."""
    import torch
    import transformers

    name = "InstructBlip" if instruct else "Blip2"
    words = tokenizer(other="w0")  # the processor adds the image token
    processors = (words, bert_tokenizer()) if instruct else (words,)
    kind = getattr(transformers, f"{name}Processor")
    kind(_image_processor(), *processors, num_query_tokens=3).save_pretrained(path)
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if language == "opt":
        text = transformers.OPTConfig(
            **tokens, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=32, max_position_embeddings=64,
        )  # fmt: skip
    else:
        text = transformers.T5Config(
            **tokens, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    queries = getattr(transformers, f"{name}QFormerConfig")(
        **_SMALL, vocab_size=100, encoder_hidden_size=32, cross_attention_frequency=1
    )
    config = getattr(transformers, f"{name}Config")(
        vision_config=getattr(transformers, f"{name}VisionConfig")(**_IMAGES).to_dict(),
        qformer_config=queries.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = enlarge(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    with torch.no_grad():
        model.query_tokens.normal_()
    model.save_pretrained(path)


def save_qwen(path):
    """Saves a Qwen2-VL as it is released: its processor's parts, but not the joint processor."""
    import torch
    import transformers

    words = tokenizer(image_token="<image>", vision_start="<vs>", video_token="<video>")
    words.chat_template = (
        "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<vs> <image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT"
    )
    words.save_pretrained(path)
    transformers.Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2).save_pretrained(path)
    text = {
        **_SMALL, "vocab_size": len(words), "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    image, video, start = (words.convert_tokens_to_ids(token) for token in ("<image>", "<video>", "<vs>"))
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start,
    )  # fmt: skip
    torch.manual_seed(0)
    enlarge(transformers.Qwen2VLForConditionalGeneration(config)).save_pretrained(path)
