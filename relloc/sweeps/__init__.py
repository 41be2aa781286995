"""Sweeps: their points, each of which is a run, and their status. Nothing here imports torch."""
