"""Dense captions for the images of a source: the model that writes them, and the run over all images."""
