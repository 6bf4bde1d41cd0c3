"""The text encoder and the image codec, and the feature records they make from samples.

`precompute`, training, sampling and evaluation all encode with these classes, so that prompts and training
captions go through the same cleaning, tokenizer, truncation and padding. This file imports nothing, so that
code which only decodes images can import `images` without the text encoder.
"""
