"""Loads results and training curves of runs as data frames, for the notebooks beside it.

Where from is said by environment variables:

- `RELLOC_RUNS`: the folder of runs, by default runs/ here or in the folder above.
- `RELLOC_MLFLOW`: the address of an MLflow store that is read in place of run folders.
- `RELLOC_SELECT`: words as `python -m relloc.report` takes them: folders, `sweep=NAME`, and
  `FIELD=VALUE` for fields of results and settings of trainings.

A number that was copied from run to run counts once. Rows are averaged over seeds alone
(`over_seeds`): rows that differ otherwise are kept apart, or refused with what they differ in.
"""

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from relloc import neutral, terminal
from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.errors import DataError, UsageError
from relloc.reports.load import Measured, find_measured
from relloc.reports.pretrainings import is_training, pretraining_of, training_record
from relloc.reports.published import card_parts
from relloc.reports.selection import select, split_words
from relloc.results import LAYERS, NO_FILES
from relloc.sweeps.sweep import SWEEP_FILE, Sweep, find_sweep
from relloc.tracking import RunRecord, read_journal
from relloc.tracking.fetching import fetch_runs
from relloc.tracking.record import RUN_FILE, Scalar
from relloc.tracking.watched import watched_entries

SELECT, RUNS, MLFLOW = "RELLOC_SELECT", "RELLOC_RUNS", "RELLOC_MLFLOW"
_SWEEP = "sweep="
# What rows of one panel share: numbers that differ in any of it don't compare
PANEL = (
    "eval",
    "metric",
    "variant",
    "unit",
    "dataset",
    "images",
    "split",
    "n",
    "model",
    "view",
    "precision",
    "decoder",
    "protocol",
    "deviations",
    "eval_settings",
)
# What rows of one line share: which weights, but for the seed, and how their batch norm was set
LINE = ("weights", "study", "settings", "train_images", "batch_norm")
# Settings of evaluations that change no number, and those that a row has in fields of its own
_NOT_OF_EVALUATION = ("batch", "bank_gib", "layers")
_MEMBER = "_target_"  # the setting that tells which member of a group was chosen
MOST_PANELS = 6
_CONFIDENCE = 0.95
_HASH_DIGITS = 8

Frame = Any  # a pandas DataFrame, whose types pyright can't follow


