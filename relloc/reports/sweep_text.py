"""The numbers of a sweep as text: Markdown for people, CSV for programs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from relloc.reports.as_csv import as_text
from relloc.reports.as_markdown import escape
from relloc.reports.sweep_numbers import COLUMN, TITLE, Frame, SweepNumbers, mean_tables, our_lines
from relloc.reports.sweep_tables import LEGEND, points_not_done
from relloc.reports.table import MISSING
from relloc.terminal import escaped

_COMMANDS = 5  # are shown


def as_sweep_csv(sweep: SweepNumbers) -> str:
    """A line a result, in full, and one for each point that has none."""
    rows = sweep.rows.drop(columns=[TITLE, COLUMN])
    texts = {
        name: pd.Series(
            [as_text(cell) if isinstance(cell, str) else cell for cell in rows[name]], rows.index, dtype=object
        )
        for name in rows.columns
        if rows[name].dtype == object
    }
    return rows.assign(**texts).to_csv(index=False, lineterminator="\n")


def as_sweep_markdown(sweep: SweepNumbers, commands: Sequence[str]) -> str:
    """A table a metric, and of two settings a grid; at last what is not done, and the `commands` that run it."""
    return "\n".join(_lines(sweep, commands)) + "\n"


def _lines(sweep: SweepNumbers, commands: Sequence[str]) -> Iterator[str]:
    yield from (f"# Sweep {escape(sweep.name)}", "", LEGEND)
    for title, table in mean_tables(sweep):
        cells = _cells(table, sweep.lacking())
        yield from ("", f"## {escape(title)}", "", *_pipes(cells))
        ours = our_lines(sweep, table)["mean"]
        if len(sweep.axes) == 2 and ours.notna().any(axis=None):
            layer = ours.max().idxmax()
            across, down = map(escape, sweep.axes)
            yield from ("", f"At {layer}, where the highest is, {across} across and {down} down:", "")
            yield from _pipes(our_lines(sweep, cells)[layer].unstack(0, fill_value=MISSING))
    if not_done := points_not_done(sweep):
        yield from ("", "## Not done", "")
        yield from (f"- {state} ({len(names)}): {escape(', '.join(names))}" for state, names in not_done)
    if commands:
        yield from ("", "What neither runs nor waits, each by its own command:", "")
        yield from (f"    {escaped(command)}" for command in commands[:_COMMANDS])
        if more := commands[_COMMANDS:]:
            yield from ("", f"and {len(more)} more")


def _cells(table: Frame, lacking: Mapping[object, str]) -> Frame:
    highest = table["mean"].max()
    lines = [
        [_cell(line, layer, highest[layer]) or lacking.get(key, MISSING) for layer in highest.index]
        for key, line in table.iterrows()
    ]
    return pd.DataFrame(lines, index=table.index, columns=highest.index)


def _cell(line: Any, layer: str, highest: float) -> str:
    mean, std, count = (line[what, layer] for what in ("mean", "std", "count"))
    if not count > 0:
        return ""
    text = f"**{mean:.1f}**" if mean == highest else f"{mean:.1f}"
    return f"{text} ± {std:.1f} ({count:.0f})" if count > 1 else text


def _pipes(cells: Frame) -> Iterator[str]:
    """What tells lines apart, then the cells, aligned for reading as they are."""
    heads = [escape(str(name)) for name in (*cells.index.names, *cells.columns)]
    keys = (key if isinstance(key, tuple) else (key,) for key in cells.index)
    lines = [[*map(escape, key), *line] for key, line in zip(keys, cells.to_numpy(), strict=True)]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    lines.insert(0, ["-" * (width - 1) + ":" for width in widths])
    for line in (heads, *lines):
        yield f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |"
