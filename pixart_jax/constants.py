"""Numbers that several parts of the project share."""

# Downsampling factor of the SD and SDXL VAEs: pixels per latent position along a side.
VAE_DOWNSAMPLING = 8