class MixedRows(DataError):
    """Numbers would be mixed that differ in more than the seed; says in what, and how to choose."""


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints what a user can mend as one message, and everything else with its traceback."""
    if isinstance(error, UsageError):
        terminal.print_error(error)
    else:
        sys.__excepthook__(kind, error, trace)


# Jupyter has its own way to show errors: this is for notebooks that are run as scripts.
_script = getattr(sys.modules["__main__"], "__file__", None) or ""
if Path(_script).resolve().parent == Path(__file__).resolve().parent:
    sys.excepthook = _report


def runs_folder() -> Path:
    """Returns the folder of runs: RELLOC_RUNS, or runs/ here or in the folder above."""
    if RUNS in os.environ:
        return Path(os.environ[RUNS])
    # Jupyter starts in analysis/, a script where the command was given
    candidates = (Path("runs"), Path("../runs"))
    return next((path for path in candidates if path.is_dir()), Path("runs"))


def figures_folder() -> Path:
    """Returns the folder that notebooks save their figures in, `figures` in the folder of runs."""
    return runs_folder() / "figures"


# Where runs come from


def selected_words() -> list[str]:
    """Returns the words of RELLOC_SELECT."""
    return shlex.split(os.environ.get(SELECT, ""))


@functools.cache
def _fetched(uri: str) -> tuple[Path, Mapping[str, Path]]:
    """Returns a folder with copies of all runs of a store, and which folder each was sent from."""
    folder = tempfile.TemporaryDirectory(prefix="relloc_fetched_")
    atexit.register(folder.cleanup)
    root = Path(folder.name).resolve()
    return root, fetch_runs(uri, root)


def _root() -> Path:
    """Returns the folder below which all runs lie."""
    uri = os.environ.get(MLFLOW)
    return _fetched(uri)[0] if uri else runs_folder().resolve()


def run_folders(places: Sequence[str]) -> list[Path]:
    """Returns the run folders that the words for places name, all runs if there are none.

    Raises:
        UsageError: a sweep or a folder is not there.
    """
    uri = os.environ.get(MLFLOW)
    if not places:
        return sorted(file.parent for file in _root().rglob(RUN_FILE))
    folders = []
    for place in places:
        if uri:
            folders += _folders_in_store(uri, place)
        elif place.startswith(_SWEEP):
            folders += _folders_of_sweep(find_sweep(place))
        elif (Path(place) / SWEEP_FILE).exists():
            folders += _folders_of_sweep(Sweep(Path(place).absolute()))
        elif Path(place).is_dir():
            folders += sorted(file.parent.resolve() for file in Path(place).rglob(RUN_FILE))
        else:
            raise UsageError(f"{SELECT}: {place} is no folder, no sweep=NAME and no FIELD=VALUE")
    return list(dict.fromkeys(folders))


def _folders_of_sweep(sweep: Sweep) -> list[Path]:
    """Returns the run folders of the points of a sweep that have begun."""
    folders = []
    for point in sweep.points():
        if (point.folder / RUN_FILE).exists():
            folders.append(point.folder.resolve())
    return folders


def _folders_in_store(uri: str, place: str) -> list[Path]:
    """Returns the copies of the runs of a store that a word names: a sweep, or their folder."""
    _, copies = _fetched(uri)
    found = []
    for origin, copy in copies.items():
        sweep = RunRecord.read(copy).tags.get("relloc.sweep", "")
        is_below = Path(origin).is_relative_to(os.path.abspath(place))
        if place == f"{_SWEEP}{sweep}" or is_below:
            found.append(copy)
    if not found:
        raise UsageError(f"{SELECT}: no run of {uri} is of {place}")
    return sorted(found)


def load_measured(words: Sequence[str] | None = None) -> list[Measured]:
    """Returns the selected results, the oldest first, as reports take them.

    Args:
        words: what to select; by default RELLOC_SELECT.

    Raises:
        DataError: no run has results.
        UsageError: the words fit nothing.
    """
    places, filters = split_words(selected_words() if words is None else words)
    folders = run_folders(places)
    if not folders:
        raise DataError(
            f"no runs below {_root()}: run python -m relloc.train, or set {RUNS} or {MLFLOW}"
        )
    return select(find_measured(folders), filters)


def load_results(words: Sequence[str] | None = None) -> Frame:
    """Returns a data frame with a row for each selected result, each measurement once.

    Its columns are the fields of `Result`, with paths relative to the folder of runs, and:
        run, folder: Name and folder of the run that measured it.
        images: The digest of the images, "" where it was not recorded.
        eval_settings: A hash of the settings of the evaluation.
        weights: "random", "torchvision" or "pretrained".
        study: The name of the pretraining without its seed, so that repeats share it; for other
            weights the same as `weights`.
        settings: A hash of the pretraining's settings without the seed.
        train_images: The digests of the images that it was trained on.
        weights_seed: The seed of the pretraining, or of random weights.
        pretraining: The settings of the pretraining without the seed, as a dict.
    """
    records: dict[Path, RunRecord] = {}
    rows = []
    for each in load_measured(words):
        folder = each.run.folder
        if folder not in records and (folder / RUN_FILE).exists():
            records[folder] = RunRecord.read(folder)
        rows.append(_row(each, records.get(folder)))
    frame = pd.DataFrame(rows)
    frame["layer"] = pd.Categorical(frame["layer"], ["", *LAYERS], ordered=True)
    return _each_once(frame)


def _row(each: Measured, record: RunRecord | None) -> dict[str, Any]:
    """Returns the row of one result; `record` is that of the run that measured it, if it is there.

    The run that a row was copied from may be gone.
    """
    result = each.result
    row = dataclasses.asdict(result)
    # Layers compare with each other: a deviation that names its own is the same at all
    deviations = "; ".join(result.deviations)
    if result.layer:
        deviations = deviations.replace(result.layer, "the layer")
    row["deviations"] = deviations
    row["details"] = "; ".join(result.details)
    row["checkpoint"] = _relative(result.checkpoint)
    row["measured_in"] = _relative(result.measured_in)
    row["run"] = each.run.name
    row["folder"] = _relative(str(each.run.folder))
    row["images"] = each.digest
    params = record.params if record else {}
    row["eval_settings"] = _hash(_settings_of_evaluation(result.eval, params))
    # Nearest neighbors have a line of a table, which the variant names, for each layer
    if result.variant == result.layer:
        row["variant"] = ""
    row |= _weights(each, record)
    return row


def _weights(each: Measured, record: RunRecord | None) -> dict[str, Any]:
    """Returns the columns that say whose number it is."""
    result = each.result
    if result.checkpoint in NO_FILES:
        weights = result.checkpoint
        return {
            "weights": weights,
            "study": weights,
            "settings": "",
            "train_images": "",
            "weights_seed": result.seed,
            "pretraining": {},
        }
    training = training_record(record, result.checkpoint) if record else None
    params: dict[str, Scalar] = dict(training.params) if training else {}
    settings = neutral.settings_of_weights(params)
    seed = settings.pop("seed", result.seed)
    if record is None:
        name, digest, images = result.checkpoint, "", ""
    else:
        pretraining = pretraining_of(record, result.checkpoint)
        name, digest, images = pretraining.name, pretraining.settings, pretraining.images
    return {
        "weights": "pretrained",
        "study": name,
        "settings": digest,
        "train_images": images,
        "weights_seed": int(seed),
        "pretraining": settings,
    }


def _settings_of_evaluation(name: str, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Returns the settings of an evaluation that decide its numbers, images aside."""
    settings = {}
    for key, value in params.items():
        # Evaluations may be run as studies too
        group, _, rest = key.partition(".")
        own = rest.removeprefix(f"{name}.")
        is_own = group in ("eval", "study") and own != rest and own not in _NOT_OF_EVALUATION
        if is_own and not own.startswith("data."):
            settings[own] = value
    return settings


