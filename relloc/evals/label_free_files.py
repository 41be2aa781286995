"""The table and the picture of measures without labels, over the layers."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.figures.style import category_looks, ordered_looks, save_png, style
from relloc.files import write_whole
from relloc.results import LAYERS, Score
from relloc.terminal import quantity

TABLE = "label_free.csv"
PICTURE = "label_free.png"
_COLUMNS = 3  # of panels
_WIDTH, _HEIGHT = 2.3, 2.1  # of a panel, in inches


def measure_name(score: Score) -> str:
    """Returns the name of a measure, such as `RankMe`, or that of a term of DSE."""
    return f"DSE, {score.column}" if _is_term(score) else score.variant


def write_measures(scores: Sequence[Score], folder: Path) -> None:
    """Writes `label_free.csv`: a line for each layer and measure, in the order of `scores`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "measure", "metric", "value", "unit", "n"])
    for score in scores:
        writer.writerow(
            [score.layer, measure_name(score), score.metric, score.value, score.unit, score.n]
        )
    write_whole(folder / TABLE, text.getvalue().encode())


def draw_measures(scores: Sequence[Score], folder: Path, *, title: str) -> None:
    """Draws `label_free.png`: a panel for each measure over the layers, and one for DSE's terms.

    Layers have the order of the network, and each has its color in all panels. One at which a
    measure is not defined has no point.
    """
    measured = {score.layer for score in scores}
    layers = [layer for layer in LAYERS if layer in measured]
    panels: dict[str, list[Score]] = {}
    terms: dict[str, list[Score]] = {}
    for score in scores:
        by_name, name = (terms, score.column) if _is_term(score) else (panels, score.variant)
        by_name.setdefault(name, []).append(score)
    n_panels = len(panels) + bool(terms)
    columns = min(_COLUMNS, n_panels)
    rows = -(-n_panels // columns)
    with style():
        size = (_WIDTH * columns, _HEIGHT * rows + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=9)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (name, found) in zip(axes, panels.items(), strict=False):
            _draw_measure(axis, found, layers)
            _label(axis, name, found, layers)
        if terms:
            axis = axes[len(panels)]
            for look, (name, found) in zip(category_looks(len(terms)), terms.items(), strict=True):
                axis.plot(range(len(layers)), _values(found, layers), label=name, **look)
            _label(axis, "terms of DSE", next(iter(terms.values())), layers)
            # Below the panel, where it covers no line
            axis.legend(
                loc="upper center",
                bbox_to_anchor=(0.45, -0.3),
                ncols=2,
                handlelength=2.8,  # as long as the dashes need
                columnspacing=1,
                borderpad=0,
            )
        for axis in axes[n_panels:]:
            axis.set_visible(False)
        save_png(figure, folder / PICTURE)


def _is_term(score: Score) -> bool:
    """Whether it is a term of DSE: in their table, layers are lines and no columns."""
    return score.column != score.layer


def _draw_measure(axis: Axes, found: Sequence[Score], layers: Sequence[str]) -> None:
    values = _values(found, layers)
    axis.plot(range(len(layers)), values, color="0.7", linewidth=1)
    for place, (value, look) in enumerate(zip(values, ordered_looks(len(layers)), strict=True)):
        axis.plot(place, value, linestyle="none", **look)


def _label(axis: Axes, name: str, found: Sequence[Score], layers: Sequence[str]) -> None:
    """Writes what a panel shows, of how many images, and its layers."""
    # The same for all layers, unless images could be read for some alone
    n_images = max(score.n or 0 for score in found)
    axis.set_title(f"{name}, {quantity(n_images, 'image', commas=True)}")
    axis.set_ylabel(found[0].unit)
    axis.set_xticks(range(len(layers)), layers, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.4, len(layers) - 0.6)


def _values(found: Sequence[Score], layers: Sequence[str]) -> list[float]:
    """Returns the value of each layer; nan where there is none."""
    by_layer = {score.layer: score.value for score in found}
    return [by_layer.get(layer, math.nan) for layer in layers]
