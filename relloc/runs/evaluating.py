"""Evaluating backbones, one after the other: what relloc.evaluate does, and the end of relloc.train."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from relloc import ranks
from relloc.checkpoints.states import delete_state
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.evaluation.contract import EvalSettings, EvaluatedModel, NamedEvaluation
from relloc.evaluation.run import EvalPart, evaluate, fingerprint, group_parts, split_evaluation
from relloc.pretext.stopping import stop_request
from relloc.results import RESULTS_FILE, append_results, read_results
from relloc.runs import console
from relloc.runs import known_answers as known
from relloc.runs.build import Evaluating
from relloc.runs.engine import settle
from relloc.runs.evaluated_models import evaluated_models
from relloc.runs.folder import check_files, open_folder, own_folder
from relloc.runs.invocation import Invocation
from relloc.runs.naming import evaluation_name
from relloc.runs.reusing import EvalRun, ResumableState, not_measured, raise_if_stopped, state_file


def evaluate_checkpoint(asked: Evaluating, invocation: Invocation) -> None:
    """Run the evaluations that are asked for on the backbones that are."""
    engine = settle(asked.engine)
    models = evaluated_models(asked)
    subjects = [(model.checkpoint, model.model) for model in models]
    answers = known.asked(subjects, [one.name for one in asked.evaluations], asked.batch_norms)
    if asked.verdict and not answers:
        raise UsageError(
            "verdict=true, but nothing measured here has a published answer: it takes a ResNet-50, random or "
            "torchvision's, with batch norm as trained, and an evaluation of ImageNet, Places205 or VOC2007"
        )
    with contextlib.ExitStack() as at_end:
        ranks.join(engine.device)
        at_end.callback(ranks.leave)
        stop = at_end.enter_context(stop_request())
        run_dir = at_end.enter_context(own_folder(invocation.folder))
        check_files(run_dir)
        own = asked.data.read() if asked.needs_own_data else None
        evaluations = asked.named_evaluations(own)
        alone = [named.name for named in evaluations if not named.evaluation.across_ranks]
        if ranks.world_size() > 1 and alone:
            raise UsageError(
                f"eval={','.join(alone)} runs in one process, which takes one GPU: leave torchrun out, or name "
                "only evaluations that divide their work, as nearest neighbors and fine-tuning do"
            )
        for named in evaluations:
            named.check_images()
        folder = None
        if ranks.rank() == 0:
            data = [named.splits for named in evaluations]
            names = [
                asked.data.short_name if splits is own else splits.train.name for splits in data
            ]
            record = invocation.record(evaluation_name(models, names), data, engine)
            folder = at_end.enter_context(open_folder(invocation, record, run_dir))
            at_end.enter_context(stop.reraised())
        run = EvalRun(
            run_dir=run_dir,
            folder=folder,
            stop=stop,
            save_every_s=asked.save_every_s,
            reused_runs=asked.reused_runs,
        )
        settings = asked.eval_settings(engine)
        fingerprints: set[str] = set()
        for model in models:
            engine.place(model.backbone)
            fingerprints |= evaluate_model(model, evaluations, settings, run)
            model.backbone.cpu()
        if folder is None:
            return
        folder.summarize(fingerprints)  # the folder may hold rows of another command
    if asked.verdict:
        report_known_answers(run_dir, answers, fingerprints)
    console.say_next("report", console.from_here(run_dir))


def report_known_answers(
    run_dir: Path, answers: Sequence[known.KnownAnswer], fingerprints: Collection[str]
) -> None:
    """Say of each of the answers whether it came out in the rows with these fingerprints.

    Raises:
        KnownAnswerMissed: one did not, or could not be checked.
    """
    rows = [row for row in read_results(run_dir) if row.fingerprint in fingerprints]
    verdicts, unchecked = known.check(rows, answers), known.unchecked(rows, answers)
    console.say(*map(str, verdicts), *(f"not checked: {missing}" for missing in unchecked))
    failed = sum(not verdict.passed for verdict in verdicts)
    counts = {"are outside their tolerance": failed, "could not be checked": len(unchecked)}
    if wrong := [f"{count} {what}" for what, count in counts.items() if count]:
        raise KnownAnswerMissed(
            f"of {len(answers)} known answers {' and '.join(wrong)}: check the data sets with "
            f"python -m relloc.prepare, and what {run_dir / RESULTS_FILE} says of the protocol"
        )


def evaluate_model(
    model: EvaluatedModel,
    evaluations: Sequence[NamedEvaluation],
    settings: EvalSettings,
    run: EvalRun,
) -> set[str]:
    """Measure what is not measured yet, and write each part's rows as it is done. The fingerprints of all rows.

    All ranks call it together. Where the run was asked to stop, the process leaves with the signal's exit
    code, once what is finished is saved.
    """
    folder, run_dir = run.folder, run.run_dir
    unreadable = folder.unreadable if folder else {}
    encode_config = dataclasses.replace(settings.encode_config, note_unreadable=unreadable.update)
    settings = dataclasses.replace(settings, encode_config=encode_config)
    model.backbone.eval()
    of_evaluations = [
        split_evaluation(named, batch_norm, model, settings)
        for batch_norm in settings.batch_norms
        for named in evaluations
    ]
    parts = list(itertools.chain(*of_evaluations))
    wanted = []
    if folder:
        console.say(
            f"eval    {', '.join(named.name for named in evaluations)} of {model.checkpoint} ({model.model})"
        )
        wanted = not_measured(parts, model, run)
    wanted = [parts[number] for number in ranks.from_first(wanted)]
    open_state = functools.partial(ResumableState, run)
    for group in group_parts(wanted):
        for part, rows in evaluate(model, group, settings, run_dir=run_dir, open_state=open_state):
            if folder:
                append_results(run_dir, rows)
                console.say_measured(rows)
                for file in sorted(
                    path for path in (run_dir / part.folder).rglob("*") if path.is_file()
                ):
                    folder.keep(str(file.relative_to(run_dir)))
                delete_state(state_file(run_dir, part.fingerprint))
            raise_if_stopped(run.stop)
    unreadable.update(ranks.union(unreadable))
    summarized = _summarize(model, of_evaluations, settings, run_dir) if folder else set()
    return summarized | {part.fingerprint for part in parts}


def _summarize(
    model: EvaluatedModel,
    of_evaluations: Sequence[Sequence[EvalPart]],
    settings: EvalSettings,
    run_dir: Path,
) -> set[str]:
    """Write the rows about all layers of an evaluation together, unless they are there; their fingerprints.

    `of_evaluations` has the parts of each evaluation under each batch norm.
    """
    measured = [row for row in read_results(run_dir) if row.checkpoint == model.checkpoint]
    known = {(row.eval, row.fingerprint) for row in measured}
    fingerprints = set()
    for parts in filter(None, of_evaluations):
        named, batch_norm = parts[0].named, parts[0].batch_norm
        of_parts = {(named.name, part.fingerprint) for part in parts}
        summary = list(
            named.evaluation.summary(
                [row for row in measured if (row.eval, row.fingerprint) in of_parts]
            )
        )
        if summary:
            whole = fingerprint(named.evaluation, model, named.splits, settings, batch_norm)
            if (named.name, whole) not in known:
                append_results(
                    run_dir, [dataclasses.replace(row, fingerprint=whole) for row in summary]
                )
            fingerprints.add(whole)
    return fingerprints
