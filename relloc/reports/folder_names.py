"""Calls data sets without a name after their folder, in results older than such names."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping

from relloc.data.unnamed import UNNAMED, called_after
from relloc.results import Result
from relloc.tracking.record import Scalar


def with_folder_names(
    rows: Iterable[Result],
    params: Mapping[str, Scalar],
) -> Iterator[Result]:
    """Yields results, those on a data set without a name with the name of its folder.

    Args:
        rows: Results of a run.
        params: The settings of the run, as its record has them. If they do not say where the
            images are, rows stay as they are.
    """
    for row in rows:
        name = row.dataset
        if name == UNNAMED:
            name = _called(row, params)
        yield dataclasses.replace(row, dataset=name)


def _called(row: Result, params: Mapping[str, Scalar]) -> str:
    """Returns the name of the folder that an unnamed data set of a row was read from."""
    # An evaluation may have brought images of its own
    own = f"eval.{row.eval}.data"
    prefix = own if f"{own}.name" in params else "data"
    folders = params.get(f"{prefix}.shards") or params.get(f"{prefix}.root")
    if not isinstance(folders, str):
        return UNNAMED
    # Several folders are recorded as JSON
    several = json.loads(folders) if folders.startswith("[") else folders
    return called_after(several)
