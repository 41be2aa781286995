"""What the card still lacks for each line of ours, as commands that fill it."""

import dataclasses
import re
import shlex
from collections.abc import Sequence

from relloc.reports.compare import Entry
from relloc.reports.lines import label_lines
from relloc.reports.load import Line
from relloc.reports.published import PUBLISHED_MODEL, CardPart, card_parts
from relloc.results import NOT_OURS

_DATA_SETS = (
    "The data sets are found by RELLOC_VOC, RELLOC_IN1K, RELLOC_PLACES205 and RELLOC_INAT18, or eval.NAME.data.root=. "
    "Hours are estimates for one GPU with 16 cores that reads shards."
)
FILL_CARD = "python -m relloc.evaluate checkpoint=RUN eval=card_classification"
_NOTHING_YET = (
    f"No {PUBLISHED_MODEL} line has a number on the card's images: {FILL_CARD} measures them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fill:
    """A line's missing evaluations, each with the command that measures it."""

    label: str
    commands: tuple[str, ...]


def advice(entries: Sequence[Entry], missing: Sequence[Fill]) -> str:
    """What to do about missing cells; "" where none is."""
    if not any(each.fills_card for each in entries):
        return _NOTHING_YET
    return _DATA_SETS if missing else ""


def fills(entries: Sequence[Entry]) -> tuple[Fill, ...]:
    """For each line that is on the card, and its controls, a command an evaluation that lacks a cell.

    A command measures both ways of batch norm: it stands once, with the line as trained, if there is one.
    """
    there = {
        (each.measured.line.whole, each.result.table, each.result.column)
        for each in entries
        if each.fills_card
    }
    lines = {line for line, _, _ in there}
    if lines:
        # Random initialization and supervised weights, where no line has them
        for name in set(NOT_OURS) - {line.checkpoint for line in lines}:
            lines.add(Line(checkpoint=name, model=PUBLISHED_MODEL, batch_norm="as_trained", seed=0))

    def lacking(line: Line) -> list[CardPart]:
        return [
            part
            for part in card_parts()
            if part.evaluation
            # Fine-tuning gathers statistics of its own: it is run once, not for each way of batch norm
            and not (part.kind == "fine-tuned" and line.batch_norm != "as_trained")
            and not all((line, part.table, column) in there for column in part.columns)
        ]

    found = []
    for line, label in label_lines({each.measured.line.whole for each in entries} | lines).items():
        as_trained = dataclasses.replace(line, batch_norm="as_trained")
        asked = lacking(as_trained) if line != as_trained and as_trained in lines else []
        commands = tuple(command(line, part) for part in lacking(line) if part not in asked)
        if line in lines and commands:
            found.append(Fill(label=label, commands=commands))
    return tuple(found)


def command(line: Line, part: CardPart) -> str:
    """The shell command that measures a part of the card, with its hours as a comment."""
    model = [f"model={line.model}"] if line.checkpoint in NOT_OURS else []
    batch_norm = [f"batch_norm={line.batch_norm}"] if line.batch_norm != "as_trained" else []
    seed = [f"seed={line.seed}"] if line.seed else []
    words = [
        f"checkpoint={_quoted(line.checkpoint)}",
        *model,
        f"eval={part.evaluation}",
        *batch_norm,
        *seed,
    ]
    return f"{shlex.join(['python', '-m', 'relloc.evaluate', *words])}  # about {part.hours} h"


def _quoted(path: str) -> str:
    """As Hydra reads it: anything but plain words and slashes stands in quotes."""
    if re.fullmatch(r"[\w./+@%-]+", path):
        return path
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
