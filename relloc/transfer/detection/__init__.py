"""Object detection: Faster R-CNN and its parts, each written from the published constants."""
