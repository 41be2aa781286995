"""python -m relloc.report [FOLDER ...]: prints our results beside the published ones.

With --format and --out the report is written as Markdown, CSV, HTML or LaTeX. With sweep=NAME it
covers one sweep of runs/sweeps: a line for each setting, a column for each layer, and a picture.
From five settings on it also tells how well measures without labels rank runs by their accuracy;
with --prediction that is all.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from relloc import terminal
from relloc.errors import UsageError
from relloc.reports.as_csv import as_csv
from relloc.reports.load import Measured, find_measured
from relloc.reports.missing import FILL_CARD
from relloc.reports.observations import FEWEST_POINTS, Observations, observations
from relloc.reports.parts import Report
from relloc.reports.published import PUBLISHED_MODEL
from relloc.reports.render import as_html, as_latex, as_markdown
from relloc.reports.selection import select, split_words
from relloc.reports.table import ROWS, make_report
from relloc.status import Status
from relloc.sweeps.point_status import point_statuses_and_problems
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import SWEEP_FILE, Sweep, find_sweep, is_named, runs_folder

_SWEEP = "sweep="
_PICTURES = ("png", "svg", "pdf")
# The format by a file's ending. The first is also that of what is printed
_FORMATS = {".md": "markdown", ".csv": "csv", ".html": "html", ".tex": "latex"}
_SWEEP_FORMATS = _FORMATS | {f".{name}": name for name in _PICTURES}
_RENDER: dict[str, Callable[[Report], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "html": as_html,
    "latex": as_latex,
}
# States of points that no job will finish: the report lists the commands that run them again
_NOT_IN_FLIGHT = ("stopped", "cancelled", "failed", "missing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the report that the command line asks for.

    Returns the exit code: 0 for success, 2 after a mistake, which is one message on stderr.
    """
    options = parser().parse_args(arguments)
    try:
        options.folders, options.filters = split_words(options.folders)
        sweeps = [word for word in options.folders if _names_sweep(word)]
        # A second sweep or folder beside the first is refused in `_report_sweep`
        if options.prediction:
            _report_prediction(sweeps, options)
            return 0
        if sweeps and options.filters:
            raise UsageError(
                f"{sweeps[0]} has a table for each metric, and --metrics PATTERN selects some: "
                f"{options.filters[0].field}=… is for reports of folders"
            )
        has_card_model = _report_sweep(sweeps[0], options) if sweeps else _report_runs(options)
        _suggest_next(options, has_card_model=has_card_model)
    except UsageError as error:
        terminal.print_error(error)
        return error.exit_code
    return 0


def _suggest_next(options: argparse.Namespace, *, has_card_model: bool) -> None:
    """Prints the command that may come next.

    After a printed report it writes the same report to a file. After a written one it fills empty
    cells of the published card, which has the card's model only.
    """
    if options.out is not None:
        # No other model has numbers on the card, so its cells are none that are missing
        if has_card_model:
            terminal.print_next(FILL_CARD, on_stderr=True)
        return
    # Whoever asked for a format of stdout, such as csv, has the output that was wanted
    if options.format is None:
        # HTML suits the card's wide tables and Markdown a sweep's few
        is_of_sweep = any(folder.startswith(_SWEEP) for folder in options.folders)
        ending = "md" if is_of_sweep else "html"
        words = [
            "python",
            "-m",
            "relloc.report",
            *options.folders,
            "--out",
            f"report.{ending}",
        ]
        terminal.print_next(shlex.join(words), on_stderr=True)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    words = argparse.ArgumentParser(prog="python -m relloc.report", description=__doc__)
    words.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        help="run folders, sweep folders, or folders that hold some, by default runs/; "
        f"or one sweep: {_SWEEP}NAME, {_SWEEP}FOLDER or NAME; FIELD=VALUE[,VALUE] selects results "
        "of folders by a field (eval=knn, dataset=photos) or a setting of the training "
        "(grid.gap_px=0)",
    )
    words.add_argument(
        "--format",
        help=f"{', '.join(_FORMATS.values())}; for a sweep {', '.join(_SWEEP_FORMATS.values())}; "
        "by default the format of FILE's ending, or markdown where the report is printed",
    )
    words.add_argument(
        "--rows",
        default="",
        help="published rows to show: card (relative location and its controls) or all "
        "(other pretext tasks too); by default card, where a result is of one of its protocols",
    )
    words.add_argument(
        "--metrics",
        metavar="PATTERN",
        help="metrics of a sweep to show in place of the headline metrics, "
        "for example 'linear*/top1_tuned'",
    )
    words.add_argument(
        "--prediction",
        action="store_true",
        help="only rank correlations of measures without labels (eval=label_free, pretext "
        "accuracy), and of measures after a tenth of the trainings, with accuracies at the end, "
        "over the runs; as CSV with a line for each",
    )
    words.add_argument("--out", metavar="FILE", type=Path, help="write to FILE, don't print")
    return words


