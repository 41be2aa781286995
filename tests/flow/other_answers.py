"""`python other_answers.py FILE -m MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` where other numbers are published.

FILE is JSON: `images`, how many by "DATASET SPLIT", and `numbers`, the fields of each published number.
"""

import json
import runpy
import sys
from pathlib import Path

from relloc.reports import known, published

file, _, module, *arguments = sys.argv[1:]
told = json.loads(Path(file).read_text())
published.PUBLISHED_IMAGES.update({tuple(where.split()): n for where, n in told["images"].items()})
known.published_numbers = lambda: tuple(published.Published(**fields) for fields in told["numbers"])
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
