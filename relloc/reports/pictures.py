"""The numbers of a sweep as a picture: heat maps over two settings and more, curves over one."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.reports.sweep import WEIGHTS, Frame, SweepNumbers, are_numbers, mean_tables, our_lines
from relloc.reports.table import MISSING
from relloc.results import NOT_OURS
from relloc.terminal import escaped

Tables = Sequence[tuple[str, Frame]]


def draw_sweep(sweep: SweepNumbers, path: Path, form: str = "png") -> None:
    """Save the picture, as png, svg or pdf: a row or a panel for each table.

    A map has the first setting across and the others up, and colors of its own, from its lowest mean to its highest,
    as layers differ more than what is swept. Of one setting each table is a panel with a curve a layer.
    """
    # Without those of random weights alone
    tables = [
        (t, table)
        for t, table in mean_tables(sweep)
        if our_lines(sweep, table)["mean"].notna().any(axis=None)
    ]
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two $ in it is no formula
        figure = _maps(sweep, tables) if len(sweep.axes) > 1 else _curves(sweep, tables)
        figure.suptitle(
            f"sweep {escaped(sweep.name)}: accuracy and mAP in percent, of seeds mean and standard deviation",
            fontsize=10,
        )
        figure.savefig(path, format=form, dpi=110)


def _maps(sweep: SweepNumbers, tables: Tables) -> Figure:
    columns = max(len(table["mean"].columns) for _, table in tables)
    down, across = our_lines(sweep, tables[0][1])["mean"].iloc[:, 0].unstack(0).shape
    width, height = max(2.9, 1.2 + 0.62 * across), max(2.3, 1.2 + 0.4 * down)
    figure = Figure(figsize=(width * columns, height * len(tables) + 0.4), layout="constrained")
    panels = figure.subplots(len(tables), columns, squeeze=False)
    for (title, table), axes in zip(tables, panels, strict=True):
        for axis in axes[len(table["mean"].columns) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes, table["mean"].columns, strict=False):
            _map(axis, our_lines(sweep, table), layer)
            others = [f"{name} {value:.1f}" for name, value in _others(table, layer).items()]
            axis.set_title(f"{layer} ({', '.join(others)})" if others else layer, fontsize=8)
        axes[0].set_title(f"{title}\n", fontsize=10, loc="left")
    return figure


def _map(axis: Axes, ours: Frame, layer: str) -> None:
    mean, std = (ours[what, layer].unstack(0) for what in ("mean", "std"))
    axis.set_facecolor("lightgray")  # of what is missing
    image = axis.imshow(mean, cmap="Blues", origin="lower", aspect="auto")
    axis.figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    dark = mean.min(axis=None) + 0.6 * (mean.max(axis=None) - mean.min(axis=None))
    for (y, x), value in np.ndenumerate(mean.to_numpy()):
        text = f"{value:.1f}" + ("" if np.isnan(spread := std.iloc[y, x]) else f"\n± {spread:.1f}")
        color = "white" if value > dark else "black"
        axis.text(
            x,
            y,
            MISSING if np.isnan(value) else text,
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    _ticks(axis, range(len(mean.columns)), list(mean.columns))
    axis.set_yticks(
        range(len(mean)),
        [key if isinstance(key, str) else ", ".join(key) for key in mean.index],
        fontsize=8,
    )
    axis.set_xlabel(mean.columns.name, fontsize=8)
    axis.set_ylabel(", ".join(mean.index.names), fontsize=8)


def _ticks(axis: Axes, places: Sequence[float], values: Sequence[str]) -> None:
    slanted = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, values)) > 6
        else {}
    )
    axis.set_xticks(places, values, fontsize=8, **slanted)


def _others(table: Frame, layer: str) -> dict[str, float]:
    """Means of weights that are not ours, where one number of them is for all points."""
    found = table["mean"][layer].dropna()
    names = found.index.get_level_values(WEIGHTS)
    return {name: found[names == name].iloc[0] for name in NOT_OURS if list(names).count(name) == 1}


def _curves(sweep: SweepNumbers, tables: Tables) -> Figure:
    figure = Figure(figsize=(4.4 * len(tables), 4.2), layout="constrained")
    for axis, (title, table) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True
    ):
        ours = our_lines(sweep, table)
        places = (
            [float(value) for value in ours.index]
            if are_numbers(ours.index)
            else list(range(len(ours)))
        )
        for number, layer in enumerate(ours["mean"].columns):
            mean, std = ours["mean", layer], ours["std", layer].fillna(0)
            axis.plot(places, mean, marker="o", color=f"C{number}", label=layer)
            axis.fill_between(
                places, mean - std, mean + std, color=f"C{number}", alpha=0.12, linewidth=0
            )
            for value in _others(table, layer).values():
                axis.axhline(value, linestyle=":", color=f"C{number}")
        axis.set_title(title, fontsize=9)
        _ticks(axis, places, list(ours.index))
        axis.set_xlabel(str(ours.index.name), fontsize=8)
        axis.grid(alpha=0.3)
        others = ", ".join(f"dotted: {name}" for name in _others(table, layer))
        axis.legend(
            title=others,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3,
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return figure
