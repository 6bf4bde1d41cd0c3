"""Diffusion: noise schedule, training loss, guidance and samplers. Knows nothing of models."""
