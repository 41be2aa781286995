"""Semantic segmentation by a fully convolutional network: network, training crops, and testing."""
