"""Study of shortcuts: tricks that could solve the pretext task, and whether a network uses them.

`study.py` is the evaluation. `questions.py` lists what the network of the pretext task is asked,
`distortions.py` makes the images for it, `position.py` and `ridge.py` read positions off features.
"""
