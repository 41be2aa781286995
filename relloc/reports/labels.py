"""Labels: a short name for each line of ours."""

import re
from collections.abc import Iterable
from pathlib import Path

from relloc.reports.measured import Line
from relloc.reports.published import PUBLISHED_MODEL
from relloc.results import NOT_OURS

RUN_WEIGHTS = "backbone.safetensors"  # as relloc.backbone_files names it, whose import takes seconds


def label_lines(lines: Iterable[Line]) -> dict[Line, str]:
    """A short name for each line, no two alike; random and supervised ones first, then by name."""
    lines = tuple(lines)
    names = short_names({line.checkpoint for line in lines})
    labels = {line: _label(line, names[line.checkpoint]) for line in lines}
    return {line: labels[line] for line in sorted(lines, key=lambda line: _rank(line, names[line.checkpoint]))}


def _rank(line: Line, name: str) -> tuple[object, ...]:
    kind = (line.checkpoint not in NOT_OURS, _natural(name), line.model, line.seed, line.batch_norm, line.checkpoint)
    return *kind, _natural(line.apart)


def _label(line: Line, name: str) -> str:
    model = [] if line.model == PUBLISHED_MODEL else [line.model]
    batch_norm = [] if line.batch_norm == "as_trained" else [line.batch_norm]
    apart = [f"run {line.apart}"] if line.apart else []
    return ", ".join([name, *model, *batch_norm, f"seed {line.seed}", *apart])


def short_names(checkpoints: Iterable[str]) -> dict[str, str]:
    """The shortest end of each path, in whole folders, that no other has; a run folder's backbone is the folder."""
    tails = {path: [part for part in Path(path).parts if part != RUN_WEIGHTS] or [path] for path in checkpoints}
    names = {}
    for path, parts in tails.items():
        others = [other for name, other in tails.items() if name != path]
        unique = (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
        names[path] = "/".join(parts[-next(unique, len(parts)) :])
    return names


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
