"""Sweeps: their points, each a run of its own, and how these stand. Nothing here imports torch."""
