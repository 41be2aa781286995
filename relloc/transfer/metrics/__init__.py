"""Metrics of detection and segmentation, and pictures of what a network found."""
