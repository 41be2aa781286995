"""Says in notes how numbers of a report were measured, and where they come from."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from relloc.reports.compare import MARK_WORDS, ReportEntry
from relloc.reports.lines import image_words
from relloc.results import Result, folder_of_files, known_interval


def note(entries: Sequence[ReportEntry]) -> str:
    """Returns the note on several numbers: their runs, seeds, commits and shared facts.

    An ellipsis stands for facts that hold for some of the numbers only.
    """
    shared_facts, has_more = _shared_facts(entries)
    phrases = [*_origins(entries), *shared_facts]
    if has_more:
        phrases.append("…")
    return "; ".join([*phrases, *_layer_reasons(entries)])


def row_notes(
    in_row: Sequence[ReportEntry],
    same_label: Sequence[ReportEntry],
    shared_images: Collection[str],
) -> tuple[str, ...]:
    """Returns the notes of a row outside of the card: what holds for its line, then for it alone.

    An ellipsis stands for facts that hold for some of the row's numbers only.

    Args:
        in_row: The numbers of the row.
        same_label: Those of all rows of its line.
        shared_images: The words on images that a study's table has said.
    """
    facts_of_line, _ = _shared_facts(same_label)
    facts_of_row, has_more = _shared_facts(in_row)
    of_row = [fact for fact in facts_of_row if fact not in facts_of_line]
    images_of_row = shared_texts([own_images(entry, shared_images) for entry in in_row])
    # The view is both a fact and a word on images
    of_row += [word for word in images_of_row if word not in (*facts_of_line, *of_row)]
    of_line = [*_origins(same_label), *facts_of_line]
    if has_more:
        (of_row or of_line).append("…")
    of_line += _layer_reasons(same_label)
    of_line += _files(same_label)
    notes = ["; ".join(of_line), "; ".join(of_row)]
    return tuple(filter(None, notes))


def details(entry: ReportEntry) -> Iterable[str]:
    """Yields the lines that say all that is known of one of our numbers."""
    row = entry.result
    run = entry.measured.run
    # Where it comes from, and how it was measured.
    yield f"run {run.name} ({run.folder})"
    yield f"seed {row.seed}, commit {run.commit}"
    yield from facts(row)
    metric = row.metric if row.unit == "%" else f"{row.metric} in {row.unit}"
    phrases = (
        f"{row.dataset} {row.split}",
        f"n = {row.n:,}",
        row.layer,
        metric,
    )
    yield ", ".join(filter(None, phrases))
    if entry.measured.digest:
        yield f"images {entry.measured.digest}"
    # How certain it is
    if interval := known_interval(row.low, row.high, row.unit):
        low, high = interval
        yield f"95 % interval {low:.2f} to {high:.2f}"
    for name, value in entry.spread.items():
        yield f"{name} over draws: {value:.2f}"
    if entry.layer_reason:
        yield entry.layer_reason
    # How it compares with the published number, and with earlier measurements of ours
    if entry.mark:
        printed = " / ".join(each.printed for each in entry.compared_with)
        first = entry.compared_with[0]
        word = MARK_WORDS[entry.mark]
        yield f"{word}: {first.row} {printed}, tolerance {first.tolerance:g}"
    for old in entry.measured.older:
        yield f"replaces {old.result.value:.2f} of run {old.run.name}"


def facts(row: Result) -> list[str]:
    """Returns phrases on how a number was measured, such as its protocol, view and precision."""
    phrases = []
    if row.protocol:
        phrases.append(f"protocol {row.protocol}")
    phrases += [row.choice, *row.details]
    for deviation in row.deviations:
        phrases.append(f"deviation: {deviation}")
    phrases += [row.view, row.precision]
    # Facts that are not given are empty texts
    return [phrase for phrase in phrases if phrase]


def short_commit(commit: str) -> str:
    """Returns ten digits of a commit, with the "-dirty" of changed files where it has one."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit)


def is_of_study(entry: ReportEntry) -> bool:
    return entry.result.kind == "study"


def own_images(entry: ReportEntry, shared_images: Collection[str]) -> list[str]:
    """Returns the words on the images of a study's number that not all of its table share."""
    if not is_of_study(entry):
        return []
    return [word for word in image_words(entry.measured) if word not in shared_images]


def shared_texts(texts_of_each: Sequence[Sequence[str]]) -> list[str]:
    """Returns the texts that are in all lists, in the order of the first."""
    first = texts_of_each[0]
    return [text for text in first if all(text in others for others in texts_of_each)]


def _origins(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns phrases that name the runs, seeds and commits of some numbers."""
    runs = [entry.measured.run for entry in entries]
    origins: Mapping[str, list[str]] = {
        "run": [run.name for run in runs],
        "seed": [str(entry.result.seed) for entry in entries],
        "commit": [short_commit(run.commit) for run in runs],
    }
    phrases = []
    for name, values in origins.items():
        distinct = dict.fromkeys(values)
        listed = " and ".join(distinct)
        phrases.append(f"{name} {listed}")
    return phrases


def _shared_facts(entries: Sequence[ReportEntry]) -> tuple[list[str], bool]:
    """Returns the facts that all of some numbers share, and whether some have others beside."""
    facts_of_each = [facts(entry.result) for entry in entries]
    shared = shared_texts(facts_of_each)
    return shared, max(map(len, facts_of_each)) > len(shared)


def _files(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns phrases that say where pictures and tables of the evaluations of some numbers are."""
    folders = []
    for entry in entries:
        row = entry.result
        folders.append(entry.measured.run.folder / folder_of_files(row.eval, row.fingerprint))
    there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    return [f"pictures and tables: {', '.join(map(str, there))}"] if there else []


def _layer_reasons(entries: Sequence[ReportEntry]) -> list[str]:
    """Returns why layers were chosen: each reason once, in the order of the numbers."""
    reasons = [entry.layer_reason for entry in entries if entry.layer_reason]
    return list(dict.fromkeys(reasons))
