"""The numbers of a sweep: each with the settings that were swept, and their means over seeds."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from relloc.errors import DataError
from relloc.reports.as_csv import as_text
from relloc.reports.lines import short_names
from relloc.reports.missing import Fill
from relloc.reports.table import MISSING, Cell, Group, Report, Row, Table
from relloc.results import LAYERS, NOT_OURS, Result, read_results
from relloc.sweeps.points import Point
from relloc.tracking.record import RunRecord, Scalar

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
        return {key: ", ".join(states.unique()) for key, states in blank.groupby(self.keys, observed=True)["state"]}


def read_sweep(name: str, points: Sequence[Point], states: Sequence[str], metrics: str | None = None) -> SweepNumbers:
    """The headline metrics of all points, or those that MLflow knows by a name that fits `metrics`.

    `states` says how each point stands; `metrics` is a pattern such as `linear/feature4/*`.

    Raises:
        DataError: no point has results, none fits `metrics`, or a file is broken.
    """
    results = [_results_of(point) for point in points]
    shown = _shown([row for rows in results for row in rows], name, metrics)
    settings = _with_defaults(points)
    swept = _swept(settings)
    lines: list[dict[str, Any]] = []
    for point, state, rows, setting in zip(points, states, results, settings, strict=True):
        line = {"point": point.name, "folder": str(point.folder), "state": state}
        line |= {short: setting.get(key, MISSING) for key, short in swept.items()}
        lines += [line | _described(row, point.kind) for row in rows if row in shown] or [line]
    columns = dict.fromkeys([*lines[0], WEIGHTS, TITLE, COLUMN, *_RESULT])
    rows = pd.DataFrame(lines, columns=pd.Index(columns), dtype=object).astype({"value": float})
    return SweepNumbers(name=name, swept=tuple(swept.values()), rows=_in_order(rows, swept.values()))


def _results_of(point: Point) -> Iterable[Result]:
    try:
        rows = read_results(point.folder)
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: mend or remove it") from error
    # Of one number measured anew the last stands
    return {(row.tracked_name, row.dataset, row.split, row.checkpoint): row for row in rows}.values()


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


def _settings(point: Point) -> dict[str, str]:
    words = (word.lstrip("+~").partition("=") for word in point.overrides)
    return {key: value for key, _, value in words if key not in _SAID_ANYWAY}


def _with_defaults(points: Sequence[Point]) -> list[dict[str, str]]:
    """Of each point what any command of the sweep sets: where its own did not, the value that its run noted."""
    settings = [_settings(point) for point in points]
    keys = dict.fromkeys(key for each in settings for key in each)
    for point, each in zip(points, settings, strict=True):
        if lacking := [key for key in keys if key not in each]:
            params = _params_of(point)
            each |= {key: _word(params[key]) for key in lacking if key in params}
    return settings


def _params_of(point: Point) -> Mapping[str, Scalar]:
    try:
        return RunRecord.read(point.folder).params
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: mend or remove it") from error


def _word(value: Scalar) -> str:
    """As it stands on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _swept(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What differs between points, but for the seed where anything else does: short names, where these are unique."""
    keys = dict.fromkeys(key for each in settings for key in each)
    keys = [key for key in keys if key != _SEED and len({each.get(key) for each in settings}) > 1] or [_SEED]
    short = [key.rpartition(".")[2] for key in keys]
    return {key: name if [*short, *_RESULT].count(name) == 1 else key for key, name in zip(keys, short, strict=True)}


def _described(row: Result, kind: str) -> dict[str, Any]:
    recalibrated = "_recalibrated" if row.batch_norm == "recalibrated" else ""
    unit = "" if row.unit == "%" else f", {row.unit}"
    return {
        WEIGHTS: "pretrained" if kind == "train" and row.checkpoint not in NOT_OURS else row.checkpoint,
        TITLE: f"{row.eval}{recalibrated}/{row.metric} on {row.dataset} {row.split}{unit}",
        COLUMN: row.layer or row.column,
    } | dataclasses.asdict(row)


def _in_order(rows: Frame, swept: Iterable[str]) -> Frame:
    names = short_names(rows[WEIGHTS].dropna())
    ours = [name for path, name in names.items() if path not in NOT_OURS]
    weights = rows[WEIGHTS].map(names.get).fillna(ours[0] if len(ours) == 1 else MISSING)
    rows = rows.assign(**{WEIGHTS: weights}).astype(dict.fromkeys(swept, str))
    columns = sorted(rows[COLUMN].dropna().unique(), key=lambda name: (*LAYERS, name).index(name))
    order = {WEIGHTS: (*ours, MISSING, *NOT_OURS), COLUMN: columns}
    order |= {key: (*_by_size(rows[key]), _ANY) for key in swept}
    kinds = {key: pd.CategoricalDtype(list(dict.fromkeys(values)), ordered=True) for key, values in order.items()}
    return rows.astype(kinds)


def _by_size(values: Iterable[str]) -> list[str]:
    values = list(dict.fromkeys(values))
    return sorted(values, key=float) if are_numbers(values) else values


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
    not_done = "; ".join(f"{state} ({len(names)}): {', '.join(map(str, names))}" for state, names in groups)
    fill = Fill(label="What neither runs nor waits, each by its own command", commands=tuple(commands))
    return Report(
        title=f"Sweep {sweep.name}",
        groups=(Group(title="Means over seeds", tables=tuple(tables)),),
        legend=(LEGEND,),
        advice=f"Points that are not done: {not_done}." if not_done else "",
        missing=(fill,) if commands else (),
    )


def _tables(sweep: SweepNumbers, title: str, table: Frame) -> Iterator[Table]:
    """The table of a metric; of two settings a grid, too, at the layer with the highest mean."""
    highest, lacking = table["mean"].max(), sweep.lacking()
    rows = []
    for key, line in table.iterrows():
        settings = dict(zip(sweep.keys, key if isinstance(key, tuple) else (key,), strict=True))
        weights = str(settings.pop(WEIGHTS))
        # Weights that are not ours have one line for all points, without their settings.
        label = ", ".join(f"{name}={value}" for name, value in settings.items() if value != "")
        cells = tuple(_cell(line, layer, highest[layer]) for layer in highest.index)
        setting, empty = weights if label else "", lacking.get(key, MISSING)
        rows.append(Row(label=label or weights, setting=setting, is_published=False, cells=cells, empty=empty))
    yield Table(title=title, caption="", columns=tuple(map(str, highest.index)), rows=tuple(rows))
    if len(sweep.axes) == 2 and our_lines(sweep, table)["mean"].notna().any(axis=None):
        yield _grid(sweep, title, table, lacking)


def _grid(sweep: SweepNumbers, title: str, table: Frame, lacking: Mapping[object, str]) -> Table:
    ours = our_lines(sweep, table)
    highest = ours["mean"].max()
    layer = str(highest.idxmax())
    shown = [_cell(line, layer, highest[layer]) for _, line in ours.iterrows()]
    # Points that are not done say in their cells how they stand
    keys = table.index[~table.index.get_level_values(WEIGHTS).isin(NOT_OURS)]
    texts = [lacking.get(key, MISSING) for key in keys]
    cells = [one or Cell(text=text, note="", details="") for one, text in zip(shown, texts, strict=True)]
    grid = pd.Series(cells, index=ours.index).unstack(0)
    across, down = sweep.axes
    return Table(
        title=f"{title} at {layer}, where the highest is: {across} across and {down} down",
        caption="",
        columns=tuple(map(str, grid.columns)),
        rows=tuple(Row(label=str(name), is_published=False, cells=tuple(line)) for name, line in grid.iterrows()),
    )


def _cell(line: Any, layer: str, highest: float) -> Cell | None:
    mean, std, count = (line[what, layer] for what in ("mean", "std", "count"))
    if not count > 0:
        return None
    spread = f"± {std:.1f} ({count:.0f})" if count > 1 and not pd.isna(std) else ""
    details = f"{mean:.4f}, {count:.0f} seeds" if count > 1 else f"{mean:.4f}, one seed"
    return Cell(text=f"{mean:.1f}", note="", details=details, spread=spread, is_best=bool(mean == highest))


def as_sweep_csv(sweep: SweepNumbers) -> str:
    """A line a result, in full, and one for each point that has none."""
    rows = sweep.rows.drop(columns=[TITLE, COLUMN])
    texts = {
        name: pd.Series(list(map(as_text, rows[name])), rows.index, dtype=object)
        for name in rows.columns
        if rows[name].dtype == object
    }
    return rows.assign(**texts).to_csv(index=False, lineterminator="\n")
