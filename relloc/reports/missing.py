"""Lists what is still missing on the published card for our checkpoints, as commands to run."""

import dataclasses
import re
import shlex
from collections.abc import Sequence

from relloc.reports.compare import ReportEntry
from relloc.reports.hours import hours_text
from relloc.reports.lines import label_lines
from relloc.reports.load import Line
from relloc.reports.published import PUBLISHED_MODEL, CardPart, card_parts
from relloc.results import REFERENCE_MODELS

_DATA_SETS = (
    "The data sets are found by RELLOC_VOC, RELLOC_IN1K, RELLOC_PLACES205, RELLOC_INAT18, "
    "RELLOC_COCO, RELLOC_CITYSCAPES and RELLOC_VOC_PROPOSALS, or eval.NAME.data.root=. Estimated "
    "hours are for 16 cores beside the GPU, and images in shards, or in files where an evaluation "
    "needs boxes or masks."
)
FILL_CARD = "python -m relloc.evaluate checkpoint=RUN eval=card"
_NOTHING_YET = (
    f"No {PUBLISHED_MODEL} line has a number on the card's images: {FILL_CARD} measures them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingEvaluations:
    """The evaluations that a line of the report lacks, each as the command that measures it."""

    label: str
    commands: tuple[str, ...]


def advice(entries: Sequence[ReportEntry], missing: Sequence[MissingEvaluations]) -> str:
    """Returns a sentence on what to do about missing cells, or "" where none is missing."""
    # Other models, or other images
    if not any(each.fills_card for each in entries):
        return _NOTHING_YET
    return _DATA_SETS if missing else ""


def missing_evaluations(entries: Sequence[ReportEntry]) -> tuple[MissingEvaluations, ...]:
    """Returns the missing evaluations of each line that is on the card, and of its controls.

    The controls are random and supervised weights. One command measures a line both with batch norm
    as trained and recalibrated; it is listed once, at the line as trained if there is one.
    """
    filled = {
        (_without_decoder(each.measured.line), each.result.table, each.result.column)
        for each in entries
        if each.fills_card
    }
    lines = {line for line, _, _ in filled}
    if lines:
        # The controls that no line has yet are missing as a whole
        for name in set(REFERENCE_MODELS) - {line.checkpoint for line in lines}:
            control = Line(
                checkpoint=name,
                model=PUBLISHED_MODEL,
                batch_norm="as_trained",
                seed=0,
            )
            lines.add(control)

    def missing_parts(line: Line) -> list[CardPart]:
        parts = []
        for part in card_parts():
            # Fine-tuning gathers batch-norm statistics of its own, so it is run once, as trained
            is_repeated = part.kind == "fine-tuned" and line.batch_norm != "as_trained"
            cells = [(line, part.table, column) for column in part.columns]
            is_filled = all(cell in filled for cell in cells)
            if part.evaluation and not is_repeated and not is_filled:
                parts.append(part)
        return parts

    # Labels are made of all lines, so that these are named here as in the tables
    shown = {each.measured.line.without_variant for each in entries}
    decoders = _decoders(entries)
    named = {dataclasses.replace(line, decoder=decoders.get(line, "")): line for line in lines}
    labels = label_lines(shown | set(named))
    missing = []
    for shown_line, label in labels.items():
        if shown_line not in named:
            continue
        line = named[shown_line]
        # What the line as trained lists is measured for this one by the same commands
        as_trained = dataclasses.replace(line, batch_norm="as_trained")
        is_listed_there = line != as_trained and as_trained in lines
        listed = missing_parts(as_trained) if is_listed_there else []
        parts = [part for part in missing_parts(line) if part not in listed]
        if parts:
            commands = tuple(command(shown_line, part) for part in parts)
            missing.append(MissingEvaluations(label=label, commands=commands))
    return tuple(missing)


def _without_decoder(line: Line) -> Line:
    """Returns a line as one with that of other decoders, since not all evaluations use them."""
    return dataclasses.replace(line, decoder="", variant="")


def _decoders(entries: Sequence[ReportEntry]) -> dict[Line, str]:
    """Returns the decoder by which the rest of each line on the card is to be measured, too.

    It is that of the device if any number of the line was measured by it.
    """
    decoders: dict[Line, str] = {}
    for each in entries:
        if each.fills_card:
            line = _without_decoder(each.measured.line)
            decoders[line] = max(decoders.get(line, ""), each.measured.line.decoder)
    return decoders


def command(line: Line, part: CardPart) -> str:
    """Returns the shell command that measures a part of the card, its hours as a comment."""
    words = [f"checkpoint={_quoted(line.checkpoint)}"]
    # A checkpoint of ours names its model, and settings at their defaults are left out
    if line.checkpoint in REFERENCE_MODELS:
        model, *settings = line.model.split()
        words.append(f"model={model}")
        words += [f"model.backbone.{setting}" for setting in settings]
    words.append(f"eval={part.evaluation}")
    if line.batch_norm != "as_trained":
        words.append(f"batch_norm={line.batch_norm}")
    if line.strides:
        words.append(f"strides={line.strides}")
    if line.decoder and part.may_decode_on_device:
        words.append("decode=device")
    if line.seed:
        words.append(f"seed={line.seed}")
    line_of_shell = shlex.join(["python", "-m", "relloc.evaluate", *words])
    hours = hours_text(part.evaluation, part.hours)
    return f"{line_of_shell}  # {hours}" if hours else line_of_shell


def _quoted(path: str) -> str:
    """Returns a path as Hydra's grammar reads it: in quotes, unless it has plain signs only."""
    if re.fullmatch(r"[\w./+@%-]+", path):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