def _names_sweep(word: str) -> bool:
    """Returns whether an argument names a sweep.

    A folder of that name goes first, and is reported beside the published numbers.
    """
    return word.startswith(_SWEEP) or (not os.path.exists(word) and is_named(word))


def _report_runs(options: argparse.Namespace) -> bool:
    """Reports the results of runs; returns whether any of them is of the published card's model."""
    render = _RENDER[_format(options, _FORMATS)]
    if options.rows not in ("", *ROWS):
        raise UsageError(f"--rows {options.rows} is not one of {', '.join(ROWS)}")
    if options.metrics is not None:
        raise UsageError(f"--metrics is for a sweep: name one with {_SWEEP}NAME")
    measured = select(find_measured(_all_run_folders(options)), options.filters)
    report = make_report(measured, options.rows)
    # CSV has the results alone
    if render is not as_csv:
        report = _with_prediction(report, measured)
    _output(render(report), options.out)
    return any(each.result.model == PUBLISHED_MODEL for each in measured)


def _all_run_folders(options: argparse.Namespace) -> list[Path]:
    """Returns the folders named by the command line; a sweep's stands for those of its points."""
    runs = []
    for folder in options.folders or [runs_folder()]:
        runs += _run_folders(Path(folder))
    return runs


def _report_prediction(sweeps: Sequence[str], options: argparse.Namespace) -> None:
    """Reports how well measures without labels, and early measures, predict accuracies."""
    if len(sweeps) > 1 or (sweeps and len(options.folders) > 1):
        raise UsageError(
            f"{sweeps[0]} is reported alone: leave out the other folders and sweeps, or name all "
            "by their folders"
        )
    if options.rows or options.metrics is not None:
        raise UsageError(
            "--prediction takes all measures and accuracies: leave out --rows and --metrics"
        )
    form = _format(options, _FORMATS)
    if sweeps:
        sweep = find_sweep(sweeps[0])
        of = f"sweep {sweep.name}"
        folders = _run_folders(sweep.folder)
    else:
        of = ", ".join(options.folders) or str(runs_folder())
        folders = _all_run_folders(options)
    observed = observations(select(find_measured(folders), options.filters))
    # Imported here, as scipy.stats takes a while
    from relloc.reports.prediction import (
        all_predictions,
        as_prediction_csv,
        check_enough,
        prediction_report,
    )

    check_enough(observed, of)
    found = all_predictions(observed)
    if form == "csv":
        text = as_prediction_csv(found)
    else:
        text = _RENDER[form](prediction_report(found, f"Measures and accuracies of {of}"))
    _output(text, options.out)


def _with_prediction(report: Report, measured: Sequence[Measured]) -> Report:
    """Returns the report with the tables of how well measures without labels predict accuracies.

    With too few points it is the report as it was, with a line that says so if there are measures
    of features.
    """
    observed = observations(measured)
    if observed.n_points >= FEWEST_POINTS:
        # Imported here, as scipy.stats takes a while, which other reports need not wait for
        from relloc.reports.prediction import (
            all_predictions,
            prediction_groups,
            prediction_legend,
        )

        groups = prediction_groups(all_predictions(observed))
        if not groups:
            return report
        return dataclasses.replace(
            report,
            groups=(*report.groups, *groups),
            legend=(*report.legend, *prediction_legend(groups)),
        )
    return dataclasses.replace(report, legend=(*report.legend, *_too_few(observed)))


def _too_few(observed: Observations) -> Iterator[str]:
    """Yields the line of the legend that says why no correlations are shown."""
    if observed.has_features and observed.n_points > 1:
        yield (
            f"Whether measures without labels predict accuracy can be told of {FEWEST_POINTS} "
            f"settings or more: there are {observed.n_points}."
        )


