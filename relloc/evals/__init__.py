"""Evaluations of frozen features, such as nearest neighbors, linear classifiers and SVMs.

Each is a frozen dataclass of its hyperparameters that derives from
`relloc.evaluation.contract.Evaluation`; its `run` yields scores. The evaluations are in `knn`,
`linear`, `voc07_svm`, `low_shot` and `label_free`; the other modules are what they compute with:
`heads` and `training` for many linear classifiers at once, `squared_hinge` for many SVMs, `voc07`
for labels of VOC, and `metrics`. Evaluations that fine-tune are in `relloc.transfer`.
"""
