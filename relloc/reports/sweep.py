"""The numbers of a sweep: each with the settings that were swept, and their means over seeds."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from relloc.errors import DataError
from relloc.reports.as_csv import as_text
from relloc.reports.lines import short_names
from relloc.reports.missing import MissingEvaluations
from relloc.reports.table import MISSING, Cell, Group, Report, Row, Table
from relloc.results import LAYERS, NOT_OURS, Result, read_results
from relloc.sweeps.points import Point
from relloc.tracking.record import RUN_FILE, RunRecord, Scalar

WEIGHTS, TITLE, COLUMN = "weights", "title", "across"
Frame = Any  # a pandas DataFrame, whose types pyright can't follow
_SEED = "seed"
_RESULT = [field.name for field in dataclasses.fields(Result)]
_ANY = ""  # in place of a setting, of what does not depend on it
_SAID_ANYWAY = ("eval", "checkpoint", "batch_norm")  # by a table's title and weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepNumbers:
    """What a sweep measured.

    A line of `rows` is a result: its point, with folder and how it stands, the settings that were `swept`, the weights
    ("pretrained", "random", or the short name of an evaluated file), its table's title and column, and the fields of
    `Result`, which the line of a point without results lacks. Settings, weights and columns are categories in the order
    in which they are shown: numbers by size, others as they came.
    """

    name: str
    swept: tuple[str, ...]
    rows: Frame

    @property
    def keys(self) -> list[str]:
        """What tells apart the lines of a table."""
        return [*self.swept, WEIGHTS]

    @property
    def has_ours(self) -> bool:
        """Whether any weights are neither random nor torchvision's."""
        return bool((self.rows["eval"].notna() & ~self.rows[WEIGHTS].isin(NOT_OURS)).any())

    @property
    def axes(self) -> list[str]:
        """Those of them in which lines of our own weights differ, or the first."""
        ours = self.rows[~self.rows[WEIGHTS].isin(NOT_OURS)]
        return [key for key in self.keys if ours[key].nunique() > 1] or self.keys[:1]

    def lacking(self) -> dict[object, str]:
        """How the points without results stand that have these `keys`."""
        blank = self.rows[self.rows["eval"].isna() & (self.rows["state"] != "done")]
        states = blank.groupby(self.keys, observed=True)["state"].unique()
        return states.map(", ".join).to_dict()


def read_sweep(
    name: str, points: Sequence[Point], states: Sequence[str], metrics: str | None = None
) -> SweepNumbers:
    """The headline metrics of all points, or those that MLflow knows by a name that fits `metrics`.

    `states` says how each point stands; `metrics` is a pattern such as `linear/feature4/*`.

    Raises:
        DataError: no point has results, none fits `metrics`, or a file is broken.
    """
    try:
        results = [_results_of(point) for point in points]
        settings = _with_defaults(points)
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: mend or remove it") from error
    shown = _shown([row for rows in results for row in rows], name, metrics)
    swept = _swept(settings)
    lines: list[dict[str, Any]] = []
    for point, state, rows, setting in zip(points, states, results, settings, strict=True):
        line = {"point": point.name, "folder": str(point.folder), "state": state}
        line |= {short: setting.get(key, MISSING) for key, short in swept.items()}
        lines += [line | _described(row, point.kind) for row in rows if row in shown] or [line]
    columns = dict.fromkeys([*lines[0], WEIGHTS, TITLE, COLUMN, *_RESULT])
    rows = pd.DataFrame(lines, columns=pd.Index(columns), dtype=object).astype({"value": float})
    return SweepNumbers(
        name=name, swept=tuple(swept.values()), rows=_in_order(rows, swept.values())
    )


def _results_of(point: Point) -> Iterable[Result]:
    # Of one number measured anew the last stands
    return {
        (row.tracked_name, row.dataset, row.split, row.checkpoint): row
        for row in read_results(point.folder)
    }.values()


def _shown(rows: Sequence[Result], sweep: str, metrics: str | None) -> set[Result]:
    if not rows:
        raise DataError(
            f"no point of sweep {sweep} has results yet: python -m relloc.sweep status tells how they stand"
        )
    if metrics is None:
        return {row for row in rows if row.headline}
    names = {row: dataclasses.replace(row, checkpoint="").tracked_name for row in rows}
    shown = {row for row, name in names.items() if fnmatch.fnmatchcase(name, metrics)}
    if not shown:
        known = sorted({name.replace(f"/{row.layer}/", "/*/") for row, name in names.items()})
        raise DataError(f"--metrics {metrics} fits nothing that was measured: {', '.join(known)}")
    return shown


