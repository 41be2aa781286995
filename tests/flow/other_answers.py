"""Runs a command with other published numbers: `python other_answers.py FILE -m MODULE ARGUMENTS`.

FILE is JSON: `images`, how many by "DATASET SPLIT", and `numbers`, the fields of each published
number.
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

from relloc.reports import published
from relloc.runs import known_answers

file, _, module, *arguments = sys.argv[1:]
told = json.loads(Path(file).read_text())
parts = []
for part in published.card_parts():
    images = told["images"].get(f"{part.dataset} {part.split}", part.images)
    parts.append(dataclasses.replace(part, images=images))
published.card_parts = lambda: tuple(parts)
known_answers.published_numbers = lambda: tuple(
    published.Published(**fields) for fields in told["numbers"]
)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
