"""Evaluating backbones, one after the other: what relloc.evaluate does, and the end of relloc.train."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from relloc import checkpoints, ranks
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.evals.contract import Job, Subject, Summarizing, Terms
from relloc.evals.run import evaluate, fingerprint, works
from relloc.features.source import Forgetful
from relloc.pretext.stopping import stop_request
from relloc.reports import known
from relloc.results import RESULTS_FILE, Result, append_results, read_results
from relloc.runs import assemble, console
from relloc.runs.engine import Engine, settle
from relloc.runs.folder import RunFolder, open_folder
from relloc.runs.reusing import KeptState, KnownRows, state_file
from relloc.runs.subjects import subjects

_NO_ANSWER = (
    "verdict=true, but nothing measured here has a published answer: it takes a ResNet-50, random or torchvision's, "
    "with batch norm as trained, on all images of ImageNet or VOC2007"
)


def evaluate_checkpoint(config: DictConfig) -> None:
    """Run the evaluations that `eval` names on the backbones that `checkpoint` names."""
    engine = settle(config)
    assemble.check_numbers(config)
    assemble.check_roots(config)
    found = subjects(config)
    _check(config, found, assemble.terms(config, engine))
    with contextlib.ExitStack() as at_end:
        ranks.join(engine.device)
        at_end.callback(ranks.leave)
        at_end.enter_context(stop_request())
        terms = assemble.terms(config, engine)
        own = None if len(assemble.own_data(config)) == len(config.eval) else assemble.splits(config.data)
        jobs = assemble.jobs(config, own)
        _check_ranks(jobs)
        run_dir = assemble.run_dir()
        if ranks.rank() > 0:
            _follow(found, jobs, terms, engine)
            return
        data = [job.splits for job in jobs]
        name = f"{_names(found)} on {', '.join(dict.fromkeys(splits.train.name for splits in data))}"
        with open_folder(config, assemble.record(config, name, data, engine, run_dir), run_dir) as folder:
            marks: set[str] = set()
            for one in found:
                engine.place(one.backbone)
                marks |= evaluate_subject(one, jobs, terms, folder, config)
                one.backbone.cpu()
            folder.summarize(marks)  # the folder may hold rows of another command
    if config.verdict:
        tell_verdict(folder.path)


def _check(config: DictConfig, found: Sequence[Subject], terms: Terms) -> None:
    """Nothing to do, or nothing to hold it against, is told before anything is listed or measured."""
    if not assemble.evaluations(config):
        raise UsageError("eval=[] leaves nothing to do: name evaluations, such as eval=[linear_fast,knn]")
    names = [one.checkpoint for one in found]
    if config.verdict and not known.can_match(found[0].model, names, list(config.eval), terms.batch_norms):
        raise UsageError(_NO_ANSWER)


def _check_ranks(jobs: Sequence[Job]) -> None:
    alone = [job.name for job in jobs if not getattr(job.evaluation, "across_ranks", False)]
    if ranks.world_size() > 1 and alone:
        raise UsageError(
            f"eval={','.join(alone)} runs in one process, which takes one GPU: leave torchrun out, or name "
            "evaluations that divide their work, eval=[knn]"
        )


def _follow(found: Sequence[Subject], jobs: Sequence[Job], terms: Terms, engine: Engine) -> None:
    """What the other processes do: their share of the work, nothing of which they write or tell."""
    for one in found:
        engine.place(one.backbone)
        done = evaluate(
            one,
            jobs,
            terms,
            is_done=lambda *_which: bool(ranks.from_first("")),
            state=lambda _work: Forgetful(),
            unreadable=lambda _reasons: None,
        )
        for _rows in done:
            pass


def _names(subjects: Sequence[Subject]) -> str:
    return ", ".join(f"{one.model} {Path(one.checkpoint).parent.name or one.checkpoint}" for one in subjects)


def tell_verdict(run_dir: Path) -> None:
    """Say of each known answer whether it came out.

    Raises:
        UsageError: one did not, or nothing was measured that is known.
    """
    rows = read_results(run_dir)
    verdicts = known.check(rows)
    for verdict in verdicts:
        console.say(str(verdict))
    for missing in known.not_measured(rows):
        console.say(f"not measured: {missing}")
    failed = sum(not verdict.passed for verdict in verdicts)
    if not verdicts:
        raise UsageError(_NO_ANSWER)
    if failed:
        raise KnownAnswerMissed(
            f"{failed} of {len(verdicts)} known answers are outside their tolerance: check the data sets with "
            f"python -m relloc.prepare, and what {run_dir / RESULTS_FILE} says of the protocol"
        )


def evaluate_subject(
    subject: Subject, jobs: Sequence[Job], terms: Terms, folder: RunFolder, config: DictConfig
) -> set[str]:
    """Write the rows of every evaluation as they come; those there already are used again. The fingerprints of all."""
    marks: set[str] = set()
    rows_there = KnownRows(folder.path, Path(config.runs) if config.reuse else None)

    def is_done(name: str, batch_norm: str, mark: str) -> bool:
        marks.add(mark)
        return bool(ranks.from_first("yes" if rows_there.has(subject, name, batch_norm, mark) else ""))

    subject.backbone.eval()
    console.say(f"eval    {', '.join(job.name for job in jobs)} of {subject.checkpoint} ({subject.model})")
    rows_of_each = evaluate(
        subject,
        jobs,
        terms,
        is_done=is_done,
        state=lambda work: KeptState(state_file(folder.path, work.mark), config.save_every_s),
        unreadable=folder.note_unreadable,
    )
    for rows in rows_of_each:
        append_results(folder.path, rows)
        console.say_measured(rows)
        for mark in {row.fingerprint for row in rows}:
            checkpoints.delete_state(state_file(folder.path, mark))
    for job in jobs:
        said = _summary(subject, job, terms, rows_there)
        append_results(folder.path, said)
        marks |= {row.fingerprint for row in said}
    return marks


def _summary(subject: Subject, job: Job, terms: Terms, known_rows: KnownRows) -> list[Result]:
    """The rows that speak of all layers of an evaluation, such as its best; none where they are there."""
    said = []
    if isinstance(job.evaluation, Summarizing):
        for batch_norm in terms.batch_norms:
            mark = fingerprint(job.evaluation, subject, job.splits, terms, batch_norm)
            parts = {work.mark for work in works(job, batch_norm, subject, terms)}
            there = [row for row in known_rows.of(subject) if row.eval == job.name]
            if not any(row.fingerprint == mark for row in there):
                rows = job.evaluation.summary([row for row in there if row.fingerprint in parts])
                said += [dataclasses.replace(row, fingerprint=mark) for row in rows]
    return said
