"""Evaluating backbones, one after the other: what relloc.evaluate does, and the end of relloc.train."""

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from omegaconf import DictConfig

from relloc import ranks
from relloc.checkpoints import states
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.evaluation.contract import EvalSettings, EvaluatedModel, Job, Summarizing, check_images
from relloc.evaluation.run import Work, evaluate, fingerprint, works
from relloc.features.source import NullState
from relloc.pretext.stopping import StopRequest, stop_request
from relloc.reports import known
from relloc.results import RESULTS_FILE, append_results, read_results
from relloc.runs import assemble, checking, console
from relloc.runs.engine import Engine, settle
from relloc.runs.folder import RunFolder, check_files, open_folder, own_folder
from relloc.runs.naming import data_name, evaluation_name
from relloc.runs.reusing import KnownRows, ResumableState, obey, state_file
from relloc.runs.subjects import subjects

_NO_ANSWER = (
    "verdict=true, but nothing measured here has a published answer: it takes a ResNet-50, random or torchvision's, "
    "with batch norm as trained, and an evaluation of ImageNet, Places205 or VOC2007"
)


def evaluate_checkpoint(config: DictConfig) -> None:
    """Run the evaluations that `eval` names on the backbones that `checkpoint` names."""
    engine = settle(config)
    checking.check_numbers(config)
    checking.check_tracking(config)
    checking.check_roots(config)
    found = subjects(config)
    answers = _answers(config, found, assemble.terms(config, engine))
    with contextlib.ExitStack() as at_end:
        ranks.join(engine.device)
        at_end.callback(ranks.leave)
        stop = at_end.enter_context(stop_request())
        run_dir = at_end.enter_context(own_folder())
        check_files(run_dir)
        terms = assemble.terms(config, engine)
        own = None if len(assemble.own_data(config)) == len(config.eval) else assemble.splits(config.data)
        jobs = assemble.jobs(config, own)
        _check_ranks(jobs)
        for job in jobs:
            check_images(job)
        if ranks.rank() > 0:
            _follow(found, jobs, terms, engine)
            return
        data = [job.splits for job in jobs]
        names = [data_name(config.data) if splits is own else splits.train.name for splits in data]
        name = evaluation_name(found, names)
        record = assemble.record(config, name, data, engine, run_dir)
        with open_folder(config, record, run_dir) as folder, stop.prevailing():
            marks: set[str] = set()
            for one in found:
                engine.place(one.backbone)
                marks |= evaluate_subject(one, jobs, terms, folder, config, stop)
                one.backbone.cpu()
            folder.summarize(marks)  # the folder may hold rows of another command
    if config.verdict:
        tell_verdict(folder.path, answers, marks)
    console.say_next("report", console.from_here(run_dir))


def _answers(config: DictConfig, found: Sequence[EvaluatedModel], terms: EvalSettings) -> list[known.KnownAnswer]:
    """What is known of the numbers to come. Nothing to do, or nothing known, is told before anything is measured."""
    checking.check_has_evaluations(config)
    who = [(one.checkpoint, one.model) for one in found]
    answers = known.asked(who, list(config.eval), terms.batch_norms)
    if config.verdict and not answers:
        raise UsageError(_NO_ANSWER)
    return answers


def _check_ranks(jobs: Sequence[Job]) -> None:
    alone = [job.name for job in jobs if not getattr(job.evaluation, "across_ranks", False)]
    if ranks.world_size() > 1 and alone:
        raise UsageError(
            f"eval={','.join(alone)} runs in one process, which takes one GPU: leave torchrun out, or name "
            "evaluations that divide their work, eval=[knn]"
        )


def _follow(found: Sequence[EvaluatedModel], jobs: Sequence[Job], terms: EvalSettings, engine: Engine) -> None:
    """What the other processes do: their share of the work. They write and tell nothing but to the first."""
    for one in found:
        engine.place(one.backbone)
        reasons: dict[str, str] = {}
        done = evaluate(
            one,
            jobs,
            terms,
            is_done=lambda *_which: bool(ranks.from_first("")),
            state=lambda _work: NullState(),
            unreadable=reasons.update,
        )
        for _rows in done:
            pass
        ranks.union(reasons)


