"""What the card still lacks for each line of ours, as commands that fill it."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence

from relloc.reports.compare import Entry
from relloc.reports.lines import label_lines
from relloc.reports.load import Line
from relloc.reports.published import PUBLISHED_MODEL, CardPart, card_parts
from relloc.results import NOT_OURS

_DATA_SETS = (
    "The data sets are found by RELLOC_VOC, RELLOC_IN1K, RELLOC_PLACES205 and RELLOC_INAT18, or eval.NAME.data.root=. "
    "Hours are estimates for one GPU with 16 cores that reads shards."
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


def advice(entries: Sequence[Entry]) -> str:
    """What to do about missing cells; "" where none is."""
    if not any(each.fills_card for each in entries):
        return _NOTHING_YET
    return _DATA_SETS if fills(entries) else ""


def fills(entries: Sequence[Entry]) -> tuple[Fill, ...]:
    """For each line that is on the card, and its controls, a command an evaluation that lacks a cell.

    A command measures both ways of batch norm: it stands once, with the line as trained, if there is one.
    """
    there = {(each.measured.line.whole, each.result.table, each.result.column) for each in entries if each.fills_card}
    lines = {line for line, _, _ in there}
    if lines:
        # Random initialization and supervised weights, where no line has them
        for name in set(NOT_OURS) - {line.checkpoint for line in lines}:
            lines.add(Line(checkpoint=name, model=PUBLISHED_MODEL, batch_norm="as_trained", seed=0))

    def lacking(line: Line) -> Iterator[CardPart]:
        for part in card_parts():
            # Fine-tuning gathers statistics of its own: it is run once, not for each way of batch norm
            is_done = part.kind == "fine-tuned" and line.batch_norm != "as_trained"
            has_all = all((line, part.table, column) in there for column in part.columns)
            if part.evaluation and not is_done and not has_all:
                yield part

    labels = label_lines({each.measured.line.whole for each in entries} | lines)
    found = []
    for line in (line for line in labels if line in lines):
        as_trained = dataclasses.replace(line, batch_norm="as_trained")
        asked = list(lacking(as_trained)) if line != as_trained and as_trained in lines else []
        commands = tuple(command(line, part) for part in lacking(line) if part not in asked)
        if commands:
            found.append(Fill(label=labels[line], commands=commands))
    return tuple(found)


def command(line: Line, part: CardPart) -> str:
    """The shell command that measures a part of the card, with its hours as a comment."""
    words = [f"checkpoint={_quoted(line.checkpoint)}"]
    if line.checkpoint in NOT_OURS:
        words.append(f"model={line.model}")
    words.append(f"eval={part.evaluation}")
    if line.batch_norm != "as_trained":
        words.append(f"batch_norm={line.batch_norm}")
    if line.seed:
        words.append(f"seed={line.seed}")
    return f"{shlex.join(['python', '-m', 'relloc.evaluate', *words])}  # about {part.hours} h"


def _quoted(path: str) -> str:
    """As Hydra reads it: anything but plain words and slashes stands in quotes."""
    if re.fullmatch(r"[\w./+@%-]+", path):
        return path
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
