"""Numbers and names that several parts of the project share."""

# Downsampling factor of the SD and SDXL VAEs: pixels per latent position along a side.
VAE_DOWNSAMPLING = 8

# The largest values of fields and flags that several parts share; far above what any device can compute.
# Side of an image in pixels, which feature records store as uint16.
LARGEST_SIDE = 2**16 - 1
# Width of a layer, and number of text tokens.
LARGEST_WIDTH = 2**16
# Images or captions that are processed at a time.
LARGEST_BATCH = 2**20
# Threads of a pool.
MOST_THREADS = 1024
# Times that the records of a folder, or the images of one of kohya's folders, are repeated.
MOST_REPEATS = 10_000
# Model evaluations for an image.
MOST_STEPS = 10_000
# Default numbers of images that are encoded or decoded at a time, and of captions that are encoded at a time.
IMAGE_BATCH = 16
TEXT_BATCH = 64
# Name of the features of an image encoder in a feature record and in a batch: [tokens, width].
IMAGE_FEATURES = "image_features"
# Names of the samplers in `diffusion.samplers.SAMPLERS`, which needs JAX.
SAMPLER_NAMES = ("dpm_solver", "ddim", "iddpm", "sa_solver", "lcm")
