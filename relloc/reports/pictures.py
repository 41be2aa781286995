"""Draws the results of a sweep: heat maps over two or more settings, curves over one setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.figures.style import axis_label, ink_on, ordered_looks, save_as, style
from relloc.reports.parts import MISSING
from relloc.reports.sweep import (
    EFFECT,
    TITLE,
    WEIGHTS,
    Frame,
    SweepNumbers,
    are_numbers,
    mean_tables,
    our_lines,
)
from relloc.results import REFERENCE_MODELS
from relloc.terminal import escaped, quantity

# Titles and data frames as `mean_tables` yields them
Tables = Sequence[tuple[str, Frame]]
# Of a figure with several tables of few layers
_LEAST_COLUMNS = 4


def draw_sweep(sweep: SweepNumbers, path: Path, form: str = "png") -> None:
    """Saves a picture of a sweep's means over seeds.

    With two settings or more each metric is a row of heat maps, one for each layer: the first
    setting across, the others up. Each map has its own color scale, as layers differ more than
    settings do. With one setting each metric is a panel with a curve for each layer.

    Args:
        sweep: The results.
        path: The file to write.
        form: "png", "svg" or "pdf".
    """
    # Tables that have random or torchvision's weights only have nothing to draw
    tables = []
    for title, table in mean_tables(sweep):
        means = our_lines(sweep, table)["mean"]
        if means.notna().any(axis=None):
            tables.append((title, table))
    with style():
        draw = _maps if len(sweep.axes) > 1 else _curves
        figure = draw(sweep, tables)
        figure.suptitle(
            f"sweep {escaped(sweep.name)}: mean and standard deviation of {_seeds(tables)}, "
            "in percent where no unit is named",
            fontsize=9,
        )
        save_as(figure, path, form)


def _seeds(tables: Tables) -> str:
    """Returns how many seeds means are of, such as "2 seeds" or "1 to 3 seeds"."""
    counts = []
    for _, table in tables:
        counts += [int(count) for count in table["count"].to_numpy().flat if count > 0]
    least, most = min(counts), max(counts)
    return quantity(most, "seed") if least == most else f"{least} to {most} seeds"


def _maps(sweep: SweepNumbers, tables: Tables) -> Figure:
    """Returns a figure with a row of heat maps for each table, a map for each layer.

    Tables of a single column share rows.
    """
    n_layers = [len(table["mean"].columns) for _, table in tables]
    columns = max(*n_layers, min(n_layers.count(1), _LEAST_COLUMNS))
    rows: list[list[tuple[str, Frame, str]]] = []
    has_room = False
    for title, table in tables:
        panels = [(title, table, layer) for layer in table["mean"].columns]
        if len(panels) == 1 and has_room:
            rows[-1] += panels
        else:
            rows.append(panels)
        has_room = len(panels) == 1 and len(rows[-1]) < columns

    # Inches: a frame, and room for a number in each cell
    _, first = tables[0]
    first_layer = our_lines(sweep, first)["mean"].iloc[:, 0]
    down, across = first_layer.unstack(0).shape
    width = max(2.9, 1.2 + 0.62 * across)
    height = max(2.3, 1.2 + 0.4 * down)
    size = (width * columns, height * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    for panels, axes in zip(rows, figure.subplots(len(rows), columns, squeeze=False), strict=True):
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        before = ""
        for axis, (title, table, layer) in zip(axes, panels, strict=False):
            # Of what shortcuts bring, less is better
            cmap = "cividis_r" if f"/{EFFECT}" in title else "cividis"
            _map(axis, our_lines(sweep, table), layer, cmap)
            # The controls have one number for all settings, which the title has room for
            controls = []
            for name, value in _controls(table, layer).items():
                controls.append(f"{name} {value:.1f}")
            heading = layer
            if controls:
                heading += f" ({', '.join(controls)})"
            # The first panel's own title stands below that of the table
            if title != before:
                metric, _, images = title.partition(" on ")
                heading = f"{metric}\non {images}, {_counted(sweep, title)}\n{heading}"
            axis.set_title(heading)
            before = title
    return figure


def _map(axis: Axes, ours: Frame, layer: str, cmap: str) -> None:
    """Draws the heat map of one layer; `ours` has the lines of our own weights."""
    # Rows are all settings but the first, columns the first
    mean = ours["mean", layer].unstack(0)
    std = ours["std", layer].unstack(0)
    axis.set_facecolor("lightgray")  # shows where a mean is missing
    image = axis.imshow(mean, origin="lower", aspect="auto", cmap=cmap)
    axis.grid(visible=False)
    colorbar = axis.figure.colorbar(image, ax=axis)
    colorbar.ax.tick_params(labelsize=7)
    for (y, x), value in np.ndenumerate(mean.to_numpy()):
        # z: no minus sign before zero
        text = f"{value:z.1f}"
        spread = std.iloc[y, x]
        # One seed has no standard deviation
        if not np.isnan(spread):
            text += f"\n± {spread:.1f}"
        if np.isnan(value):
            text = MISSING
        color = "black" if np.isnan(value) else ink_on(np.asarray(image.cmap(image.norm(value))))
        axis.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            color=color,
            fontsize=7,
        )
    values = list(mean.columns)
    _ticks(axis, range(len(values)), values)
    # With three settings or more a row is a combination of all but the first
    names = []
    for key in mean.index:
        names.append(key if isinstance(key, str) else ", ".join(key))
    axis.set_yticks(range(len(mean)), names)
    axis.set_xlabel(axis_label(str(mean.columns.name)))
    axis.set_ylabel(", ".join(map(axis_label, mean.index.names)))


def _value_label(title: str) -> str:
    """Returns the label of the axis of values: the metric and its unit, as a title has them."""
    # Such as "label_free/rankme on photos held_out, directions"; percent is not named
    metric, _, images = title.partition(" on ")
    _, _, unit = images.partition(", ")
    return f"{metric} ({unit or '%'})"


def _counted(sweep: SweepNumbers, title: str) -> str:
    """Returns how many images, or pairs, the numbers of a table are of, such as "n = 3,925"."""
    counts = sorted({int(n) for n in sweep.rows.loc[sweep.rows[TITLE] == title, "n"]})
    return f"n = {' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))}"


def _ticks(axis: Axes, positions: Sequence[float], values: Sequence[str]) -> None:
    """Writes the values of a setting below the axis, slanted where they are long."""
    slanted: dict[str, Any] = {}
    if max(map(len, values)) > 6:
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(positions, values, **slanted)


def _controls(table: Frame, layer: str) -> dict[str, float]:
    """Returns the means of random and torchvision's weights that hold for all points."""
    means = table["mean"][layer].dropna()
    weights = means.index.get_level_values(WEIGHTS)
    controls = {}
    for name in REFERENCE_MODELS:
        # Several numbers would belong to different settings
        if list(weights).count(name) == 1:
            controls[name] = means[weights == name].iloc[0]
    return controls


