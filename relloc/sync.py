"""python -m relloc.sync RUN_DIR ...: sends run folders to MLflow, as far as it lacks them.

python -m relloc.sync RUN_DIR [RUN_DIR ...] [--uri URI] [--experiment NAME]

A folder of run folders, such as runs, stands for all run folders in it.
"""

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
from relloc.tracking.record import RUN_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """Send each run folder to its store, and print one line for each.

    Returns:
        The exit code: 0 if all were sent, 1 if some were not, 2 for options that can't be used.
    """
    options = parser().parse_args(arguments)
    # Mistakes in options are reported before the first folder is sent.
    try:
        uri = options.uri if options.uri is None else absolute_uri(options.uri)
        if uri is not None:
            import_driver(uri)
        if options.experiment is not None:
            experiment_name(options.experiment, uri)
    except UsageError as error:
        terminal.print_error(error)
        return error.exit_code
    # A folder that fails does not keep the others from being sent.
    stores = [_send(run_dir, uri, options.experiment) for run_dir in _run_dirs(options.run_dirs)]
    reached_stores = dict.fromkeys(store for store in stores if store)  # each once, in order
    for store in reached_stores:
        terminal.print_next(ui_command(store))
    return 0 if all(stores) else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command_line = argparse.ArgumentParser(
        prog="python -m relloc.sync",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    command_line.add_argument(
        "--uri", help="the MLflow store; by default the one noted in each run.json"
    )
    command_line.add_argument(
        "--experiment", help="the experiment to send to; by default the one noted in each run.json"
    )
    return command_line


def _run_dirs(given: Sequence[Path]) -> list[Path]:
    """Return each run folder once, with those that lie in folders of run folders."""
    run_dirs: list[Path] = []
    for folder in given:
        inside = []
        if not (folder / RUN_FILE).exists():
            inside = sorted(file.parent for file in folder.glob(f"*/{RUN_FILE}"))
        # A folder without any run is kept, and is told that it is not one.
        run_dirs += inside or [folder]
    return list(dict.fromkeys(run_dirs))


def _send(run_dir: Path, uri: str | None, experiment: str | None) -> str | None:
    """Send one run folder, and return the address of its store, or None after a message."""
    # Without --uri the store is the one that the run itself was started with.
    try:
        uri = uri or RunRecord.read(run_dir).tracking_uri
        if not uri:
            return _complain(run_dir, "run.json names no MLflow store: give one with --uri")
        uri = absolute_uri(uri)
        sent = sync(run_dir, uri, experiment)
    except FileNotFoundError as error:
        missing = error.filename or error
        return _complain(
            run_dir, f"neither a run folder nor one that has some in it: {missing} is missing"
        )
    except StoreError as error:
        return _complain(
            run_dir,
            f"{error}. Nothing is lost: repeat this command once the store answers, or name "
            "another store with --uri",
        )
    except (OSError, ValueError) as error:
        return _complain(run_dir, str(error))
    for reason in sent.refused:
        _complain(run_dir, reason)
    summary = "nothing new"
    if sent:
        summary = f"{sent.params} params, {sent.points} points, {sent.artifacts} artifacts"
    print(terminal.escaped(f"{run_dir}: {summary} -> {uri}"))
    return uri


def _complain(run_dir: Path, reason: str) -> None:
    """Print on stderr why a run folder, or a file in it, was not sent."""
    message = f"{run_dir}: {reason}"
    print(terminal.escaped(message, keep="\n"), file=sys.stderr)


if __name__ == "__main__":
    terminal.run_command(main)
