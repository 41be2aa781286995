"""The study of human accuracy: a person answers the pretext task on a page of this machine.

`study.py` is the evaluation. `questions.py` makes the pairs, `session.py` keeps the answers,
`server.py` serves `page.html`, and `comparison.py` sets the answers beside those of a network.
"""
