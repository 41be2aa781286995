"""Finds the trainings that a word of a command line names: that of a run folder, or of a sweep."""

import os
from collections.abc import Sequence
from pathlib import Path

from relloc.errors import DamagedFile, UsageError
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import SWEEP_FILE, find_sweep, is_named
from relloc.tracking.record import RUN_FILE, RunRecord

_TRAINING = "train"


def find_trainings(setting: str, words: Sequence[str]) -> tuple[list[Point], list[DamagedFile]]:
    """Returns the trainings that `words`, the value of `setting`, name, each once.

    A run folder is a point without settings. A sweep may get more points later, and its points may
    not have begun. Words whose run or sweep has a damaged file are left out, and the errors are
    returned.

    Raises:
        UsageError: a word names neither, or no training; the message begins with the setting.
        DamagedFile: the record of a run or the list of a sweep's points can't be read, and no other
            word names a training.
    """
    by_folder: dict[Path, Point] = {}
    problems = []
    for word in words:
        try:
            points = _trainings_of(setting, word)
        except DamagedFile as error:
            problems.append(error)
            continue
        for point in points:
            by_folder.setdefault(point.folder, point)
    if problems and not by_folder:
        raise problems[0]
    return list(by_folder.values()), problems


def _trainings_of(setting: str, word: str) -> list[Point]:
    folder = Path(os.path.abspath(word))
    if word and (folder / RUN_FILE).is_file():
        kind = RunRecord.read(folder).tags.get("relloc.kind", "")
        if kind != _TRAINING:
            raise UsageError(
                f"{setting}={word} is a run of relloc.{kind or 'another command'}, which saves no "
                "checkpoints: give the folder of a run of relloc.train"
            )
        return [Point(kind=kind, name=folder.name, overrides=(), identity="", folder=folder)]
    # A folder without a run, such as one that a training has not yet written to, is no sweep's
    # either. A name without a slash may be that of a sweep.
    is_sweep = (folder / SWEEP_FILE).is_file() or is_named(word.removeprefix("sweep="))
    if not is_sweep:
        problem = "has no run yet" if folder.is_dir() else "does not exist"
        raise UsageError(
            f"{setting}={word} {problem}: give the run folder of a training that has begun, or the "
            "name or folder of a sweep (RELLOC_RUNS names another folder of runs)"
        )
    points = [point for point in find_sweep(word).points() if point.kind == _TRAINING]
    if not points:
        raise UsageError(
            f"{setting}={word} is a sweep without trainings, and nothing else saves checkpoints: "
            "give a sweep of relloc.train"
        )
    return points
