"""python -m relloc.report [FOLDER ...] [--format FORMAT] [--out FILE]: our numbers beside the published ones.

python -m relloc.report sweep=NAME: those of runs/sweeps/NAME, a line a setting and a column a layer, and as a picture.
"""

import argparse
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from relloc import terminal
from relloc.errors import UsageError
from relloc.reports.as_csv import as_csv
from relloc.reports.load import find_measured
from relloc.reports.missing import FILL_CARD
from relloc.reports.published import PUBLISHED_MODEL
from relloc.reports.render import as_html, as_latex, as_markdown
from relloc.reports.table import ROWS, Report, make_report
from relloc.status import Status
from relloc.sweeps.points import Point
from relloc.sweeps.standing import known_standings
from relloc.sweeps.sweep import SWEEP_FILE, Sweep, find_sweep, is_named, runs_folder

_SWEEP = "sweep="
_PICTURES = ("png", "svg", "pdf")
# Of a file by its ending; what is printed has the first
_FORMATS = {".md": "markdown", ".csv": "csv", ".html": "html", ".tex": "latex"}
_SWEEP_FORMATS = _FORMATS | {f".{name}": name for name in _PICTURES}
_RENDER: dict[str, Callable[[Report], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "html": as_html,
    "latex": as_latex,
}
_NOT_IN_FLIGHT = ("stopped", "cancelled", "failed", "missing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the report; 0 if it is there, 2 after a mistake, which is one message on stderr."""
    options = parser().parse_args(arguments)
    try:
        if sweeps := [word for word in options.folders if _names_sweep(word)]:
            has_card_model = _report_sweep(sweeps[0], options)
        else:
            has_card_model = _report(options)
        _tell_next(options, has_card_model=has_card_model)
    except UsageError as error:
        terminal.complain(error)
        return error.exit_code
    return 0


def _tell_next(options: argparse.Namespace, *, has_card_model: bool) -> None:
    """Of a report that was printed, how it becomes a page; of a written one, how its empty cells are filled.

    The card is of one model: other models fill none of its cells.
    """
    if options.out is not None:
        if has_card_model:
            terminal.tell_next(FILL_CARD, on_stderr=True)
    elif options.format is None:
        form = "md" if any(folder.startswith(_SWEEP) for folder in options.folders) else "html"
        words = ["python", "-m", "relloc.report", *options.folders, "--out", f"report.{form}"]
        terminal.tell_next(shlex.join(words), on_stderr=True)


def parser() -> argparse.ArgumentParser:
    """The words that the command takes."""
    words = argparse.ArgumentParser(prog="python -m relloc.report", description=__doc__)
    words.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        help=f"runs, sweeps, or folders of them, by default runs/; or one sweep: {_SWEEP}NAME, {_SWEEP}FOLDER or NAME",
    )
    words.add_argument(
        "--format",
        help=f"{', '.join(_FORMATS.values())}; of a sweep {', '.join(_SWEEP_FORMATS.values())}; "
        "by default that of FILE's ending, which must be known; printed, markdown",
    )
    words.add_argument(
        "--rows",
        default=ROWS[0],
        help="card: relative location and its controls; all: other tasks too",
    )
    words.add_argument(
        "--metrics",
        metavar="PATTERN",
        help="of a sweep: not the headline metrics, but these: 'linear*/top1_tuned'",
    )
    words.add_argument("--out", metavar="FILE", type=Path, help="write there instead of printing")
    return words


def _names_sweep(word: str) -> bool:
    """Whether a sweep is meant as such: what is a folder here is reported as one, beside the published numbers."""
    return word.startswith(_SWEEP) or (not os.path.exists(word) and is_named(word))


def _report(options: argparse.Namespace) -> bool:
    """Give the report of runs; whether any of its numbers is of the card's model."""
    render = _RENDER[_format(options, _FORMATS)]
    if options.rows not in ROWS:
        raise UsageError(f"--rows {options.rows} is not one of {', '.join(ROWS)}")
    if options.metrics is not None:
        raise UsageError(f"--metrics is for a sweep: name one with {_SWEEP}NAME")
    runs = [run for folder in options.folders or [runs_folder()] for run in _runs_of(Path(folder))]
    measured = find_measured(runs)
    _give(render(make_report(measured, options.rows)), options.out)
    return any(each.result.model == PUBLISHED_MODEL for each in measured)


def _report_sweep(word: str, options: argparse.Namespace) -> bool:
    """As `_report`, of a sweep."""
    # pandas and matplotlib take a while, which other reports need not wait
    from relloc.reports.pictures import draw_sweep
    from relloc.reports.sweep import as_report, as_sweep_csv, read_sweep

    if len(options.folders) > 1:
        raise UsageError(f"{word} is reported alone: leave out the other folders and sweeps")
    if options.rows != ROWS[0]:
        raise UsageError(
            f"--rows is for published numbers, which {word} is not beside: leave it out"
        )
    sweep, shown = find_sweep(word), _format(options, _SWEEP_FORMATS)
    points = sweep.points()
    states = _states(points)
    numbers = read_sweep(sweep.name, points, states, options.metrics)
    if shown == "csv":
        _give(as_sweep_csv(numbers), options.out)
    elif shown in _RENDER:
        idle = [
            point for point, state in zip(points, states, strict=True) if state in _NOT_IN_FLIGHT
        ]
        _give(_RENDER[shown](as_report(numbers, [point.again for point in idle])), options.out)
    has_card_model = bool((numbers.rows["model"] == PUBLISHED_MODEL).any())
    # A picture is drawn where one is asked for, and beside what is printed where nothing is
    if shown not in _PICTURES and not (options.format is options.out is None):
        return has_card_model
    if numbers.has_ours:
        form = shown if shown in _PICTURES else _PICTURES[0]
        path = options.out or sweep.folder / f"report.{form}"
        with _writing(path):
            draw_sweep(numbers, path, form)
        print(f"picture {terminal.escaped(str(path))}")
        return has_card_model
    nothing = f"there is nothing to draw of sweep {sweep.name}: all its weights are random or torchvision's"
    if shown in _PICTURES:
        raise UsageError(nothing)
    print(nothing)
    return has_card_model


def _states(points: Sequence[Point]) -> list[str]:
    """How each point stands; schedulers are asked only where not all are done, and may be silent."""
    found, silent = known_standings(points, {})
    if any(now.status is not Status.DONE for now in found):
        found, silent = known_standings(points)
    for words in dict.fromkeys(silent):
        terminal.complain(f"{words}; how points stand that have jobs there is not known")
    return [now.status.word for now in found]


def _give(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    with _writing(out):
        out.write_text(text, encoding="utf-8")
    print(f"report  {terminal.escaped(str(out))}")


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{out} could not be written ({error.strerror}): name another file with --out"
        ) from error


def _runs_of(folder: Path) -> list[Path]:
    """The run folders of a sweep; else the folder itself."""
    if not (folder / SWEEP_FILE).exists():
        return [folder]
    return [point.folder for point in Sweep(folder).points() if point.folder.is_dir()]


def _format(options: argparse.Namespace, of_ending: Mapping[str, str]) -> str:
    """The format that is asked for, by its name or by the ending of the file; printed, the first."""
    formats = list(of_ending.values())
    name, out = options.format or formats[0], options.out
    if not options.format and out:
        if out.suffix.lower() not in of_ending:
            known = ", ".join(of_ending)
            raise UsageError(
                f"--out {out} ends in none of {known}: end it so, or say --format {'|'.join(formats)}"
            )
        name = of_ending[out.suffix.lower()]
    if name not in formats:
        raise UsageError(f"--format {name} is not one of {', '.join(formats)}")
    return name


if __name__ == "__main__":
    terminal.run_command(main)
