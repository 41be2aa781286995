"""python -m relloc.report [FOLDER ...] [--format FORMAT] [--out FILE]: our numbers beside the published ones."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from relloc.errors import UsageError
from relloc.reports.as_csv import as_csv
from relloc.reports.as_html import as_html
from relloc.reports.as_latex import as_latex
from relloc.reports.as_markdown import as_markdown
from relloc.reports.make import ROWS, make_report
from relloc.reports.measured import find_measured
from relloc.reports.table import Report
from relloc.sweeps.sweep import SWEEP_FILE, Sweep

_FORMATS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "markdown": (".md", as_markdown),
    "csv": (".csv", as_csv),
    "html": (".html", as_html),
    "latex": (".tex", as_latex),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the report; 0 if it is there, 2 after a mistake, which is one message on stderr."""
    options = _parser().parse_args(arguments)
    try:
        _report(options.folders or [_runs_folder()], options.format, options.rows, options.out)
    except UsageError as error:
        print(f"relloc: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relloc.report", description=__doc__)
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="runs, sweeps, or folders of them; default runs/",
    )
    parser.add_argument(
        "--format",
        help=f"{', '.join(_FORMATS)}; by default that of FILE's ending, which must be known; printed, markdown",
    )
    parser.add_argument(
        "--rows", default=ROWS[0], help="card: relative location and its controls; all: other tasks too"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write there instead of printing")
    return parser


def _runs_folder() -> Path:
    return Path(os.environ.get("RELLOC_RUNS", "runs"))


def _report(folders: Sequence[Path], name: str | None, rows: str, out: Path | None) -> None:
    render = _renderer(name, out)
    if rows not in ROWS:
        raise UsageError(f"--rows {rows} is not one of {', '.join(ROWS)}")
    text = render(make_report(find_measured([run for folder in folders for run in _runs_of(folder)]), rows))
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} could not be written ({error.strerror}): name another file with --out") from error
    print(f"report  {out}")


def _runs_of(folder: Path) -> list[Path]:
    """The run folders of a sweep; else the folder itself."""
    if not (folder / SWEEP_FILE).exists():
        return [folder]
    return [point.folder for point in Sweep(folder).points() if point.folder.is_dir()]


def _renderer(name: str | None, out: Path | None) -> Callable[[Report], str]:
    name = name or (_format_of(out) if out else "markdown")
    if name not in _FORMATS:
        raise UsageError(f"--format {name} is not one of {', '.join(_FORMATS)}")
    return _FORMATS[name][1]


def _format_of(out: Path) -> str:
    of_ending = {ending: name for name, (ending, _) in _FORMATS.items()}
    if out.suffix.lower() not in of_ending:
        endings = ", ".join(of_ending)
        raise UsageError(f"--out {out} ends in none of {endings}: end it so, or say --format {'|'.join(_FORMATS)}")
    return of_ending[out.suffix.lower()]


if __name__ == "__main__":
    sys.exit(main())