def _hash(settings: Mapping[str, Scalar]) -> str:
    """Returns a short hash of settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _relative(path: str) -> str:
    """Returns a path relative to the folder of runs, others as they are."""
    root = _root()
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path


def _each_once(frame: Frame) -> Frame:
    """Returns each measurement once, in the row of the run that measured it, the newest.

    Rows of equal fingerprints measure the same weights on the same images in the same way, under
    whichever path the weights were evaluated.
    """
    number = ["eval", "metric", "layer", "variant", "column", "table", "spread", "seed"]
    # The pretext row has no fingerprint: there its weights say what it is of
    identity = frame["fingerprint"].where(frame["fingerprint"] != "", frame["checkpoint"])
    frame = frame.assign(identity=identity)
    # `find_measured` has the oldest first; a stable sort keeps that among originals and copies
    is_original = frame["measured_in"] == ""
    order = is_original.sort_values(kind="stable").index
    once = frame.loc[order].drop_duplicates([*number, "identity"], keep="last")
    return once.sort_index().drop(columns="identity").reset_index(drop=True)


def load_curves(words: Sequence[str] | None = None) -> Frame:
    """Returns a data frame with a row for each metric and step of the curves of selected runs.

    These are those of the journals, and of what was watched: `watch/knn/feature4/top1_k20`.

    Its columns are `run`, `folder`, `step`, `metric`, `value`, `images_seen` (millions, of
    trainings whose images a step are recorded), and of trainings the columns `study`, `settings`,
    `train_images`, `weights_seed` and `pretraining` of `load_results`. Journals of evaluations are
    left out.

    Raises:
        DataError: no selected training has a journal with metrics.
    """
    places, filters = split_words(selected_words() if words is None else words)
    rows = []
    known = set()
    for folder in run_folders(places):
        record = RunRecord.read(folder)
        known.update(record.params)
        of_settings = [one for one in filters if one.is_of_settings]
        if not is_training(record) or not all(_fits(one, record) for one in of_settings):
            continue
        pretraining = pretraining_of(record, str(folder / BACKBONE_FILE))
        settings = neutral.settings_of_weights(record.params)
        seed = settings.pop("seed", 0)
        a_step = record.params.get("recipe.images_per_step")
        for entry in (*read_journal(folder), *watched_entries(folder)):
            for metric, value in entry.metrics.items():
                rows.append(
                    {
                        "run": record.name,
                        "folder": _relative(str(folder)),
                        "step": entry.step,
                        "metric": metric,
                        "value": value,
                        "images_seen": entry.step * float(a_step) / 1e6 if a_step else np.nan,
                        "weights": "pretrained",
                        "study": pretraining.name,
                        "settings": pretraining.settings,
                        "train_images": pretraining.images,
                        "batch_norm": "as_trained",
                        "weights_seed": int(seed),
                        "pretraining": settings,
                    }
                )
    if not rows:
        raise DataError(
            f"no training below {_root()} has curves ({SELECT}={' '.join(selected_words())}): "
            f"run python -m relloc.train, or set {RUNS} or {MLFLOW}"
        )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["folder", "metric", "step"], kind="stable", ignore_index=True)


def _fits(one: Any, record: RunRecord) -> bool:
    """Returns whether a training has a setting that a filter asks for."""
    value = record.params.get(one.field)
    return value is not None and one.fits(str(value).replace(" ", ""))


# Putting together what compares


def panels(frame: Frame, most: int = MOST_PANELS) -> list[tuple[dict[str, Any], Frame]]:
    """Returns the rows in groups that compare, each with what its rows share (`PANEL`).

    Raises:
        MixedRows: there are more groups than a figure can show.
    """
    grouped = frame.groupby(list(PANEL), sort=False, observed=True)
    if grouped.ngroups > most:
        raise MixedRows(
            f"{grouped.ngroups} kinds of numbers are selected, which differ in "
            f"{differences(frame, PANEL)}: a figure shows {most} at most. {_how_to_select(frame)}"
        )
    found = []
    for values, rows in grouped:
        found.append((dict(zip(PANEL, values, strict=True)), rows))
    return found


def is_of_card(shared: Mapping[str, Any]) -> bool:
    """Returns whether a panel, by what its rows share, has images and model of the card."""
    wanted = (shared["eval"], shared["dataset"], shared["split"], shared["n"], shared["model"])
    for part in card_parts():
        if wanted == (part.evaluation, part.dataset, part.split, part.images, "resnet50"):
            return True
    return False


def differences(frame: Frame, fields: Iterable[str]) -> str:
    """Returns the fields in which rows differ, each with its values, for a message."""
    phrases = []
    for field in fields:
        values = list(map(str, frame[field].drop_duplicates()))
        if len(values) > 1:
            shown = ", ".join(value or "none" for value in values[:5])
            more = f" and {len(values) - 5} more" if len(values) > 5 else ""
            phrases.append(f"{field} ({shown}{more})")
    settings = differing_settings(frame)
    for name, values in settings.items():
        shown = ", ".join(values[:5])
        phrases.append(f"{name} ({shown}{' …' if len(values) > 5 else ''})")
    return "; ".join(phrases) or "nothing that was recorded"


def differing_settings(frame: Frame) -> dict[str, list[str]]:
    """Returns the settings in which pretrainings differ, with their values, numbers by size."""
    trained = frame[frame["weights"] == "pretrained"].drop_duplicates("settings")
    several: list[Mapping[str, Any]] = list(trained["pretraining"])
    names = dict.fromkeys(name for settings in several for name in settings)
    differing = {}
    for name in names:
        values = list(dict.fromkeys(_text(settings.get(name)) for settings in several))
        if len(values) > 1:
            differing[name] = sorted(values, key=_size)
    return differing


def _text(value: Any) -> str:
    """Returns a setting as it stands on a command line, without spaces."""
    return "none" if value is None else str(value).replace(" ", "")


def _size(text: str) -> tuple[float, str]:
    """Returns a sort key: numbers and lists of them by size, then other texts."""
    try:
        parsed = json.loads(text)
        # A range such as [0, 21] has the size of its width
        return float(np.ptp(parsed) if isinstance(parsed, list) else parsed), text
    except (ValueError, TypeError):
        return float("inf"), text


def _how_to_select(frame: Frame) -> str:
    """Returns the sentence that says how to choose among mixed rows."""
    settings = differing_settings(frame)
    examples = []
    for field in ("eval", "dataset", "n", "model", "batch_norm", "precision", "decoder", "images"):
        if field in frame and frame[field].nunique() > 1:
            examples.append(f"{field}={frame[field].iloc[0]}")
    for name, values in settings.items():
        examples.append(f"{name}={values[0]}")
    chosen = " ".join(examples[:3]) or f"{frame['folder'].iloc[0]}"
    return f"Choose by {SELECT}, for example {SELECT}='{chosen}'"


def line_names(frame: Frame) -> dict[tuple[str, ...], str]:
    """Returns a short name for each line (`LINE`) of the rows, ordered as figures show them.

    Pretrainings are named by the first three settings in which they differ, such as "gap 0, jitter
    7", and are in the order of these. In an ablation, where they differ in more and most of them
    have the usual value of each, they are named by what is unusual. Random and supervised weights
    come last.
    """
    lines = frame.drop_duplicates(list(LINE))
    trained = lines[lines["weights"] == "pretrained"].drop_duplicates("settings")
    pretrainings: list[Mapping[str, Any]] = list(trained["pretraining"])
    settings = _without_parts(list(differing_settings(frame)), pretrainings)
    usual = _usual_values(settings, pretrainings) if len(settings) > 3 else None
    keyed = []
    for _, row in lines.iterrows():
        key = tuple(row[field] for field in LINE)
        values = {name: _text(row["pretraining"].get(name)) for name in settings}
        if row["weights"] != "pretrained":
            words = [row["weights"]]
        elif settings:
            own = list(settings)[:3]
            if usual:
                own = [name for name, value in values.items() if value != usual[name]]
            words = [f"{short_setting(name)} {_short_value(values[name])}" for name in own]
            words = words or ["usual settings"]
        else:
            words = [row["study"] if lines["study"].nunique() > 2 else "pretrained"]
        recalibrated = row["batch_norm"] == "recalibrated"
        if recalibrated and frame["batch_norm"].nunique() > 1:
            words.append("recalibrated")
        is_reference = row["weights"] != "pretrained"
        order = [_size(value) for value in values.values()]
        keyed.append(((is_reference, order, row["study"], recalibrated), key, ", ".join(words)))
    keyed.sort(key=lambda each: each[0])
    names = {}
    for _, key, name in keyed:
        # Two files of other projects, say, that no setting tells apart
        taken = name in names.values()
        names[key] = f"{name} ({key[1]})" if taken else name
    return names


def _without_parts(names: Sequence[str], pretrainings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns names of settings without those that follow from the member of their group.

    Colors are dropped or gray, say; that a probability is only of gray ones needs no telling, but
    two probabilities do.
    """
    told = []
    for name in names:
        group, _, part = name.rpartition(".")
        member = f"{group}.{_MEMBER}"
        values = {(_text(each.get(member)), _text(each.get(name))) for each in pretrainings}
        follows = len(values) == len({of_member for of_member, _ in values})
        if part == _MEMBER or member not in names or not follows:
            told.append(name)
    return told