def _report_sweep(word: str, options: argparse.Namespace) -> bool:
    """Reports one sweep; returns whether any result is of the published card's model."""
    # Imported here, as pandas and matplotlib take a while, which other reports need not wait for
    from relloc.reports.best_points import with_best_points
    from relloc.reports.pictures import draw_sweep
    from relloc.reports.sweep import as_report, as_sweep_csv, read_sweep

    if len(options.folders) > 1:
        raise UsageError(f"{word} is reported alone: leave out the other folders and sweeps")
    if options.rows:
        raise UsageError(
            f"--rows selects published numbers, which a sweep's report ({word}) does not have: "
            "leave it out"
        )
    sweep = find_sweep(word)
    form = _format(options, _SWEEP_FORMATS)
    points = sweep.points()
    states = _states(points)
    numbers = read_sweep(sweep.name, points, states, options.metrics)
    if form == "csv":
        _output(as_sweep_csv(numbers), options.out)
    elif form in _RENDER:
        # The report ends with the commands of the points that no job has
        commands = []
        for point, state in zip(points, states, strict=True):
            if state in _NOT_IN_FLIGHT:
                commands.append(point.again)
        report = with_best_points(as_report(numbers, commands), numbers)
        measured = find_measured([point.folder for point in points if point.folder.is_dir()])
        _output(_RENDER[form](_with_prediction(report, measured)), options.out)
    has_card_model = bool((numbers.rows["model"] == PUBLISHED_MODEL).any())
    # A picture is drawn where one is asked for, and beside a report that is printed by default
    is_default = options.format is None and options.out is None
    if form not in _PICTURES and not is_default:
        return has_card_model
    if numbers.has_ours:
        picture_form = form if form in _PICTURES else _PICTURES[0]
        path = options.out or sweep.folder / f"report.{picture_form}"
        with _naming_errors(path):
            draw_sweep(numbers, path, picture_form)
        print(f"picture {terminal.escaped(str(path))}")
        return has_card_model
    # Asked for a picture, that is a mistake; where one was only offered, a line of the output
    reason = (
        f"there is nothing to draw of sweep {sweep.name}: "
        "all its weights are random or torchvision's"
    )
    if form in _PICTURES:
        raise UsageError(reason)
    print(reason)
    return has_card_model


def _states(points: Sequence[Point]) -> list[str]:
    """Returns the state of each point as a word, such as "done" or "running"."""
    # First by the run folders alone: a cluster need not be asked about a sweep that is done
    found, problems = point_statuses_and_problems(points, {})
    if any(one.status is not Status.DONE for one in found):
        found, problems = point_statuses_and_problems(points)
    # A cluster that does not answer hides no numbers: the report goes on without its jobs' states
    for problem in dict.fromkeys(problems):
        terminal.print_error(f"{problem}; the state of points with jobs there is not known")
    return [one.status.word for one in found]


def _output(text: str, out: Path | None) -> None:
    """Writes the report to a file, or prints it where no file is named."""
    if out is None:
        print(text, end="")
        return
    with _naming_errors(out):
        out.write_text(text, encoding="utf-8")
    print(f"report  {terminal.escaped(str(out))}")


@contextlib.contextmanager
def _naming_errors(out: Path) -> Iterator[None]:
    """Turns errors of the file system into a `UsageError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{out} could not be written ({error.strerror}): name another file with --out"
        ) from error


def _run_folders(folder: Path) -> list[Path]:
    """Returns the run folders of a sweep's folder, or else the folder itself."""
    if not (folder / SWEEP_FILE).exists():
        return [folder]
    # Points that have not begun have no folder yet
    return [point.folder for point in Sweep(folder).points() if point.folder.is_dir()]


def _format(options: argparse.Namespace, format_of_ending: Mapping[str, str]) -> str:
    """Returns the format asked for: --format, else that of the file's ending, else the first.

    Raises:
        UsageError: the format or the ending is not known.
    """
    # An explicit --format goes first, so that a file may have any ending
    formats = list(format_of_ending.values())
    if options.format:
        name = options.format
    elif options.out:
        ending = options.out.suffix.lower()
        if ending not in format_of_ending:
            known = ", ".join(format_of_ending)
            raise UsageError(
                f"--out {options.out} ends in none of {known}: end it so, "
                f"or say --format {'|'.join(formats)}"
            )
        name = format_of_ending[ending]
    else:
        name = formats[0]
    if name not in formats:
        raise UsageError(f"--format {name} is not one of {', '.join(formats)}")
    return name


if __name__ == "__main__":
    terminal.run_command(main)
