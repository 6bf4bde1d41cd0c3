"""An image-to-text model of transformers as a function from images and instructions to captions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pixart_jax.errors import UserError, did_you_mean
from pixart_jax.hub import local

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
PROMPT_STYLES = ("auto", "chat", "plain", "none")

# Takes images (uint8 [H, W, 3] each) and one instruction per image, and returns one caption per image.
Describe = Callable[[list[np.ndarray], list[str]], list[str]]


def load_captioner(
    name: str,
    *,
    max_new_tokens: int = 512,
    prompt_style: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> Describe:
    """Loads an image-to-text model of transformers.

    Decoding is greedy, so that a caption only depends on the model, the image, the instruction and the other
    images of its batch.

    Args:
      name: a model id, a folder or a path of the hub that `AutoModelForImageTextToText` can open.
      max_new_tokens: length of the longest caption, in tokens of the model.
      prompt_style: how the model gets the instruction. "chat": through its chat template. "plain": as the
        text that goes with the image; for most models with a chat template it must contain the image token,
        and captions of BLIP begin with it. "none": not at all, for models that take only an image. "auto":
        "chat" if the model has a chat template, else "plain" if it needs an instruction and no image token in
        it (InstructBLIP), else "none".
      device: torch device; "auto" is cuda if there is one, else cpu.
      dtype: torch dtype of the weights; "auto" is bfloat16 on cuda and float32 on cpu.

    Returns:
      a function from images and instructions to captions.

    Raises:
      UserError: a package is missing, the model cannot be opened, or it has no chat template for "chat".
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"captioning needs the package '{error.name}', which is not installed; "
            "pip install 'pixart_jax[caption]'"
        ) from None
    if prompt_style not in PROMPT_STYLES:
        close = did_you_mean(prompt_style, PROMPT_STYLES)
        raise UserError(f"prompt_style is '{prompt_style}': choose one of {', '.join(PROMPT_STYLES)}.{close}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype is '{dtype}': give a torch dtype such as float32, bfloat16 or float16.")
    name = str(local(name))
    try:
        processor = _Processor(name)
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype))
    # transformers raises these for a wrong name, a wrong kind of model, or a package that the model needs.
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': {reason}; give an image-to-text model of transformers.") from None
    model = model.to(device).eval()
    for part in model.modules():
        # Not an argument of `generate`, because BLIP passes its own to the part that writes text.
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        # A decoder continues from the last position. An encoder (BLIP-2 with T5) reads the image tokens in
        # front of the padding, so padding on the left would separate them from the text.
        if getattr(getattr(part, "config", None), "is_encoder_decoder", False):
            processor.tokenizer.padding_side = "right"
    if prompt_style == "auto":
        prompt_style = "chat" if processor.chat_template else "plain" if processor.needs_text else "none"
    if prompt_style == "chat" and not processor.chat_template:
        raise UserError(f"model '{name}' has no chat template: use prompt_style plain or none.")
    print(f"{name} on {device} in {dtype}, prompt style {prompt_style}", flush=True)

    def describe(images: list[np.ndarray], instructions: list[str]) -> list[str]:
        try:
            return captions(images, instructions)
        except (TypeError, ValueError) as error:  # raised by models that expect other inputs
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"model '{name}' cannot caption images with prompt_style {prompt_style} ({reason}): try "
                "another prompt_style or another model."
            ) from error

    def captions(images: list[np.ndarray], instructions: list[str]) -> list[str]:
        inputs = processor(images, instructions, prompt_style).to(device, dtype=model.dtype)
        with torch.inference_mode():
            # temperature, top_p and top_k override the model's own sampling settings, which would cause
            # warnings because greedy decoding does not use them.
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        prompt = inputs.get("input_ids")
        # Decoder-only models return the prompt followed by the caption; others return the caption only.
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    return describe


def _joint_processor(name: str) -> Any:
    """Opens the processor of a model, but without its processor for videos if that cannot run here."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if not transformers.utils.is_torchvision_available():
        cls = PROCESSOR_MAPPING.get(type(transformers.AutoConfig.from_pretrained(name)), None)
        names = cls.get_attributes() if cls else []
        if names[-1:] == ["video_processor"]:  # the last argument of the class, which is then left out
            without = {"get_attributes": classmethod(lambda cls: names[:-1])}
            return type(cls.__name__, (cls,), without).from_pretrained(name)
    return transformers.AutoProcessor.from_pretrained(name)


class _Processor:
    """The tokenizer and the image processor of a model, whether published together or separately."""

    def __init__(self, name: str):
        import transformers

        joint = _joint_processor(name)
        if hasattr(joint, "image_processor") and hasattr(joint, "tokenizer"):
            self.joint, self.image_processor, self.tokenizer = joint, joint.image_processor, joint.tokenizer
        else:  # encoder-decoder models have no joint processor
            self.joint = None
            self.image_processor = transformers.AutoImageProcessor.from_pretrained(name)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.chat_template = getattr(self.joint, "chat_template", None)
        # InstructBLIP's Q-Former reads the instruction together with the image.
        self.needs_text = hasattr(self.joint, "qformer_tokenizer")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, pixels: list[np.ndarray], instructions: list[str], prompt_style: str) -> Any:
        # As Pillow images, because with arrays the processors guess which axis holds the colours.
        images = [Image.fromarray(array) for array in pixels]
        if self.joint is None:
            return self.image_processor(images, return_tensors="pt")
        if prompt_style == "none":
            return self.joint(images=images, return_tensors="pt")
        if prompt_style == "plain":
            return self.joint(images=images, text=instructions, padding=True, return_tensors="pt")
        # An original caption may contain special tokens as text. An image token would make the model expect
        # another image.
        for token in self.tokenizer.all_special_tokens:
            instructions = [text.replace(token, " ") for text in instructions]
        texts = []
        for instruction in instructions:
            content = [{"type": "image"}, {"type": "text", "text": instruction}]
            message = {"role": "user", "content": content}
            texts.append(
                self.joint.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            )
        bos = self.tokenizer.bos_token
        return self.joint(
            images=[[image] for image in images],
            text=texts,
            padding=True,
            return_tensors="pt",
            # The template may already have written the token that begins a text.
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
