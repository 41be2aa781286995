"""From a frozen backbone and images to pooled features, layer by layer."""
