"""Collects the results of a sweep, and averages them over seeds.

Each result is joined with the settings that the sweep varies. The tables have a line for each
combination of settings and weights, and a column for each layer.
"""

import dataclasses
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from relloc.errors import DataError
from relloc.reports.as_csv import as_text
from relloc.reports.folder_names import with_folder_names
from relloc.reports.lines import short_names
from relloc.reports.load import without_curves
from relloc.reports.missing import MissingEvaluations
from relloc.reports.parts import MISSING, Cell, Group, Report, Row, Table
from relloc.results import LAYERS, REFERENCE_MODELS, Result, read_results
from relloc.sweeps.points import Point
from relloc.terminal import quantity
from relloc.tracking.record import RUN_FILE, RunRecord, Scalar

# Columns of `SweepNumbers.rows` beside the settings and the fields of `Result`
WEIGHTS, TITLE, COLUMN = "weights", "title", "across"
EFFECT = "effect_"  # begins the names of what shortcuts bring, of which less is better
Frame = Any  # a pandas DataFrame, whose types pyright can't follow
_SEED = "seed"
_RESULT_FIELDS = [field.name for field in dataclasses.fields(Result)]
_ANY = ""  # in place of a setting, for results that do not depend on it
# Settings that the title or the weights of a table name already
_NAMED_BY_TABLE = ("eval", "checkpoint", "batch_norm", "strides")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepNumbers:
    """The results of a sweep, with the settings that it varies.

    Attributes:
        name: The name of the sweep.
        swept: The short names of the settings that differ between points, such as "gap_px".
        rows: A data frame with a line for each result, and one for each point that has none. Its
            columns are the name, folder and state of the point; the `swept` settings; the weights
            ("pretrained", "random", or the short name of an evaluated file); title and column of
            the table that shows it; and the fields of `Result`, empty for a point without results.
            Settings, weights and columns are categories in the order in which they are shown:
            numbers by size, others in order of appearance.
    """

    name: str
    swept: tuple[str, ...]
    rows: Frame

    @property
    def keys(self) -> list[str]:
        """The columns that identify a line of a table: the settings, and the weights."""
        return [*self.swept, WEIGHTS]

    @property
    def has_ours(self) -> bool:
        """Whether any result is of weights that are neither random nor torchvision's."""
        has_result = self.rows["eval"].notna()
        our_results = has_result & self._is_ours()
        return bool(our_results.any())

    @property
    def axes(self) -> list[str]:
        """The `keys` in which lines of our own weights differ; the first key if there are none."""
        ours = self.rows[self._is_ours()]
        varied = []
        for key in self.keys:
            if ours[key].nunique() > 1:
                varied.append(key)
        return varied or self.keys[:1]

    def _is_ours(self) -> Any:
        """Returns for each row whether its weights are neither random nor torchvision's."""
        is_reference = self.rows[WEIGHTS].isin(REFERENCE_MODELS)
        return ~is_reference

    def lacking(self) -> dict[object, str]:
        """Returns the states of points without results, by their `keys`, such as "failed"."""
        has_no_result = self.rows["eval"].isna()
        is_not_done = self.rows["state"] != "done"
        blank = self.rows[has_no_result & is_not_done]
        # Several seeds of one setting may be in different states
        by_setting = blank.groupby(self.keys, observed=True)
        states = by_setting["state"].unique()
        in_words = states.map(", ".join)
        return in_words.to_dict()


def read_sweep(
    name: str,
    points: Sequence[Point],
    states: Sequence[str],
    metrics: str | None = None,
) -> SweepNumbers:
    """Returns the results of all points of a sweep.

    Args:
        name: The name of the sweep.
        points: Its points.
        states: The state of each point as a word, such as "done".
        metrics: A pattern such as `linear/feature4/*`: the results whose names in MLflow match it
            are returned. By default the headline metrics are.

    Raises:
        DataError: No point has results, none matches `metrics`, or a file is broken.
    """
    try:
        results = [_results_of(point) for point in points]
        settings = _with_defaults(points)
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: repair or remove it") from error
    all_rows = itertools.chain.from_iterable(results)
    selected = _selected(list(all_rows), name, metrics)
    swept = _swept(settings)
    # One line for each result, in the order of the points
    lines: list[dict[str, Any]] = []
    of_points = zip(points, states, results, settings, strict=True)
    for point, state, rows, setting in of_points:
        line = {
            "point": point.name,
            "folder": str(point.folder),
            "state": state,
        }
        for key, short_name in swept.items():
            line[short_name] = setting.get(key, MISSING)
        described = []
        for row in rows:
            if row in selected:
                described.append(line | _described(row, point.kind))
        # A point without results keeps its line, so that tables show how it stands
        lines += described or [line]
    # Also columns that no line has. A dict drops the second of two equal names
    columns = dict.fromkeys((*lines[0], WEIGHTS, TITLE, COLUMN, *_RESULT_FIELDS))
    frame = pd.DataFrame(
        lines,
        columns=pd.Index(columns),
        dtype=object,
    )
    frame = frame.astype({"value": float})
    short_names_of_swept = tuple(swept.values())
    return SweepNumbers(
        name=name,
        swept=short_names_of_swept,
        rows=_in_order(frame, short_names_of_swept),
    )


