"""Pretraining: the objective, its training loop, and how a run stops without losing work."""