def _with_defaults(points: Sequence[Point]) -> list[dict[str, str]]:
    """Of each point what any command of the sweep sets: where its own did not, the value that its run noted."""
    settings = []
    for point in points:
        words = (word.lstrip("+~").partition("=") for word in point.overrides)
        settings.append({key: value for key, _, value in words if key not in _SAID_ANYWAY})
    keys = dict.fromkeys(key for each in settings for key in each)
    for point, each in zip(points, settings, strict=True):
        lacking = [key for key in keys if key not in each]
        if lacking and (point.folder / RUN_FILE).exists():
            noted = RunRecord.read(point.folder).params
            each |= {key: _word(noted[key]) for key in lacking if key in noted}
    return settings


def _word(value: Scalar) -> str:
    """As it stands on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _swept(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What differs between points, but for the seed where anything else does: short names, where these are unique."""
    keys = dict.fromkeys(key for each in settings for key in each)
    keys = [
        key for key in keys if key != _SEED and len({each.get(key) for each in settings}) > 1
    ] or [_SEED]
    short = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if [*short, *_RESULT].count(name) == 1 else key
        for key, name in zip(keys, short, strict=True)
    }


def _described(row: Result, kind: str) -> dict[str, Any]:
    recalibrated = "_recalibrated" if row.batch_norm == "recalibrated" else ""
    unit = "" if row.unit == "%" else f", {row.unit}"
    return {
        WEIGHTS: "pretrained"
        if kind == "train" and row.checkpoint not in NOT_OURS
        else row.checkpoint,
        TITLE: f"{row.eval}{recalibrated}/{row.metric} on {row.dataset} {row.split}{unit}",
        COLUMN: row.layer or row.column,
    } | dataclasses.asdict(row)


def _in_order(rows: Frame, swept: Iterable[str]) -> Frame:
    names = short_names(rows[WEIGHTS].dropna())
    ours = [name for path, name in names.items() if path not in NOT_OURS]
    weights = rows[WEIGHTS].map(names.get).fillna(ours[0] if len(ours) == 1 else MISSING)
    rows = rows.assign(**{WEIGHTS: weights}).astype(dict.fromkeys(swept, str))
    order = {WEIGHTS: [*ours, MISSING, *NOT_OURS], COLUMN: [*LAYERS, *rows[COLUMN].dropna()]}
    for key in swept:
        values = rows[key].unique()
        order[key] = [*(sorted(values, key=float) if are_numbers(values) else values), _ANY]
    kinds = {
        key: pd.CategoricalDtype(list(dict.fromkeys(values)), ordered=True)
        for key, values in order.items()
    }
    return rows.astype(kinds)


def are_numbers(values: Iterable[str]) -> bool:
    """Whether a setting has numbers only, as gap_px has."""
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def mean_tables(numbers: SweepNumbers) -> Iterator[tuple[str, Frame]]:
    """Each table with its title: the settings and weights down, ("mean" | "std" | "count", layer) across.

    These are over seeds. A point without results has a line of NaN; weights that are not ours have one without settings
    where all points measured them alike.
    """
    keys, is_blank = numbers.keys, numbers.rows["eval"].isna()
    rows, blank = numbers.rows[~is_blank].copy(), numbers.rows[is_blank]
    others = rows[WEIGHTS].isin(NOT_OURS)
    measured = rows[others].groupby([TITLE, WEIGHTS, COLUMN, _SEED], observed=True)["fingerprint"]
    if (measured.nunique() == 1).all():
        rows.loc[others, list(numbers.swept)] = _ANY
        rows = rows.drop_duplicates([TITLE, *keys, COLUMN, _SEED, "fingerprint"])
    for title, part in rows.groupby(TITLE, sort=False):
        part = pd.concat([part, blank.fillna({COLUMN: part[COLUMN].iloc[0]})])
        values = part.groupby([*keys, COLUMN], observed=True)["value"]
        yield str(title), values.agg(["mean", "std", "count"]).unstack(COLUMN)


