"""Training a backbone further with labels, inside a classifier, a detector or a segmenter."""
