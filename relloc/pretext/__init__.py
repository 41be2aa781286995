"""Trains the pretext task: predict where one patch of an image lies relative to another."""