def tell_verdict(run_dir: Path, answers: Sequence[known.KnownAnswer], marks: Collection[str]) -> None:
    """Say of each of the answers whether it came out in the rows with these fingerprints.

    Raises:
        KnownAnswerMissed: one did not, or could not be checked.
    """
    rows = [row for row in read_results(run_dir) if row.fingerprint in marks]
    verdicts, unchecked = known.check(rows, answers), known.unchecked(rows, answers)
    for verdict in verdicts:
        console.say(str(verdict))
    for missing in unchecked:
        console.say(f"not checked: {missing}")
    failed = sum(not verdict.passed for verdict in verdicts)
    wrong = [f"{failed} are outside their tolerance"] * bool(failed)
    wrong += [f"{len(unchecked)} could not be checked"] * bool(unchecked)
    if wrong:
        raise KnownAnswerMissed(
            f"of {len(answers)} known answers {' and '.join(wrong)}: check the data sets with "
            f"python -m relloc.prepare, and what {run_dir / RESULTS_FILE} says of the protocol"
        )


def evaluate_subject(
    subject: EvaluatedModel,
    jobs: Sequence[Job],
    terms: EvalSettings,
    folder: RunFolder,
    config: DictConfig,
    stop: StopRequest,
) -> set[str]:
    """Write the rows of every evaluation as they come; those there already are used again. The fingerprints of all.

    Where it was asked to stop, the process leaves with the signal's exit code, once what is finished is saved.
    """
    marks: set[str] = set()
    runs = Path(config.runs) if config.reuse else None
    rows_there = KnownRows(folder.path, runs)

    def is_done(name: str, batch_norm: str, mark: str) -> bool:
        marks.add(mark)
        there = rows_there.has(subject, name, batch_norm, mark)
        if there:  # another run may have finished what this one began
            states.delete_state(state_file(folder.path, mark))
        return bool(ranks.from_first("yes" if there else ""))

    def state(work: Work) -> ResumableState:
        return ResumableState(folder.path, work.mark, every_s=config.save_every_s, stop=stop, runs=runs)

    subject.backbone.eval()
    console.say(f"eval    {', '.join(job.name for job in jobs)} of {subject.checkpoint} ({subject.model})")
    rows_of_each = evaluate(
        subject,
        jobs,
        terms,
        is_done=is_done,
        state=state,
        unreadable=folder.note_unreadable,
    )
    for rows in rows_of_each:
        append_results(folder.path, rows)
        console.say_measured(rows)
        for mark in {row.fingerprint for row in rows}:
            states.delete_state(state_file(folder.path, mark))
        stop.listen(awaited=False)
        obey(stop)
    folder.note_unreadable(ranks.union(folder.unreadable))
    for job in jobs:
        marks |= _summarize(subject, job, terms, rows_there)
    return marks


def _summarize(subject: EvaluatedModel, job: Job, terms: EvalSettings, known_rows: KnownRows) -> set[str]:
    """Write the rows that speak of all layers of an evaluation, unless they are there; their fingerprints."""
    marks = set()
    if isinstance(job.evaluation, Summarizing):
        for batch_norm in terms.batch_norms:
            mark = fingerprint(job.evaluation, subject, job.splits, terms, batch_norm)
            parts = {work.mark for work in works(job, batch_norm, subject, terms)}
            there = [row for row in known_rows.of(subject) if row.eval == job.name]
            if not any(row.fingerprint == mark for row in there):
                rows = job.evaluation.summary([row for row in there if row.fingerprint in parts])
                append_results(known_rows.run_dir, [dataclasses.replace(row, fingerprint=mark) for row in rows])
            marks.add(mark)
    return marks
