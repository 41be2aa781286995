"""Pretraining: the objective, its optimization, and how a run is kept from losing work."""
