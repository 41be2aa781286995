"""Features of images from a frozen backbone, layer by layer, and what is computed from them."""
