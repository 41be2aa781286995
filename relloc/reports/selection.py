"""Selects results by words: folders and sweeps say where they lie, FIELD=VALUE which of them count.

Reports and notebooks take the same words, such as `runs sweep=gaps eval=knn grid.gap_px=0,21`.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from relloc.errors import UsageError
from relloc.reports.load import Measured
from relloc.reports.pretrainings import training_record
from relloc.results import NO_FILES, Result
from relloc.tracking.record import RUN_FILE, RunRecord, Scalar

_SWEEP = "sweep="
_FIELDS = frozenset(field.name for field in dataclasses.fields(Result))
# Beside the fields of a result: the name of its run, and the digest of its images
_RUN, _IMAGES = "run", "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """A condition on results: the text of `field` fits one of `patterns`.

    `field` is a field of `Result`, "run" (the name of the run), "images" (the beginning of the
    digest of the images), or a setting of the training of the evaluated weights, such as
    "grid.gap_px". Random and supervised weights, which have no such settings, are always kept.
    """

    field: str
    patterns: tuple[str, ...]

    @property
    def is_of_settings(self) -> bool:
        """Whether the filter is on settings of a training."""
        return self.field not in _FIELDS | {_RUN, _IMAGES}

    def keeps(self, each: Measured, settings: Mapping[str, Scalar]) -> bool:
        """Returns whether a result is selected; `settings` are those of the training."""
        row = each.result
        if self.field == _RUN:
            return self.fits(each.run.name)
        if self.field == _IMAGES:
            return any(each.digest.startswith(pattern) for pattern in self.patterns)
        if not self.is_of_settings:
            return self.fits(str(getattr(row, self.field)))
        if row.checkpoint in NO_FILES:
            return True
        if self.field not in settings:
            return False
        # Lists are recorded as JSON, with spaces that a command line does not have
        return self.fits(str(settings[self.field]).replace(" ", ""))

    def fits(self, text: str) -> bool:
        """Returns whether a text fits one of the patterns."""
        return any(fnmatch.fnmatchcase(text, pattern) for pattern in self.patterns)


def split_words(words: Iterable[str]) -> tuple[list[str], list[Filter]]:
    """Returns the words that say where results lie, and the filters among the others.

    A word with a "=" is a filter unless it names a sweep or a folder that exists.
    """
    places = []
    filters = []
    for word in words:
        field, equals, values = word.partition("=")
        if not equals or word.startswith(_SWEEP) or os.path.exists(word):
            places.append(word)
        else:
            filters.append(Filter(field=field, patterns=_patterns(values)))
    return places, filters


def _patterns(values: str) -> tuple[str, ...]:
    """Returns the patterns that commas separate; a list in brackets is one pattern."""
    if values.startswith("["):
        # In a pattern, brackets would stand for one of several letters
        return (values.replace("[", "[[]").replace(" ", ""),)
    return tuple(values.split(","))


def select(measured: Sequence[Measured], filters: Sequence[Filter]) -> list[Measured]:
    """Returns the results that all filters keep.

    Raises:
        UsageError: nothing is left, or no training has a setting that a filter names.
    """
    records: dict[Path, RunRecord | None] = {}
    selected = []
    known: set[str] = set()
    for each in measured:
        settings: Mapping[str, Scalar] = {}
        if any(one.is_of_settings for one in filters):
            training = _training(each, records)
            settings = training.params if training else {}
            known.update(settings)
        if all(one.keeps(each, settings) for one in filters):
            selected.append(each)
    for one in filters:
        if one.is_of_settings and one.field not in known:
            raise UsageError(
                f"{one.field}={','.join(one.patterns)}: {one.field} is neither a field of results "
                f"({', '.join(sorted(_FIELDS))}) nor a setting of a training, such as grid.gap_px"
            )
    if filters and not selected:
        words = [f"{one.field}={','.join(one.patterns)}" for one in filters]
        raise UsageError(f"none of {len(measured)} results fits {' '.join(words)}")
    return selected


def _training(each: Measured, records: dict[Path, RunRecord | None]) -> RunRecord | None:
    """Returns the record of the run that trained the weights of a result, if there is one."""
    folder = each.run.folder
    if folder not in records:
        # The run that a row was copied from may be gone
        exists = (folder / RUN_FILE).exists()
        records[folder] = RunRecord.read(folder) if exists else None
    record = records[folder]
    return training_record(record, each.result.checkpoint) if record else None
