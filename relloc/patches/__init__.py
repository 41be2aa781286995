"""Cuts patches out of images and removes cues that would make the pretext task trivial."""
