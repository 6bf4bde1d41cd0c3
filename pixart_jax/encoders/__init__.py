"""The text encoder and the image codec, and the feature records they make of samples.

`precompute`, training, sampling and evaluation all encode through these classes, so that a prompt and a
training caption meet the same cleaning, tokenizer, truncation and padding. Nothing is imported here: what
only decodes images (`images`) does not load the text encoder.
"""