def _curves(sweep: SweepNumbers, tables: Tables) -> Figure:
    """Returns a figure with a panel for each table, a curve for each layer."""
    figure = Figure(figsize=(4.4 * len(tables), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (title, table) in zip(panels, tables, strict=True):
        ours = our_lines(sweep, table)
        # Numbers stand at their values, other settings side by side
        if are_numbers(ours.index):
            positions = [float(value) for value in ours.index]
        else:
            positions = [float(number) for number in range(len(ours))]
        layers = list(ours["mean"].columns)
        for layer, look in zip(layers, ordered_looks(len(layers)), strict=True):
            color = look["color"]
            mean = ours["mean", layer]
            # One seed has no standard deviation
            std = ours["std", layer].fillna(0)
            axis.plot(positions, mean, label=layer, **look)
            axis.fill_between(
                positions,
                mean - std,
                mean + std,
                color=color,
                alpha=0.12,
                linewidth=0,
            )
            for value in _controls(table, layer).values():
                axis.axhline(value, linestyle=":", color=color)
        axis.set_title(f"{title}, {_counted(sweep, title)}")
        _ticks(axis, positions, list(ours.index))
        axis.set_xlabel(axis_label(str(ours.index.name)))
        axis.set_ylabel(_value_label(title))
        # All layers have the same controls
        controls = [f"dotted: {name}" for name in _controls(table, layer)]
        axis.legend(
            title=", ".join(controls),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3,
        )
    return figure
