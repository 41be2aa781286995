"""The numbers of a sweep as the tables that reports have, for the formats that show those."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from relloc.reports.missing import Fill
from relloc.reports.sweep_numbers import WEIGHTS, Frame, SweepNumbers, mean_tables
from relloc.reports.table import MISSING, Cell, Group, Report, Row, Table

LEGEND = (
    "Accuracies and mAP are percent. Of several seeds: their mean, ± their standard deviation, in brackets how many. "
    "Bold: the highest of a column."
)


def as_report(sweep: SweepNumbers, commands: Sequence[str]) -> Report:
    """A table a metric, a row for each combination of swept settings and weights; `commands` run what is not done."""
    tables = tuple(_table(sweep, title, table) for title, table in mean_tables(sweep))
    not_done = "; ".join(f"{state} ({len(names)}): {', '.join(names)}" for state, names in points_not_done(sweep))
    fill = Fill(label="What neither runs nor waits, each by its own command", commands=tuple(commands))
    return Report(
        title=f"Sweep {sweep.name}",
        groups=(Group(title="Means over seeds", tables=tables),),
        legend=(LEGEND,),
        advice=f"Points that are not done: {not_done}." if not_done else "",
        missing=(fill,) if commands else (),
        entries=(),
        published=(),
    )


def points_not_done(sweep: SweepNumbers) -> list[tuple[str, list[str]]]:
    """The names of points by how they stand, but for those that are done."""
    points = sweep.rows.drop_duplicates("folder")
    groups = points[points["state"] != "done"].groupby("state")["point"]
    return [(str(state), list(map(str, names))) for state, names in groups]


def _table(sweep: SweepNumbers, title: str, table: Frame) -> Table:
    return Table(
        title=title,
        caption="",
        columns=tuple(map(str, table["mean"].columns)),
        rows=tuple(_rows(sweep, table)),
    )


def _rows(sweep: SweepNumbers, table: Frame) -> Iterator[Row]:
    highest, lacking = table["mean"].max(), sweep.lacking()
    for key, line in table.iterrows():
        settings = dict(zip(sweep.keys, key if isinstance(key, tuple) else (key,), strict=True))
        weights = str(settings.pop(WEIGHTS))
        # Weights that are not ours have one line for all points, without their settings.
        label = ", ".join(f"{name}={value}" for name, value in settings.items() if value != "")
        yield Row(
            label=label or weights,
            setting=weights if label else "",
            is_published=False,
            cells=tuple(_cell(line, layer, highest[layer]) for layer in highest.index),
            empty=lacking.get(key, MISSING),
        )


def _cell(line: Any, layer: str, highest: float) -> Cell | None:
    mean, std, count = (line[what, layer] for what in ("mean", "std", "count"))
    if not count > 0:
        return None
    spread = f"± {std:.1f} ({count:.0f})" if count > 1 and not pd.isna(std) else ""
    details = f"{mean:.4f}, {count:.0f} seeds" if count > 1 else f"{mean:.4f}, one seed"
    return Cell(text=f"{mean:.1f}", note="", details=details, spread=spread, best=bool(mean == highest))
