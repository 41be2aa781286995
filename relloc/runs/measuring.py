"""Measures what a model lacks among some evaluations.

`python -m relloc.evaluate` does that for each model, and `python -m relloc.train` at its end. Both
append rows to `results.jsonl` in the run folder as each part is done, and measure nothing that
stands there already.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from relloc import ranks
from relloc.checkpoints.states import delete_state
from relloc.evaluation.contract import (
    EvalSettings,
    EvaluatedModel,
    LogCurves,
    NamedEvaluation,
    print_nothing,
)
from relloc.evaluation.run import EvalPart, evaluate, fingerprint, group_parts, split_evaluation
from relloc.files import write_json
from relloc.results import (
    Result,
    append_results,
    read_results,
    tracked_eval,
)
from relloc.runs import console
from relloc.runs.folder import RunFolder
from relloc.runs.reusing import (
    EvalRun,
    ResumableState,
    ReusableRows,
    measured_by_us,
    not_measured,
    raise_if_stopped,
    state_file,
)
from relloc.tracking.journal import Journal

# Beside the pictures and tables of an evaluation: whose weights they are of.
ABOUT_FILE = "about.json"
# While another run measures all that is missing: seconds until the next look for its results.
_LOOK_AGAIN_S = 1.0


def evaluate_model(
    model: EvaluatedModel,
    evaluations: Sequence[NamedEvaluation],
    settings: EvalSettings,
    run: EvalRun,
) -> set[str]:
    """Runs the evaluations that are not measured yet, and saves each part's rows when it is done.

    A part is what can be measured by itself, such as one layer of an evaluation under one batch
    norm. All ranks call this together. After a signal the process exits with the signal's exit
    code, once finished parts are saved.

    Returns:
        The fingerprints of all rows about the model, newly measured or not.
    """
    folder = run.folder
    run_dir = run.run_dir
    # Images that can't be read are collected in the folder, which names them at the end.
    unreadable = folder.unreadable if folder else {}
    encode_config = dataclasses.replace(settings.encode_config, note_unreadable=unreadable.update)
    settings = dataclasses.replace(settings, encode_config=encode_config)
    model.backbone.eval()
    evaluations = _answerable(model, evaluations, folder)
    if not evaluations:
        return set()

    # Split each evaluation into parts, one batch norm after the other.
    parts_by_evaluation = [
        split_evaluation(named, batch_norm, model, settings)
        for batch_norm in _all_batch_norms(evaluations, settings)
        for named in evaluations
    ]
    parts = list(itertools.chain(*parts_by_evaluation))
    if folder:
        names = ", ".join(named.name for named in evaluations)
        of_model = f" ({model.model})" if model.model else ""
        console.print_message(f"eval    {names} of {model.checkpoint}{of_model}")

    # Parts of a group share one pass of the images through the backbone.
    rows = ReusableRows(parts, run)
    waiting = group_parts(parts)
    is_told = False
    while waiting:
        taken = [
            group
            for group in waiting
            if not _measure_group(group, model, settings, run, rows, unreadable)
        ]
        # Another run may measure the same: then the others come first, and its results are awaited.
        if taken == waiting:
            if folder and not is_told:
                is_told = True
                awaited = dict.fromkeys(part.named.name for group in taken for part in group)
                console.print_message(
                    f"waits   for {', '.join(awaited)} of the same weights, which another run "
                    "measures; reuse=false measures them here too"
                )
            time.sleep(_LOOK_AGAIN_S)
        waiting = taken

    fingerprints = {part.fingerprint for part in parts}
    if folder:
        fingerprints |= _summarize(model, parts_by_evaluation, settings, run_dir)
    return fingerprints


def _measure_group(
    group: Sequence[EvalPart],
    model: EvaluatedModel,
    settings: EvalSettings,
    run: EvalRun,
    rows: ReusableRows,
    unreadable: dict[str, str],
) -> bool:
    """Measures what a group of parts lacks, unless another run is measuring the group now.

    Images that can't be read are noted in `unreadable`, which on rank 0 is that of the run folder.

    Returns:
        False in that case.
    """
    folder = run.folder
    # Rank 0 looks into the run folders and tells the others which parts are missing.
    with contextlib.ExitStack() as at_end:
        missing: list[int] = []
        is_ours = True
        if folder and not_measured(group, model, rows):
            is_ours = at_end.enter_context(measured_by_us(group, run))
            # Another run may have ended between the look and the lock.
            still = not_measured(group, model, rows) if is_ours else []
            missing = [group.index(part) for part in still]
        is_ours, missing = ranks.from_first((is_ours, missing))
        if not is_ours:
            raise_if_stopped(run.stop)
            return False
        if not missing:
            return True
        measured = evaluate(
            model,
            [group[index] for index in missing],
            settings,
            run_dir=run.run_dir,
            open_state=functools.partial(ResumableState, run),
            log_of=functools.partial(_log_of, model, settings, folder),
            # Only the process with the run folder prints.
            print_line=console.print_message if folder else print_nothing,
        )
        for part, results in measured:
            # Each process has met other images.
            unreadable.update(ranks.union(unreadable))
            if folder:
                # Before the rows are there: other runs that wait must not take them.
                folder.write_unreadable()
                _save_part(part, results, model, folder)
            # Between two parts nothing is lost by stopping.
            raise_if_stopped(run.stop)
    return True


def _all_batch_norms(evaluations: Sequence[NamedEvaluation], settings: EvalSettings) -> list[str]:
    """Returns the batch norms of the run, and then those that evaluations have beside them."""
    batch_norms = list(settings.batch_norms)
    for named in evaluations:
        batch_norms += named.evaluation.batch_norms(settings.batch_norms)
    return list(dict.fromkeys(batch_norms))


def _log_of(
    model: EvaluatedModel, settings: EvalSettings, folder: RunFolder | None, part: EvalPart
) -> LogCurves:
    """Returns the function that writes curves of a part into the journal of the run folder.

    Their names begin as those of the part's results do in a tracker. Processes without the run
    folder write nothing.
    """
    config = part.named.encode_config(settings.encode_config)
    prefix = tracked_eval(
        part.named.name, model.checkpoint, part.batch_norm, model.strides, config.decoder
    )
    journal = Journal(folder.path) if folder else None

    def log(numbers: Mapping[str, float], step: int) -> None:
        if journal is not None:
            named = {f"{prefix}/{name}": value for name, value in numbers.items()}
            journal.log(named, step)

    return log


def _save_part(
    part: EvalPart, rows: Sequence[Result], model: EvaluatedModel, folder: RunFolder
) -> None:
    """Saves and prints the rows of a finished part, and tracks the files that it wrote."""
    append_results(folder.path, rows)
    console.print_measured(rows)
    part_folder = folder.path / part.folder
    # Most evaluations write no files and so have no folder.
    if part_folder.is_dir():
        _write_about(part, rows, model, part_folder / ABOUT_FILE)
    written = [path for path in part_folder.rglob("*") if path.is_file()]
    for file in sorted(written):
        folder.mirror_file(str(file.relative_to(folder.path)))
    # The rows are on disk, so nothing has to be resumed any more.
    delete_state(state_file(folder.path, part.fingerprint))


def _write_about(part: EvalPart, rows: Sequence[Result], model: EvaluatedModel, path: Path) -> None:
    """Writes whose weights the other files of the folder are of, and of which images.

    The name of the folder has the fingerprint alone, from which nobody can tell.
    """
    images = [f"{row.dataset} {row.split}" for row in rows]
    layers = [row.layer for row in rows if row.layer]
    about = {
        "evaluation": part.named.name,
        "checkpoint": model.checkpoint,
        "model": model.model,
        "weights": model.weights,
        "batch_norm": part.batch_norm,
        "images": list(dict.fromkeys(images)),
        "layers": list(dict.fromkeys(layers)),
        "seeds": sorted({row.seed for row in rows}),
        "fingerprint": part.fingerprint,
    }
    # Names of data sets may have bytes that are no UTF-8.
    write_json(path, about, errors="surrogateescape")


def _summarize(
    model: EvaluatedModel,
    parts_by_evaluation: Sequence[Sequence[EvalPart]],
    settings: EvalSettings,
    run_dir: Path,
) -> set[str]:
    """Saves rows about an evaluation as a whole, such as its best layer, unless they are there.

    Args:
        parts_by_evaluation: the parts of each evaluation under each batch norm.

    Returns:
        The fingerprints of these rows.
    """
    measured = [row for row in read_results(run_dir) if row.checkpoint == model.checkpoint]
    measured_keys = {(row.eval, row.fingerprint) for row in measured}
    fingerprints = set()
    for parts in parts_by_evaluation:
        if not parts:
            continue
        named = parts[0].named
        batch_norm = parts[0].batch_norm
        part_keys = {(named.name, part.fingerprint) for part in parts}
        part_rows = [row for row in measured if (row.eval, row.fingerprint) in part_keys]
        summary = list(named.evaluation.summary(part_rows))
        if not summary:
            continue
        # The fingerprint of the whole evaluation, in place of that of one part.
        whole = fingerprint(named.evaluation, model, named.splits, settings, batch_norm)
        if (named.name, whole) not in measured_keys:
            rows = [dataclasses.replace(row, fingerprint=whole) for row in summary]
            append_results(run_dir, rows)
        fingerprints.add(whole)
    return fingerprints


def _answerable(
    model: EvaluatedModel, evaluations: Sequence[NamedEvaluation], folder: RunFolder | None
) -> list[NamedEvaluation]:
    """Returns the evaluations that can be measured of the model, and prints which can't."""
    answerable = []
    for named in evaluations:
        if model.pretext or not named.evaluation.needs_pretext:
            answerable.append(named)
        elif folder:
            console.print_message(
                f"skipped {named.name} of {model.checkpoint}: it has no head that answers with one "
                "of eight positions. Only a run folder with the training's checkpoints has one, "
                "unless it was trained with rotation=, pairs=triplets or pretext_answers=regression"
            )
    return answerable
