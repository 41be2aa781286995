"""python -m relloc.sync RUN_DIR [RUN_DIR ...] [--uri URI]: send to MLflow what it lacks of run folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from relloc import terminal
from relloc.errors import UsageError
from relloc.tracking import (
    RunRecord,
    StoreError,
    absolute_uri,
    experiment_name,
    import_driver,
    sync,
    ui_command,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Send each folder, print one line for each; 0 if all were sent, 1 if not, 2 for options that can't be used."""
    options = parser().parse_args(arguments)
    try:
        uri = options.uri if options.uri is None else absolute_uri(options.uri)
        if uri is not None:
            import_driver(uri)
        if options.experiment is not None:
            experiment_name(options.experiment, uri)
    except UsageError as error:
        terminal.complain(error)
        return error.exit_code
    sent = [_send(run_dir, uri, options.experiment) for run_dir in options.run_dirs]
    for uri in dict.fromkeys(uri for uri in sent if uri):
        terminal.tell_next(ui_command(uri))
    return 0 if all(sent) else 1


def parser() -> argparse.ArgumentParser:
    """The words that the command takes."""
    words = argparse.ArgumentParser(prog="python -m relloc.sync", description=__doc__)
    words.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    words.add_argument("--uri", help="the MLflow store; by default the one noted in each run.json")
    words.add_argument(
        "--experiment", help="the experiment to send to; by default the one noted in each run.json"
    )
    return words


def _send(run_dir: Path, uri: str | None, experiment: str | None) -> str | None:
    """The store that has all of the run now; None after a message."""
    try:
        uri = uri or RunRecord.read(run_dir).tracking_uri
        if not uri:
            return _complain(run_dir, "run.json names no store: give one with --uri")
        uri = absolute_uri(uri)
        sent = sync(run_dir, uri, experiment)
    except FileNotFoundError as error:
        return _complain(run_dir, f"not a run folder: {error.filename or error} is missing")
    except (StoreError, OSError, ValueError) as error:
        return _complain(run_dir, str(error))
    counts = f"{sent.params} params, {sent.points} points, {sent.artifacts} artifacts"
    for line in sent.refused:
        _complain(run_dir, line)
    print(terminal.escaped(f"{run_dir}: {counts if sent else 'nothing new'} -> {uri}"))
    return uri


def _complain(run_dir: Path, reason: str) -> None:
    print(terminal.escaped(f"{run_dir}: {reason}", keep="\n"), file=sys.stderr)


if __name__ == "__main__":
    terminal.run_command(main)