def _results_of(point: Point) -> Iterable[Result]:
    """Returns the results of a point; of a number that was measured again only the last."""
    last: dict[object, Result] = {}
    rows: Iterable[Result] = read_results(point.folder)
    if (point.folder / RUN_FILE).exists():
        record = RunRecord.read(point.folder)
        rows = with_folder_names(without_curves([*rows], record), record.params)
    for row in rows:
        number = (row.tracked_name, row.dataset, row.split, row.checkpoint)
        last[number] = row
    return last.values()


def _selected(
    rows: Sequence[Result],
    sweep: str,
    metrics: str | None,
) -> set[Result]:
    """Returns the results that the report is to show."""
    if not rows:
        raise DataError(
            f"no point of sweep {sweep} has results yet: "
            "python -m relloc.sweep status tells how they stand"
        )
    if metrics is None:
        return {row for row in rows if row.headline}
    # Names as of a run's own weights: points that evaluate other files match the same pattern
    selected = set()
    patterns = set()
    for row in rows:
        of_own_weights = dataclasses.replace(row, checkpoint="")
        name = of_own_weights.tracked_name
        if fnmatch.fnmatchcase(name, metrics):
            selected.add(row)
        # Which names there are, once for all layers
        pattern = name.replace(f"/{row.layer}/", "/*/")
        patterns.add(pattern)
    if not selected:
        known = ", ".join(sorted(patterns))
        raise DataError(f"--metrics {metrics} fits nothing that was measured: {known}")
    return selected


def _with_defaults(points: Sequence[Point]) -> list[dict[str, str]]:
    """Returns for each point the settings that any command of the sweep sets.

    Commands of one sweep may set different settings. Where a point's command did not set one, its
    value is the one in the record of the run.
    """
    settings = []
    for point in points:
        own = {}
        for override in point.overrides:
            # Hydra's + adds a setting, and ~ removes one
            word = override.lstrip("+~")
            key, _, value = word.partition("=")
            if key not in _NAMED_BY_TABLE:
                own[key] = value
        settings.append(own)
    keys = _all_keys(settings)
    for point, own in zip(points, settings, strict=True):
        lacking = [key for key in keys if key not in own]
        record_file = point.folder / RUN_FILE
        # A run that has not begun has no record
        if not lacking or not record_file.exists():
            continue
        record = RunRecord.read(point.folder)
        for key in lacking:
            if key in record.params:
                own[key] = _word(record.params[key])
    return settings


