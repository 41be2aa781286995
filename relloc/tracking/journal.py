"""journal.jsonl: every metric of a run, one JSON line per step, written before any tracker sees it.

A line is {"time_ms": Unix milliseconds, "step": int, "metrics": {name: value}}. system.jsonl is another journal, of the
machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from relloc.errors import DamagedFile
from relloc.files import append_lines, parse_json, read_lines
from relloc.tracking.record import legal_name, now_ms

JOURNAL_FILE = "journal.jsonl"
SYSTEM_FILE = "system.jsonl"
_LOST = "Remove that line, or put back a copy of the file; no weights and no results depend on it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the journal: the metrics of a step and when they were logged (Unix ms).

    JSON has no nan and no infinities: they are written as the text "nan", "inf" and "-inf".
    """

    time_ms: int
    step: int
    metrics: dict[str, float]


class Journal:
    """The journal of a run folder, open for more. Only one process of a run may write it.

    On a journal that is already there (a resumed run) a half-written last line is cut off, and
    values of steps that a metric already has are left out. The steps of one metric only grow.
    """

    def __init__(self, run_dir: Path, file: str = JOURNAL_FILE) -> None:
        self._path = run_dir / file
        self._last_step: dict[str, int] = {}
        for entry in read_journal(run_dir, file=file):
            self._last_step.update(dict.fromkeys(entry.metrics, entry.step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step and hand them to the operating system before returning.

        Raises:
            ValueError: a name has characters that trackers refuse.
        """
        if illegal := [name for name in metrics if legal_name(name) != name]:
            raise ValueError(
                f"metric names {illegal}: only letters, digits and _ - . : / space are allowed"
            )
        fresh = {
            name: float(value)
            for name, value in metrics.items()
            if step > self._last_step.get(name, -math.inf)
        }
        if not fresh:
            return
        texts = {
            name: value if math.isfinite(value) else str(value) for name, value in fresh.items()
        }
        line = json.dumps(
            {"time_ms": now_ms(), "step": step, "metrics": texts},
            ensure_ascii=False,
            allow_nan=False,
        )
        append_lines(self._path, [line], durable=False)  # training does not wait for the disk
        self._last_step.update(dict.fromkeys(fresh, step))


def read_journal(run_dir: Path, first_line: int = 0, file: str = JOURNAL_FILE) -> list[Entry]:
    """Read the journal from a line (counted from 0) on; a last line still being written is left out.

    Raises:
        DamagedFile: a complete line is not a journal entry, with its line number (counted from 1).
    """
    path = run_dir / file
    try:
        lines = read_lines(path)
    except OSError as error:
        raise DamagedFile(
            f"{path} can't be read ({error.strerror}): put back a copy, or move it away"
        ) from error
    return [
        parse_json(line, Entry, f"{path} line {number} is not a journal entry", _LOST)
        for number, line in enumerate(lines[first_line:], start=first_line + 1)
    ]
