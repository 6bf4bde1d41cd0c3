"""Numbers that several parts of the project share."""

# Pixels per latent position along a side, of the SD and SDXL VAEs.
VAE_DOWNSAMPLING = 8
