"""The study of pretext accuracy: what a trained network answers about any set of images.

`study.py` is the evaluation. `boxes.py` finds pairs that lie inside objects, `reliability.py`
compares confidence with accuracy, `tables.py` and `pictures.py` save what was found.
"""