def _all_keys(settings: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns the names of all settings, each once, in order of appearance."""
    keys = itertools.chain.from_iterable(settings)
    return list(dict.fromkeys(keys))


def _word(value: Scalar) -> str:
    """Returns a value as it stands on a command line."""
    # Hydra writes true and false
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _swept(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Returns the settings that differ between points, each with the name that tables show.

    The seed is left out if anything else differs, as tables average over it. The shown name is the
    last part of the setting's, unless that is ambiguous.
    """
    differing = []
    for key in _all_keys(settings):
        values = {own.get(key) for own in settings}
        if key != _SEED and len(values) > 1:
            differing.append(key)
    if not differing:
        differing = [_SEED]
    short = []
    for key in differing:
        _, _, last_part = key.rpartition(".")
        short.append(last_part)
    # Fields of results are columns of the same data frame
    taken = [*short, *_RESULT_FIELDS]
    shown = {}
    for key, name in zip(differing, short, strict=True):
        shown[key] = name if taken.count(name) == 1 else key
    return shown


def _described(row: Result, kind: str) -> dict[str, Any]:
    """Returns the columns of a result; `kind` is the command of its point, train or evaluate."""
    recalibrated = "_recalibrated" if row.batch_norm == "recalibrated" else ""
    unit = "" if row.unit == "%" else f", {row.unit}"
    strides = f"_strides_{row.strides}" if row.strides else ""
    decoder = f"_{row.decoder}" if row.decoder else ""
    metric = f"{row.eval}{recalibrated}{strides}{decoder}/{row.metric}"
    # Each point of a training sweep has weights of its own: they share a name, so that they compare
    is_own = kind == "train" and row.checkpoint not in REFERENCE_MODELS
    described = {
        WEIGHTS: "pretrained" if is_own else row.checkpoint,
        TITLE: f"{metric} on {row.dataset} {row.split}{unit}",
        # Results that are of no layer have a column of their own
        COLUMN: row.layer or row.column,
    }
    fields = dataclasses.asdict(row)
    return described | fields


def _in_order(rows: Frame, swept: Iterable[str]) -> Frame:
    """Returns the rows with settings, weights and columns as ordered categories."""
    names = short_names(rows[WEIGHTS].dropna())
    ours = [name for path, name in names.items() if path not in REFERENCE_MODELS]
    # Points without results belong to our weights if there is only one file of them
    is_one_file = len(ours) == 1
    blank = ours[0] if is_one_file else MISSING
    weights = rows[WEIGHTS].map(names.get)
    weights = weights.fillna(blank)
    rows = rows.assign(**{WEIGHTS: weights})
    # Values of settings are compared as they are written, also where some are numbers
    rows = rows.astype(dict.fromkeys(swept, str))
    order = {
        WEIGHTS: [*ours, MISSING, *REFERENCE_MODELS],
        COLUMN: [*LAYERS, *rows[COLUMN].dropna()],
    }
    for key in swept:
        values = rows[key].unique()
        if are_numbers(values):
            values = sorted(values, key=float)
        order[key] = [*values, _ANY]
    # A value that stands twice in an order is placed where it stands first
    categories = {}
    for key, values in order.items():
        distinct = list(dict.fromkeys(values))
        categories[key] = pd.CategoricalDtype(distinct, ordered=True)
    return rows.astype(categories)


def are_numbers(values: Iterable[str]) -> bool:
    """Returns whether all values of a setting are numbers, and there are some."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return bool(numbers)


def mean_tables(numbers: SweepNumbers) -> Iterator[tuple[str, Frame]]:
    """Yields each table of the sweep with its title.

    A table is a data frame. Its index are the `numbers.keys`, and its columns are pairs of "mean",
    "std" or "count" (over seeds) and a layer. A point without results has a line of NaN. Random and
    torchvision's weights have a single line, without settings, where all points measured them
    alike.
    """
    keys = numbers.keys
    is_blank = numbers.rows["eval"].isna()
    # A copy, since settings of reference models are replaced below
    rows = numbers.rows[~is_blank].copy()
    blank = numbers.rows[is_blank]
    # Results of random weights do not depend on pretraining settings. Equal fingerprints show that
    # every point measured the same thing, so one line serves all of them
    others = rows[WEIGHTS].isin(REFERENCE_MODELS)
    same_cell = [TITLE, WEIGHTS, COLUMN, _SEED]
    by_cell = rows[others].groupby(same_cell, observed=True)
    n_fingerprints = by_cell["fingerprint"].nunique()
    measured_alike = (n_fingerprints == 1).all()
    if measured_alike:
        rows.loc[others, list(numbers.swept)] = _ANY
        identifying = [TITLE, *keys, COLUMN, _SEED, "fingerprint"]
        rows = rows.drop_duplicates(identifying)
    for title, part in rows.groupby(TITLE, sort=False):
        # Points without results are lines of every table; they need some column to stand in
        first_column = part[COLUMN].iloc[0]
        blank_lines = blank.fillna({COLUMN: first_column})
        part = pd.concat([part, blank_lines])
        by_cell = part.groupby([*keys, COLUMN], observed=True)
        statistics = by_cell["value"].agg(["mean", "std", "count"])
        # From a line for each layer to a column for each layer
        yield str(title), statistics.unstack(COLUMN)


def our_lines(numbers: SweepNumbers, table: Frame) -> Frame:
    """Returns the lines of a table that are of our own weights, indexed by `numbers.axes`."""
    ours = _of_our_weights(table)
    constant = [key for key in numbers.keys if key not in numbers.axes]
    return ours.droplevel(constant)


def _of_our_weights(table: Frame) -> Frame:
    """Returns the lines of a table without those of random and torchvision's weights."""
    weights = table.index.get_level_values(WEIGHTS)
    is_reference = weights.isin(REFERENCE_MODELS)
    return table[~is_reference]


LEGEND = (
    "Accuracies and mAP are percent. Of several seeds: their mean, ± their standard deviation, "
    "in brackets how many. Bold: the highest of a column."
)


def as_report(sweep: SweepNumbers, commands: Sequence[str]) -> Report:
    """Returns the report of a sweep: for each metric a table, with a row for each setting.

    Args:
        sweep: The results.
        commands: The commands that run the points that are not done, listed at the end.
    """
    tables: list[Table] = []
    for title, table in mean_tables(sweep):
        tables += _tables(sweep, title, table)
    # Points that are not done, by their state
    points = sweep.rows.drop_duplicates("folder")
    not_done = points[points["state"] != "done"]
    lists = []
    for state, names in not_done.groupby("state")["point"]:
        listed = ", ".join(map(str, names))
        lists.append(f"{state} ({len(names)}): {listed}")
    advice = f"Points that are not done: {'; '.join(lists)}." if lists else ""
    missing = MissingEvaluations(
        label="What neither runs nor waits, each by its own command",
        commands=tuple(commands),
    )
    group = Group(
        title="Means over seeds",
        tables=tuple(tables),
    )
    return Report(
        title=f"Sweep {sweep.name}",
        groups=(group,),
        legend=(LEGEND,),
        advice=advice,
        missing=(missing,) if commands else (),
    )


def _tables(sweep: SweepNumbers, title: str, table: Frame) -> Iterator[Table]:
    """Yields the table of a metric; with two varied settings also a grid of one over the other."""
    cells = _cells(table)
    # In place of numbers, how points stand that have none
    lacking = sweep.lacking()
    rows = []
    for key, line in cells.iterrows():
        *settings, weights = key
        # Weights that are not ours have one line for all points, without their settings
        words = []
        named = zip(sweep.swept, settings, strict=True)
        for name, value in named:
            if value != _ANY:
                words.append(f"{name}={value}")
        row = Row(
            label=", ".join(words) or weights,
            setting=weights if words else "",
            is_published=False,
            cells=tuple(line),
            empty=lacking.get(key, MISSING),
        )
        rows.append(row)
    yield Table(
        title=title,
        columns=tuple(cells),
        rows=tuple(rows),
    )
    # A grid has room for two settings, and needs some number
    ours = _of_our_weights(table)
    has_ours = ours["mean"].notna().any(axis=None)
    if len(sweep.axes) == 2 and has_ours:
        yield _grid(sweep, title, ours, lacking)


def _grid(
    sweep: SweepNumbers,
    title: str,
    ours: Frame,
    lacking: Mapping[object, str],
) -> Table:
    """Returns the means at the best layer with the first axis across and the second down."""
    highest_of_layers = ours["mean"].max()
    layer = highest_of_layers.idxmax()
    cells = _cells(ours)[layer]
    # Points that are not done say in their cells how they stand
    empty_keys = cells.index[cells.isna()]
    for key in empty_keys:
        state = lacking.get(key, MISSING)
        cells[key] = Cell(text=state)
    # The first axis becomes the columns
    grid = our_lines(sweep, cells).unstack(0)
    # Pairs of settings that no point has become empty cells
    grid = grid.where(grid.notna(), None)
    across, down = sweep.axes
    rows = []
    for label, line in grid.iterrows():
        row = Row(
            label=label,
            is_published=False,
            cells=tuple(line),
        )
        rows.append(row)
    axes = f"{across} across and {down} down"
    return Table(
        title=f"{title} at {layer}, where the highest is: {axes}",
        columns=tuple(grid),
        rows=tuple(rows),
    )


def _cells(table: Frame) -> Frame:
    """Returns a cell for each mean, the highest of each column bold; None where there is none."""
    # By layer, as the highest of each is bold
    cells = {}
    highest_of_layers = table["mean"].max()
    for layer, highest in highest_of_layers.items():
        means = table["mean", layer]
        stds = table["std", layer]
        counts = table["count", layer]
        column = []
        for mean, std, count in zip(means, stds, counts, strict=True):
            is_best = mean == highest
            cell = _cell(mean, std, count, is_best=is_best)
            column.append(cell)
        cells[layer] = column
    return pd.DataFrame(
        cells,
        index=table.index,
        dtype=object,
    )


def _cell(mean: float, std: float, count: float, *, is_best: bool) -> Cell | None:
    """Returns the cell of a mean over `count` seeds, or None where nothing was measured."""
    # The count is NaN for layers that no point of this line has
    if not count > 0:
        return None
    if count > 1:
        seeds = quantity(round(count), "seed")
        spread = f"± {std:.1f} ({count:.0f})"
    else:
        seeds = "one seed"
        spread = ""
    return Cell(
        text=f"{mean:z.1f}",  # z: no minus sign before zero
        details=f"{mean:.4f}, {seeds}",
        spread=spread,
        is_best=is_best,
    )


def as_sweep_csv(sweep: SweepNumbers) -> str:
    """Returns CSV with a line for each result in full, and one for each point that has none."""
    rows = sweep.rows.drop(columns=[TITLE, COLUMN])
    texts = rows.apply(_texts)
    return texts.to_csv(index=False, lineterminator="\n")


def _texts(column: Any) -> Any:
    """Returns a column as texts that spreadsheets take for nothing else.

    It is no category any more, which would refuse texts that are none of its own.
    """
    texts = [as_text(value) for value in column]
    return pd.Series(texts, dtype=object)
