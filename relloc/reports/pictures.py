"""Draws the results of a sweep: heat maps over two or more settings, curves over one setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.reports.sweep import WEIGHTS, Frame, SweepNumbers, are_numbers, mean_tables, our_lines
from relloc.reports.table import MISSING
from relloc.results import REFERENCE_MODELS
from relloc.terminal import escaped

# Titles and data frames as `mean_tables` yields them
Tables = Sequence[tuple[str, Frame]]


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
    # A name with two $ in it is no formula
    with matplotlib.rc_context({"text.parse_math": False}):
        draw = _maps if len(sweep.axes) > 1 else _curves
        figure = draw(sweep, tables)
        figure.suptitle(
            f"sweep {escaped(sweep.name)}: accuracy and mAP in percent, "
            "of seeds mean and standard deviation",
            fontsize=10,
        )
        figure.savefig(path, format=form, dpi=110)


def _maps(sweep: SweepNumbers, tables: Tables) -> Figure:
    """Returns a figure with a row of heat maps for each table, a map for each layer."""
    columns = max(len(table["mean"].columns) for _, table in tables)
    # Inches: a frame, and room for a number in each cell
    _, first = tables[0]
    first_layer = our_lines(sweep, first)["mean"].iloc[:, 0]
    down, across = first_layer.unstack(0).shape
    width = max(2.9, 1.2 + 0.62 * across)
    height = max(2.3, 1.2 + 0.4 * down)
    size = (width * columns, height * len(tables) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tables), columns, squeeze=False)
    for (title, table), axes in zip(tables, panels, strict=True):
        layers = table["mean"].columns
        # Tables with fewer layers leave their last panels empty
        for axis in axes[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes, layers, strict=False):
            _map(axis, our_lines(sweep, table), layer)
            # The controls have one number for all settings, which the title has room for
            controls = []
            for name, value in _controls(table, layer).items():
                controls.append(f"{name} {value:.1f}")
            heading = layer
            if controls:
                heading += f" ({', '.join(controls)})"
            axis.set_title(heading, fontsize=8)
        axes[0].set_title(f"{title}\n", fontsize=10, loc="left")
    return figure


def _map(axis: Axes, ours: Frame, layer: str) -> None:
    """Draws the heat map of one layer; `ours` has the lines of our own weights."""
    # Rows are all settings but the first, columns the first
    mean = ours["mean", layer].unstack(0)
    std = ours["std", layer].unstack(0)
    axis.set_facecolor("lightgray")  # shows where a mean is missing
    image = axis.imshow(mean, cmap="Blues", origin="lower", aspect="auto")
    colorbar = axis.figure.colorbar(image, ax=axis)
    colorbar.ax.tick_params(labelsize=7)
    # Above this the map is dark, and black numbers would be hard to read
    lowest = mean.min(axis=None)
    highest = mean.max(axis=None)
    dark = lowest + 0.6 * (highest - lowest)
    for (y, x), value in np.ndenumerate(mean.to_numpy()):
        text = f"{value:.1f}"
        spread = std.iloc[y, x]
        # One seed has no standard deviation
        if not np.isnan(spread):
            text += f"\n± {spread:.1f}"
        if np.isnan(value):
            text = MISSING
        color = "white" if value > dark else "black"
        axis.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    values = list(mean.columns)
    _ticks(axis, range(len(values)), values)
    # With three settings or more a row is a combination of all but the first
    names = []
    for key in mean.index:
        names.append(key if isinstance(key, str) else ", ".join(key))
    axis.set_yticks(range(len(mean)), names, fontsize=8)
    axis.set_xlabel(mean.columns.name, fontsize=8)
    axis.set_ylabel(", ".join(mean.index.names), fontsize=8)


def _ticks(axis: Axes, positions: Sequence[float], values: Sequence[str]) -> None:
    """Writes the values of a setting below the axis, slanted where they are long."""
    slanted: dict[str, Any] = {}
    if max(map(len, values)) > 6:
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(positions, values, fontsize=8, **slanted)


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
        for number, layer in enumerate(ours["mean"].columns):
            color = f"C{number}"
            mean = ours["mean", layer]
            # One seed has no standard deviation
            std = ours["std", layer].fillna(0)
            axis.plot(
                positions,
                mean,
                marker="o",
                color=color,
                label=layer,
            )
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
        axis.set_title(title, fontsize=9)
        _ticks(axis, positions, list(ours.index))
        axis.set_xlabel(str(ours.index.name), fontsize=8)
        axis.grid(alpha=0.3)
        # All layers have the same controls
        controls = [f"dotted: {name}" for name in _controls(table, layer)]
        axis.legend(
            title=", ".join(controls),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3,
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return figure
