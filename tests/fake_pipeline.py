"""A fake pipeline for the evaluation tests: an image is a function of its prompt and seed."""

import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np

from pixart_jax.diffusion.guidance import uses_guidance
from pixart_jax.pipeline import Pipeline


class FakePipeline:
    """Counts its images; raises `KeyboardInterrupt` once it has generated `limit` of them."""

    config = SimpleNamespace(guidance=SimpleNamespace(scale=4.5))

    def __init__(self, side=8, limit=None):
        self.side, self.limit, self.drawn, self.arguments = side, limit, 0, None

    def resolve(self, settings):
        scale = self.config.guidance.scale if settings.guidance_scale is None else settings.guidance_scale
        uses_guidance(scale)
        return dataclasses.replace(settings, guidance_scale=scale), None

    def __call__(self, prompts, *, seed, images_per_prompt, batch_size, **arguments):
        if self.limit is not None and self.drawn >= self.limit:
            raise KeyboardInterrupt
        # Accept only the arguments of the real pipeline.
        inspect.signature(Pipeline.__call__).bind(self, prompts, **arguments)
        assert isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
        seeds = np.broadcast_to(seed, (len(prompts),))
        self.drawn += len(prompts) * images_per_prompt
        self.arguments = arguments
        return np.stack(
            [
                picture_of(prompt, int(first) + copy, self.side)
                for prompt, first in zip(prompts, seeds)
                for copy in range(images_per_prompt)
            ]
        )


def picture_of(prompt, seed, side=8):
    """uint8 [side, side, 3]."""
    rng = np.random.default_rng([seed, *prompt.encode()])
    return rng.integers(0, 256, (side, side, 3), np.uint8)
