"""Evaluations of frozen features: each is a dataclass of its constants; calling it yields scores."""
