"""Evaluates backbones, one after the other.

`python -m relloc.evaluate` runs `evaluate_checkpoint`. `relloc.runs.measuring` measures each.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from relloc import ranks
from relloc.data.processes import without_named_progress
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.evaluation.contract import (
    EvalSettings,
    EvaluatedModel,
    NamedEvaluation,
)
from relloc.evaluation.strides import by_strides
from relloc.features.source import EncodeConfig
from relloc.pretext.stopping import stop_request
from relloc.reports.load import find_measured
from relloc.reports.render import as_markdown
from relloc.reports.table import make_report
from relloc.results import (
    NO_FILES,
    RESULTS_FILE,
    read_results,
)
from relloc.runs import console, known_answers
from relloc.runs.command_settings import Evaluating
from relloc.runs.data_sets import DATA_PAGE
from relloc.runs.engine import Engine, resolve_engine
from relloc.runs.evaluated_models import evaluated_models, files_of_sweep
from relloc.runs.folder import check_files, lock_folder, open_folder
from relloc.runs.invocation import Invocation
from relloc.runs.measuring import evaluate_model
from relloc.runs.naming import evaluation_name
from relloc.runs.reusing import (
    EvalRun,
)
from relloc.runs.run_settings import ChosenEvaluation
from relloc.terminal import quantity


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
