"""Tiny image-to-text models of transformers with random weights."""

from pixart_jax.captioning.run import INSTRUCTION


def tokenizer():
    """Returns a tokenizer whose tokens are the words of a fixed list."""
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
        extra_special_tokens={"image_token": "<image>"},
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