def _usual_values(
    names: Sequence[str], pretrainings: Sequence[Mapping[str, Any]]
) -> dict[str, str] | None:
    """Returns the value of each setting that more than half have; none where one has no such."""
    usual = {}
    for name in names:
        counts = Counter(_text(each.get(name)) for each in pretrainings)
        [(value, n_with_it)] = counts.most_common(1)
        if 2 * n_with_it <= len(pretrainings):
            return None
        usual[name] = value
    return usual


def short_setting(name: str) -> str:
    """Returns the name of a setting for a legend: "grid.gap_px" is "gap"."""
    _, _, last = name.removesuffix(f".{_MEMBER}").rpartition(".")
    return last.removesuffix("_px")


def _short_value(text: str) -> str:
    """Returns the value of a setting for a legend: "relloc.patches.color.Gray" is "Gray"."""
    return text.rpartition(".")[2] if text.startswith("relloc.") else text


def as_frame(rows: Any) -> Frame:
    """Returns a data frame of rows."""
    return pd.DataFrame(rows)


def over_seeds(frame: Frame, keys: Sequence[str]) -> Frame:
    """Returns mean, standard deviation, 95 % interval of the mean and n over seeds.

    Args:
        frame: rows of one panel or several.
        keys: the columns that rows are grouped by; `PANEL` and `LINE` are to be among them, or
            the same for all rows.

    Returns:
        A row for each group: `mean`, `std`, `min` and `max`, `low` and `high` (the 95 % interval
        of the mean by Student's t, or that of a single row), and `n`, how many weights. Several
        evaluations of the same weights, with other seeds, count as one.

    Raises:
        MixedRows: rows of a group differ in more than the seed.
    """
    _refuse_mixed(frame, keys)
    by_weights = frame.groupby([*keys, "weights_seed"], observed=True, sort=False)
    single = by_weights.agg(value=("value", "mean"), low=("low", "first"), high=("high", "first"))
    groups = single.groupby(level=list(range(len(keys))), observed=True, sort=False)
    lines = {}
    for key, rows in groups:
        lines[key] = statistics(rows["value"].to_numpy(), rows["low"].iloc[0], rows["high"].iloc[0])
    index = pd.MultiIndex.from_tuples(
        [key if isinstance(key, tuple) else (key,) for key in lines], names=list(keys)
    )
    return pd.DataFrame(list(lines.values()), index=index)


