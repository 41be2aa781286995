"""Fine-tuning: trains a backbone further with labels, inside a classifier, detector or segmenter."""
