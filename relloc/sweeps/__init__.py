"""Sweeps: their points, of which each is a run, and the status of these. Nothing here imports torch."""
