"""What the card still lacks for each line of ours, as commands that fill it."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set

from relloc.reports.entries import Entry
from relloc.reports.groups import CARD_GROUP
from relloc.reports.labels import label_lines
from relloc.reports.measured import Line
from relloc.reports.places import SECTIONS
from relloc.reports.published import PUBLISHED_MODEL
from relloc.results import NOT_OURS

_MEMBERS = {"knn": "knn_in1k"}  # of conf/eval, where it is not called after its rows
_DATA_SETS = (
    "The data sets are found by RELLOC_VOC, RELLOC_IN1K, RELLOC_PLACES205 and RELLOC_INAT18, or eval.NAME.data.root=."
)
_NOTHING_YET = (
    f"No {PUBLISHED_MODEL} line has a number on the card's images: python -m relloc.evaluate checkpoint=RUN "
    "eval=card_classification measures them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fill:
    """A line's missing evaluations, each with the command that measures it."""

    label: str
    commands: tuple[str, ...]


def is_cell_of_card(entry: Entry) -> bool:
    """Whether a number fills a cell that the published model has on the card."""
    of_card = entry.group == CARD_GROUP and entry.result.model == PUBLISHED_MODEL
    return of_card and entry.place is not None and entry.place.as_published


def advice(entries: Sequence[Entry]) -> str:
    """What to do about missing cells; "" where none is."""
    if not any(map(is_cell_of_card, entries)):
        return _NOTHING_YET
    return _DATA_SETS if commands(entries) else ""


def commands(entries: Sequence[Entry]) -> tuple[Fill, ...]:
    """For each line that is on the card, and its controls, a command an evaluation that lacks a cell.

    A command measures both ways of batch norm: it stands once, with the line as trained, if there is one.
    """
    there = {
        (each.measured.line.whole, each.result.eval, each.place.column)
        for each in entries
        if each.place and is_cell_of_card(each)
    }
    lines = {line for line, _, _ in there}
    lines |= _controls(lines)
    lacking = {line: tuple(_lacking(line, there)) for line in lines}
    labels = label_lines({each.measured.line.whole for each in entries} | lines)
    filled = (Fill(label=labels[line], commands=_commands(line, lacking)) for line in labels if line in lines)
    return tuple(fill for fill in filled if fill.commands)


def _controls(lines: Set[Line]) -> set[Line]:
    """Random initialization and supervised weights, where some line is on the card but none has them."""
    missing = set(NOT_OURS) - {line.checkpoint for line in lines} if lines else set()
    return {Line(checkpoint=name, model=PUBLISHED_MODEL, batch_norm="as_trained", seed=0) for name in missing}


def _lacking(line: Line, there: Set[tuple[Line, str, str]]) -> Iterator[str]:
    for section in SECTIONS:
        for evaluation, columns in section.columns.items():
            lacks = any((line, evaluation, column) not in there for column in columns)
            if section.built and lacks and not _is_alike(line, evaluation):
                yield evaluation


def _commands(line: Line, lacking: Mapping[Line, Sequence[str]]) -> tuple[str, ...]:
    as_trained = dataclasses.replace(line, batch_norm="as_trained")
    asked = () if as_trained == line else lacking.get(as_trained, ())
    return tuple(command(line, evaluation) for evaluation in lacking[line] if evaluation not in asked)


def _is_alike(line: Line, evaluation: str) -> bool:
    """Fine-tuning gathers statistics of its own: it is run once, not for each way of batch norm."""
    return evaluation.startswith("semisup") and line.batch_norm != "as_trained"


def command(line: Line, evaluation: str) -> str:
    """The shell command that measures an evaluation of a line."""
    words = [f"checkpoint={_quoted(line.checkpoint)}"]
    if line.checkpoint in NOT_OURS:
        words.append(f"model={line.model}")
    words += [f"eval={_MEMBERS.get(evaluation, evaluation)}"]
    if line.batch_norm != "as_trained":
        words.append(f"batch_norm={line.batch_norm}")
    if line.seed:
        words.append(f"seed={line.seed}")
    return shlex.join(["python", "-m", "relloc.evaluate", *words])


def _quoted(path: str) -> str:
    """As Hydra reads it: anything but plain words and slashes stands in quotes."""
    if re.fullmatch(r"[\w./+@%-]+", path):
        return path
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