def statistics(values: np.ndarray, low: Any = None, high: Any = None) -> dict[str, float]:
    """Returns mean, std, n, min, max and the 95 % interval of the mean of values over seeds."""
    n = len(values)
    mean = float(np.mean(values))
    ends = {"min": float(np.min(values)), "max": float(np.max(values))}
    if n < 2:
        # What is known of a single number is the interval that its evaluation computed
        low = np.nan if low is None else low
        high = np.nan if high is None else high
        return {"mean": mean, "std": np.nan, "low": low, "high": high, "n": n} | ends
    std = float(np.std(values, ddof=1))
    half = float(student.ppf((1 + _CONFIDENCE) / 2, n - 1)) * std / n**0.5
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half, "n": n} | ends


def half_widths(means: Frame, of: int) -> Frame:
    """Returns half the widths of intervals that hold together in 95 %, by Bonferroni's rule.

    Args:
        means: rows as `over_seeds` returns them, each with its own 95 % interval.
        of: how many intervals are to hold together.
    """
    half = (means["high"] - means["low"]) / 2
    # Tails over few seeds are long. An interval of a single row is over many source images
    degrees = np.where(means["n"] > 1, means["n"] - 1, np.inf)
    alone = (1 + _CONFIDENCE) / 2
    together = 1 - (1 - alone) / of
    return half * student.ppf(together, degrees) / student.ppf(alone, degrees)


