"""Evaluates backbones, one after the other.

`python -m relloc.evaluate` runs `evaluate_checkpoint`; `python -m relloc.train` ends with
`evaluate_model`. Both append rows to `results.jsonl` in the run folder as each part is done, and
measure nothing that stands there already.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from relloc import ranks
from relloc.checkpoints.states import delete_state
from relloc.data.processes import without_named_progress
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.evaluation.contract import (
    EvalSettings,
    EvaluatedModel,
    LogCurves,
    NamedEvaluation,
    print_nothing,
)
from relloc.evaluation.run import EvalPart, evaluate, fingerprint, group_parts, split_evaluation
from relloc.evaluation.strides import by_strides
from relloc.features.source import EncodeConfig
from relloc.files import write_json
from relloc.pretext.stopping import stop_request
from relloc.reports.load import find_measured
from relloc.reports.render import as_markdown
from relloc.reports.table import make_report
from relloc.results import (
    NO_FILES,
    RESULTS_FILE,
    Result,
    append_results,
    read_results,
    tracked_eval,
)
from relloc.runs import console, known_answers
from relloc.runs.command_settings import Evaluating
from relloc.runs.data_sets import DATA_PAGE
from relloc.runs.engine import Engine, resolve_engine
from relloc.runs.evaluated_models import evaluated_models, files_of_sweep
from relloc.runs.folder import RunFolder, check_files, lock_folder, open_folder
from relloc.runs.invocation import Invocation
from relloc.runs.naming import evaluation_name
from relloc.runs.reusing import (
    EvalRun,
    ResumableState,
    ReusableRows,
    measured_by_us,
    not_measured,
    raise_if_stopped,
    state_file,
)
from relloc.runs.run_settings import ChosenEvaluation
from relloc.terminal import quantity
from relloc.tracking.journal import Journal

# Beside the pictures and tables of an evaluation: whose weights they are of.
ABOUT_FILE = "about.json"
# While another run measures all that is missing: seconds until the next look for its results.
_LOOK_AGAIN_S = 1.0


def evaluate_checkpoint(settings: Evaluating, invocation: Invocation) -> None:
    """Runs each evaluation of the settings on each backbone that `checkpoint=` names.

    Raises:
        UsageError: a setting can't be met, or the folder is not that of such a run.
        KnownAnswerMissed: with `verdict=true`, a result is not as published.
        DataError: images or labels can't be used.
        CheckpointError: weights are missing, damaged, or do not fit.
    """
    engine = resolve_engine(settings.engine)
    models = evaluated_models(settings)
    _refuse_all_without_head(models, settings.evaluations)
    check_networks(models, settings)
    backbones = [(model.checkpoint, model.model) for model in models]
    names = [named.name for named in settings.evaluations]
    answers = known_answers.applicable(backbones, names, settings.batch_norms)
    # Known beforehand: an hour of evaluations without any verdict is spared.
    if settings.verdict and not answers:
        raise UsageError(
            "verdict=true, but nothing measured here has a published answer: it takes a "
            "ResNet-50, random or torchvision's, with batch norm as trained, and an evaluation of "
            "ImageNet, Places205 or VOC2007"
        )

    def name_of(data_names: Sequence[str], studies: Sequence[str]) -> str:
        return evaluation_name(models, data_names, studies)

    with prepared(settings, invocation, engine, name_of) as ready:
        fingerprints: set[str] = set()
        for model in models:
            fingerprints |= ready.measure(model)
        if ready.run.folder is None:
            return
        # The folder may also hold rows of other commands, which are not shown.
        ready.run.folder.summarize(fingerprints)
    run_dir = ready.run.run_dir
    if settings.report:
        print_report(run_dir)
        # After hours of evaluations, what was said at the start is far above.
        print_left_out(ready.left_out)
    if settings.verdict:
        report_known_answers(run_dir, answers, fingerprints)
    if settings.report:
        console.print_next("report", console.from_here(run_dir), "--out", "report.html")
    elif fingerprints:
        console.print_next("report", console.from_here(run_dir))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadyEvaluations:
    """Evaluations whose images have been checked, and the open run that they are part of.

    `left_out` has the reasons why others are not among them, by name.
    """

    evaluations: Sequence[NamedEvaluation]
    settings: EvalSettings
    strides: Sequence[str]
    run: EvalRun
    engine: Engine
    left_out: Mapping[str, str]

    def measure(self, model: EvaluatedModel) -> set[str]:
        """Runs `evaluate_model` in each of the strides, with the networks on the device."""
        fingerprints = set()
        for variant, looking in by_strides([model], self.evaluations, self.strides):
            with _placed(variant, self.engine):
                fingerprints |= evaluate_model(variant, looking, self.settings, self.run)
        return fingerprints


@contextlib.contextmanager
def prepared(
    settings: Evaluating,
    invocation: Invocation,
    engine: Engine,
    name_of: Callable[[Sequence[str], Sequence[str]], str],
) -> Iterator[ReadyEvaluations]:
    """Checks the images of all evaluations, and has the run folder open within the block.

    `name_of` returns the name of the run, given the names of data sets and of studies. All ranks
    call this together.
    """
    # Files and processes are left in the reverse order, however the block ends.
    with contextlib.ExitStack() as at_end:
        ranks.join(engine.device)
        at_end.callback(ranks.leave)
        stop = at_end.enter_context(stop_request())
        run_dir = at_end.enter_context(lock_folder(invocation.folder))
        check_files(run_dir)
        # Most evaluations bring their data set; the others use the one that data= names.
        shared_data = settings.data.read() if settings.needs_own_data else None
        evaluations, left_out = settings.named_evaluations(shared_data)
        print_left_out(left_out)
        _refuse_several_processes(evaluations)
        # Missing data of the last evaluation is an error before the first is run.
        check_images(evaluations, settings.encode_config(engine))
        folder = None
        if ranks.rank() == 0:
            # Only the first process records the run, follows it in MLflow and prints.
            data = [named.splits for named in evaluations]
            data_names = [
                settings.data.short_name if splits is shared_data else splits.train.name
                for splits in data
            ]
            studies = [chosen.name for chosen in settings.evaluations if chosen.group == "study"]
            record = invocation.record(name_of(data_names, studies), data, engine)
            folder = at_end.enter_context(open_folder(invocation, record, run_dir))
            at_end.enter_context(stop.reraised())
        run = EvalRun(
            run_dir=run_dir,
            folder=folder,
            stop=stop,
            save_every_s=settings.save_every_s,
            reused_runs=settings.reused_runs,
        )
        yield ReadyEvaluations(
            evaluations=evaluations,
            settings=settings.eval_settings(engine),
            strides=settings.strides,
            run=run,
            engine=engine,
            left_out=left_out,
        )


def check_images(evaluations: Iterable[NamedEvaluation], config: EncodeConfig) -> None:
    """Checks before any computation that evaluations can work on their images.

    Raises:
        UsageError, DataError: they can't, or too many files are missing or cut off.
    """
    # Several processes would draw their bars over each other.
    progress = without_named_progress if ranks.rank() else console.progress_if_long
    for named in evaluations:
        named.check_images()
        named.check_files(config, progress)


@contextlib.contextmanager
def _placed(model: EvaluatedModel, engine: Engine) -> Iterator[None]:
    """Has the model's networks on the device within the block.

    One model at a time is there, which leaves the memory of the device to features.
    """
    networks: list[nn.Module] = [model.backbone]
    if model.pretext:
        networks.append(model.pretext.network)
    for network in networks:
        engine.place(network)
    yield
    for network in networks:
        network.cpu()


def print_left_out(reasons: Mapping[str, str]) -> None:
    """Prints on rank 0 which evaluations have no data set, and what to do about it.

    `reasons` has what is missing, by the name of the evaluation.
    """
    if not reasons or ranks.rank() > 0:
        return
    for name, reason in reasons.items():
        console.print_message(f"skipped {name}: {reason}")
    console.print_message(
        f"        {DATA_PAGE}, tells what to unpack where. The same command then measures the rest"
    )


def print_report(run_dir: Path) -> None:
    """Prints the report of a run folder, as `python -m relloc.report` does."""
    print(as_markdown(make_report(find_measured([run_dir]), "card")), end="")


def _refuse_all_without_head(
    models: Sequence[EvaluatedModel], evaluations: Sequence[ChosenEvaluation]
) -> None:
    """Raises `UsageError` where an evaluation asks the pretext head and no weights have one."""
    if any(model.pretext for model in models):
        return
    # Random weights beside run folders are left out, also where each is a point of a sweep.
    if files_of_sweep() and all(model.checkpoint in NO_FILES for model in models):
        return
    checkpoints = ",".join(model.checkpoint for model in models)
    for chosen in evaluations:
        if chosen.evaluation.needs_pretext:
            raise UsageError(
                f"{chosen.group}.{chosen.name} asks the network of the pretext task, and "
                f"checkpoint={checkpoints} has no head that answers with one of eight positions: "
                "give a run folder of relloc.train with its checkpoints, checkpoint=RUN_FOLDER; "
                "trainings with rotation=, pairs=triplets or pretext_answers=regression have none"
            )


def check_networks(models: Sequence[EvaluatedModel], settings: Evaluating) -> None:
    """Raises `UsageError` where an evaluation can't work on one of the networks."""
    for model, evaluations in by_strides(models, settings.evaluations, settings.strides):
        for chosen in evaluations:
            chosen.evaluation.check_network(model.backbone.eval())


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


