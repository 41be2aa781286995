"""Draws what several notebooks show: lines over layers, over k or over training, in one style."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from load import SELECT, Frame, MixedRows, differences, differing_settings, line_names
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.figures.style import (
    MOST_CATEGORIES,
    MOST_ORDERED,
    TWO_COLUMNS,
    category_looks,
    control_look,
    ordered_looks,
)

Key = tuple[str, ...]
Look = dict[str, Any]
_MOST_COLUMNS = 3


def panel_axes(n: int, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `n` panels across two columns of a paper, three in a row at most."""
    columns = min(n, _MOST_COLUMNS)
    rows = -(-n // columns)
    width = TWO_COLUMNS * (columns + 1) / (_MOST_COLUMNS + 1)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:n])


def named_lines(frame: Frame) -> tuple[dict[Key, str], dict[Key, Look]]:
    """Returns a short name for each line (`LINE`) of the rows, as figures show them, and its look.

    Raises:
        MixedRows: there are more lines than a reader can tell apart.
    """
    names = line_names(frame)
    return names, _line_looks(frame, names)


def _line_looks(frame: Frame, names: Mapping[Key, str]) -> dict[Key, Look]:
    """Returns the look of each line: ordered colors where one setting differs, or categories.

    Lines with recalibrated batch norm have the look of those as trained, with hollow markers.

    Raises:
        MixedRows: there are more lines than a reader can tell apart.
    """
    # One look for both kinds of batch norm of the same weights
    weights = list(dict.fromkeys(key[:-1] for key in names))
    ours = [key for key in weights if key[0] == "pretrained"]
    differing = differing_settings(frame)
    is_ordered = len(differing) == 1 and len(ours) > 2
    most = MOST_ORDERED if is_ordered else MOST_CATEGORIES
    if len(ours) > most:
        raise MixedRows(
            f"{len(ours)} pretrainings are selected, which differ in {differences(frame, ())}: "
            f"a figure shows {most} at most. Choose by {SELECT}, for example "
            f"{SELECT}='{_example(differing)}'"
        )
    looks = ordered_looks(len(ours)) if is_ordered else category_looks(len(ours))
    by_weights = dict(zip(ours, looks, strict=True))
    found = {}
    for key in names:
        look = by_weights.get(key[:-1])
        look = dict(look) if look else control_look(key[0])
        if key[-1] == "recalibrated":
            look["markerfacecolor"] = "white"
        found[key] = look
    return found


def _example(differing: Mapping[str, Sequence[str]]) -> str:
    """Returns words that leave one value of each setting but the first."""
    return " ".join(f"{name}={values[0]}" for name, values in list(differing.items())[1:])


def draw_line(axis: Axes, x: Sequence[Any], rows: Frame, label: str, look: Look) -> None:
    """Draws means over seeds, and as a band the range of their values where there are several.

    `rows` has the columns of `over_seeds`, a row for each of `x`.
    """
    axis.plot(x, rows["mean"], label=label, **look)
    several = (rows["n"] > 1).to_numpy()
    if several.any():
        low = np.where(several, rows["min"], np.nan).astype(float)
        high = np.where(several, rows["max"], np.nan).astype(float)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """Draws one legend for all panels below them, each name once."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
    )
