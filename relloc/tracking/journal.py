"""Reads and writes the metrics of a run in its folder: journal.jsonl, one JSON line per step.

Metrics are written here first; MLflow gets a copy later. A line looks like
{"time_ms": 1700000000000, "step": 20, "metrics": {"train/loss": 1.9}}, where time_ms is Unix time
in milliseconds. system.jsonl has the same form and holds the load of the machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from relloc.files import append_lines, read_json_lines
from relloc.tracking.record import legal_name, now_ms

JOURNAL_FILE = "journal.jsonl"
SYSTEM_FILE = "system.jsonl"
_LOST = "Remove that line, or put back a copy of the file; no weights and no results depend on it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a journal: the metrics of a step, and when they were logged (Unix ms).

    JSON has no nan and no infinities: they are written as the text "nan", "inf" and "-inf".
    """

    time_ms: int
    step: int
    metrics: dict[str, float]


class Journal:
    """Appends metrics to a journal of a run folder. Only one process of a run may write it.

    A resumed run appends to the journal that is there: a half-written last line is cut off, and
    steps that a metric already has are not written again. The steps of one metric only grow.

    Example: `Journal(run_dir).log({"train/loss": 1.9}, step=20)`

    Args:
        run_dir: the run folder.
        file: the name of the journal in it.

    Raises:
        DamagedFile: the journal that is there can't be read.
    """

    def __init__(self, run_dir: Path, file: str = JOURNAL_FILE) -> None:
        self._path = run_dir / file
        self._last_step: dict[str, int] = {}  # of each metric
        for entry in read_journal(run_dir, file=file):
            self._last_step.update(dict.fromkeys(entry.metrics, entry.step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step; on return the operating system has them.

        Raises:
            ValueError: a name has characters that trackers refuse.
        """
        illegal = [name for name in metrics if legal_name(name) != name]
        if illegal:
            raise ValueError(
                f"The metric names {illegal} can't be used: "
                "only letters, digits and _ - . : / space are allowed."
            )
        # A resumed run repeats the steps since its last checkpoint; those are in the journal
        # already.
        fresh = {
            name: float(value)
            for name, value in metrics.items()
            if step > self._last_step.get(name, -math.inf)
        }
        if not fresh:
            return
        # JSON has no nan and no infinities, so they are written as text.
        json_values = {
            name: value if math.isfinite(value) else str(value) for name, value in fresh.items()
        }
        line = json.dumps(
            {"time_ms": now_ms(), "step": step, "metrics": json_values},
            ensure_ascii=False,
            allow_nan=False,
        )
        # Not durable: training does not wait for the disk, and a lost line can be trained again.
        append_lines(self._path, [line], durable=False)
        self._last_step.update(dict.fromkeys(fresh, step))


def read_journal(run_dir: Path, first_line: int = 0, file: str = JOURNAL_FILE) -> list[Entry]:
    """Read the entries of a journal. A last line that is still being written is left out.

    Args:
        run_dir: the run folder; without a journal the list is empty.
        first_line: the first line to read, counted from 0.
        file: the name of the journal.

    Raises:
        DamagedFile: the file can't be read, or a complete line is not an entry. The message has the
            number of the line, counted from 1.
    """
    return read_json_lines(run_dir / file, Entry, "a journal entry", _LOST, first_line)
