"""Data: sources of images and captions, geometry, feature shards, and the loader. Knows nothing of JAX."""
