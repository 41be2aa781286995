"""Data sets of images: finding, reading, cropping, ordering and batching them."""
