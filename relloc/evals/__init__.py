"""Evaluations of frozen features, such as nearest neighbors, linear classifiers and SVMs.

Each is a frozen dataclass of its hyperparameters that derives from
`relloc.evaluation.contract.Evaluation`; its `run` yields scores.
"""
