"""Fine-tuning: trains a backbone further with labels, in a classifier, detector or segmenter."""