def _refuse_mixed(frame: Frame, keys: Sequence[str]) -> None:
    """Raises `MixedRows` if rows of a group differ in more than their seeds."""
    not_keys = [field for field in (*PANEL, *LINE) if field not in keys and field in frame]
    for _, rows in frame.groupby(list(keys), observed=True, sort=False):
        differing = [field for field in not_keys if rows[field].nunique() > 1]
        repeated = rows[rows.duplicated(["weights_seed", "seed"], keep=False)]
        if differing:
            raise MixedRows(
                f"these numbers are not repeats of each other, they differ in "
                f"{differences(rows, differing)}. {_how_to_select(rows)}"
            )
        if len(repeated):
            told = ("run", "folder", "details", "choice", "k", "metric", "table", "column")
            raise MixedRows(
                f"{len(repeated)} numbers of {repeated['eval'].iloc[0]} have the same seed and "
                f"settings, and differ in {differences(repeated, told)}: they are no repeats. "
                f"Choose by {SELECT}, for example {SELECT}='run={repeated['run'].iloc[0]}', or "
                "name one of their folders"
            )


def panel_title(shared: Mapping[str, Any], frame: Frame) -> str:
    """Returns the title of a panel: evaluation and images, and what else tells it from others."""
    title = f"{shared['eval']} on {shared['dataset']} {shared['split']}"
    more = [f"n = {shared['n']:,}"]
    # Only what tells panels of one evaluation apart
    same = frame[frame["eval"] == shared["eval"]]
    for field in ("model", "view", "precision", "decoder", "variant", "metric", "protocol"):
        if same[field].nunique() > 1:
            more.append(str(shared[field]))
    same = same[(same["dataset"] == shared["dataset"]) & (same["n"] == shared["n"])]
    if same["images"].nunique() > 1:
        more.append(f"images {shared['images'][:_HASH_DIGITS]}")
    more = [word for word in more if word]
    return f"{title}\n{', '.join(more)}"
