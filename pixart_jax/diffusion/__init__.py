"""Diffusion: noise schedule, training loss, guidance and samplers. Does not depend on any model."""
