"""Reads and writes watched.jsonl in a training's folder: results of its weights as they were saved.

`python -m relloc.evaluate watch=RUN` measures checkpoints while the training goes on. It runs in
another process than the training, which writes results.jsonl and journal.jsonl: hence a file of its
own. Several such commands may write to it, one after the other under a lock.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from relloc.files import append_lines, locked, read_json_lines
from relloc.results import Result, written_fields
from relloc.tracking.journal import Entry
from relloc.tracking.record import now_ms

WATCHED_FILE = "watched.jsonl"
# Begins the names of the curves, which distinguishes them from the results at the end.
PREFIX = "watch"
_LOST = "Remove that line, or put back a copy of the file; it holds curves only"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """A result of the weights that a training had after `step` steps.

    `time_ms` is when it was written (Unix ms). `result.checkpoint` is the file that was evaluated,
    which the training may have deleted since.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    step: int
    time_ms: int
    result: Result

    @property
    def curve(self) -> str:
        """The name of the curve that it is a point of, such as `watch/knn/feature4/top1_k20`."""
        return f"{PREFIX}/{self.result.tracked_name}"


def append_watched(run_dir: Path, step: int, rows: Iterable[Result]) -> None:
    """Appends results of the weights after `step` steps, without those that are there already.

    Raises:
        OSError: the file can't be written.
        DamagedFile: the file that is there can't be read.
    """
    path = run_dir / WATCHED_FILE
    with locked(path.with_name(f"{WATCHED_FILE}.lock")):
        known = {_identity(each) for each in read_watched(run_dir)}
        lines = []
        for row in rows:
            watched = Watched(step=step, time_ms=now_ms(), result=row)
            if _identity(watched) not in known:
                fields = {**vars(watched), "result": written_fields(row)}
                lines.append(json.dumps(fields, ensure_ascii=False))
        if lines:
            append_lines(path, lines)


def read_watched(run_dir: Path, first_line: int = 0) -> list[Watched]:
    """Returns what was watched of a training, in the order of the file.

    Args:
        run_dir: the folder of the training; without the file the list is empty.
        first_line: the first line to read, counted from 0.

    Raises:
        DamagedFile: the file can't be read, or a line is no watched result; the message has the
            number of the line, counted from 1.
    """
    path = run_dir / WATCHED_FILE
    return read_json_lines(path, Watched, "a watched result", _LOST, first_line)


def watched_entries(run_dir: Path, first_line: int = 0) -> list[Entry]:
    """Returns what was watched in the form of a journal, an entry a line. Raises `DamagedFile`.

    Numbers of spread, such as standard deviations over draws, have entries without metrics.
    """
    entries = []
    for each in read_watched(run_dir, first_line):
        metrics = {} if each.result.spread else {each.curve: each.result.value}
        entries.append(Entry(time_ms=each.time_ms, step=each.step, metrics=metrics))
    return entries


def _identity(watched: Watched) -> tuple[int, Result]:
    """Returns what two equal measurements share.

    The same weights may have been evaluated under several names, or copied from another run.
    """
    return watched.step, dataclasses.replace(watched.result, checkpoint="", measured_in="")