def our_lines(numbers: SweepNumbers, table: Frame) -> Frame:
    """The lines of a table by `axes`: those of weights that are not ours left out."""
    ours = table[~table.index.get_level_values(WEIGHTS).isin(NOT_OURS)]
    return ours.droplevel([key for key in numbers.keys if key not in numbers.axes])


LEGEND = (
    "Accuracies and mAP are percent. Of several seeds: their mean, ± their standard deviation, in brackets how many. "
    "Bold: the highest of a column."
)


def as_report(sweep: SweepNumbers, commands: Sequence[str]) -> Report:
    """A table a metric, a row for each combination of swept settings and weights; `commands` run what is not done."""
    tables = [one for title, table in mean_tables(sweep) for one in _tables(sweep, title, table)]
    points = sweep.rows.drop_duplicates("folder")
    groups = points[points["state"] != "done"].groupby("state")["point"]
    not_done = "; ".join(
        f"{state} ({len(names)}): {', '.join(map(str, names))}" for state, names in groups
    )
    fill = MissingEvaluations(
        label="What neither runs nor waits, each by its own command", commands=tuple(commands)
    )
    return Report(
        title=f"Sweep {sweep.name}",
        groups=(Group(title="Means over seeds", tables=tuple(tables)),),
        legend=(LEGEND,),
        advice=f"Points that are not done: {not_done}." if not_done else "",
        missing=(fill,) if commands else (),
    )


def _tables(sweep: SweepNumbers, title: str, table: Frame) -> Iterator[Table]:
    """The table of a metric; of two settings a grid, too, at the layer with the highest mean."""
    cells, lacking = _cells(table), sweep.lacking()
    rows = []
    for key, line in cells.iterrows():
        *settings, weights = key
        # Weights that are not ours have one line for all points, without their settings.
        label = ", ".join(
            f"{name}={value}"
            for name, value in zip(sweep.swept, settings, strict=True)
            if value != _ANY
        )
        named = {"label": label, "setting": weights} if label else {"label": weights}
        rows.append(
            Row(**named, is_published=False, cells=tuple(line), empty=lacking.get(key, MISSING))
        )
    yield Table(title=title, columns=tuple(cells), rows=tuple(rows))
    if len(sweep.axes) == 2 and our_lines(sweep, table)["mean"].notna().any(axis=None):
        yield _grid(
            sweep, title, table[~table.index.get_level_values(WEIGHTS).isin(NOT_OURS)], lacking
        )


def _grid(sweep: SweepNumbers, title: str, ours: Frame, lacking: Mapping[object, str]) -> Table:
    layer = ours["mean"].max().idxmax()
    cells = _cells(ours)[layer]
    # Points that are not done say in their cells how they stand
    for key in cells.index[cells.isna()]:
        cells[key] = Cell(text=lacking.get(key, MISSING))
    grid = our_lines(sweep, cells).unstack(0)
    grid = grid.where(grid.notna(), None)  # pairs of settings that no point has
    across, down = sweep.axes
    return Table(
        title=f"{title} at {layer}, where the highest is: {across} across and {down} down",
        columns=tuple(grid),
        rows=tuple(
            Row(label=name, is_published=False, cells=tuple(line)) for name, line in grid.iterrows()
        ),
    )


def _cells(table: Frame) -> Frame:
    """A cell for each mean, the highest of each column bold; None where nothing was measured."""
    cells = {}
    for layer, highest in table["mean"].max().items():
        numbers = zip(*(table[what, layer] for what in ("mean", "std", "count")), strict=True)
        cells[layer] = [_cell(*line, is_best=line[0] == highest) for line in numbers]
    return pd.DataFrame(cells, index=table.index, dtype=object)


def _cell(mean: float, std: float, count: float, *, is_best: bool) -> Cell | None:
    if not count > 0:
        return None
    seeds, spread = (
        (f"{count:.0f} seeds", f"± {std:.1f} ({count:.0f})") if count > 1 else ("one seed", "")
    )
    return Cell(text=f"{mean:.1f}", details=f"{mean:.4f}, {seeds}", spread=spread, is_best=is_best)


def as_sweep_csv(sweep: SweepNumbers) -> str:
    """A line a result, in full, and one for each point that has none."""
    rows = sweep.rows.drop(columns=[TITLE, COLUMN])
    texts = rows.apply(lambda column: pd.Series(list(map(as_text, column)), dtype=object))
    return texts.to_csv(index=False, lineterminator="\n")
