"""Writes the numbers of the study of shortcuts as CSV, and its verdicts as Markdown."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from relloc.files import write_whole
from relloc.results import Score
from relloc.studies.shortcuts.verdicts import Verdict

_COLUMNS = (
    *("metric", "layer", "table", "column", "variant", "value", "low", "high", "unit", "n"),
    *("choice", "details"),
)


def write_tables(scores: Sequence[Score], verdicts: Sequence[Verdict], folder: Path) -> None:
    """Writes shortcuts.csv, with a line for each number, and verdicts.md into a folder."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for score in scores:
        fields = vars(score) | {"details": "; ".join(score.details)}
        writer.writerow([fields[name] for name in _COLUMNS])
    write_whole(folder / "shortcuts.csv", written.getvalue().encode())
    write_whole(folder / "verdicts.md", _markdown(verdicts).encode())


def _markdown(verdicts: Sequence[Verdict]) -> str:
    lines = ["| shortcut | verdict | number | images | sources |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        effect = verdict.effect
        cells = (
            verdict.full_title,
            verdict.verdict_text,
            verdict.number_text,
            str(effect.n),
            str(effect.sources),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