def _refuse_several_processes(evaluations: Sequence[NamedEvaluation]) -> None:
    """Raises `UsageError` where several processes would run an evaluation meant for one."""
    single = [named.name for named in evaluations if not named.evaluation.across_ranks]
    if ranks.world_size() > 1 and single:
        raise UsageError(
            f"{','.join(single)} runs in one process, which takes one GPU: leave torchrun "
            "out, or name only evaluations that divide their work, as nearest neighbors and "
            "fine-tuning do"
        )


def report_known_answers(
    run_dir: Path,
    answers: Sequence[known_answers.KnownAnswer],
    fingerprints: Collection[str],
) -> None:
    """Prints for each known answer whether the rows with these fingerprints agree with it.

    Raises:
        KnownAnswerMissed: a row disagrees, or an answer could not be checked.
    """
    # The run folder may hold rows of earlier commands with other settings.
    rows = [row for row in read_results(run_dir) if row.fingerprint in fingerprints]
    verdicts = known_answers.check(rows, answers)
    unchecked = known_answers.unchecked(rows, answers)
    for verdict in verdicts:
        console.print_message(str(verdict))
    for missing in unchecked:
        console.print_message(f"not checked: {missing}")

    problems = []
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        problems.append(
            quantity(len(failed), "is outside its tolerance", "are outside their tolerance")
        )
    if unchecked:
        problems.append(f"{len(unchecked)} could not be checked")
    if problems:
        raise KnownAnswerMissed(
            f"of {len(answers)} known answers {' and '.join(problems)}: check the data sets with "
            f"python -m relloc.prepare, and what {run_dir / RESULTS_FILE} says of the protocol"
        )


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
