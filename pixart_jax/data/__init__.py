"""Sources of images and captions, image sizes and crops, feature shards, and the loader. Does not use JAX."""
