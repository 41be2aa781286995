"""Starts a command: composes its config with Hydra and turns mistakes into one clear message.

Nothing here imports torch, so that --help and a misspelt key are answered at once.
"""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relloc import terminal
from relloc.errors import UsageError
from relloc.runs import command_line, data_of_run, explaining, resolvers, setting_help
from relloc.runs.command_line import CommandLine
from relloc.runs.data_of_run import RunData
from relloc.runs.launcher_words import with_one_value_each
from relloc.runs.renamed import refuse_old_names
from relloc.runs.settings import EVALUATING_COMMANDS, conf_dir, resolved

EXIT_MISTAKE = 2
FULL_ERROR = "HYDRA_FULL_ERROR"
# The user's own value. `start_command` sets the variable for this process, not for commands that
# it starts.
_FULL_ERROR_BEFORE = os.environ.get(FULL_ERROR)
_OUTPUT_IS_CLOSED = (
    "the output was closed (broken pipe): the run continues, and its folder has all results"
)
# Flags of Hydra that name config folders which the checks below can't read
_OWN_CONFIGS = ("--config-", "-cd", "-cn", "-cp")
_RERUN = "--experimental-rerun"  # a flag of Hydra
# The disk is full or read-only, or the file server failed
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
)
# A folder where a file should be, or the reverse
_PATH_ERRORS = (
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# The files that Hydra writes before it calls the task
_HYDRAS_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")


def users_environment() -> dict[str, str]:
    """Returns the environment as the user gave it, for commands that this one starts."""
    environment = dict(os.environ)
    # None: the user had not set it.
    if _FULL_ERROR_BEFORE is None:
        environment.pop(FULL_ERROR, None)
    else:
        environment[FULL_ERROR] = _FULL_ERROR_BEFORE
    return environment


def start_command(task: Callable[..., None], config_name: str) -> NoReturn:
    """Composes the config from the command line, runs `task` with it, and exits.

    Mistakes that a user can make end in one message on stderr and exit code 2, Ctrl-C in 130.
    HYDRA_FULL_ERROR=1 shows where an error was raised instead. conf/ may name `${scratch:}` where
    Hydra wants a folder that nobody needs: it is a temporary one.
    """
    terminal.survive_closed_output()
    show_all = os.environ.get(FULL_ERROR) == "1"
    # Errors reach `_explained` below instead of Hydra's own printer, which hides the cause.
    os.environ[FULL_ERROR] = "1"
    warnings.showwarning = _show_warning
    # One process may start several commands, as tests do: each gets its own random suffix for its
    # folder's name.
    resolvers.random_suffix.cache_clear()
    with contextlib.ExitStack() as at_end, _explained(config_name, show_all):
        OmegaConf.register_new_resolver("scratch", _Scratch(at_end), replace=True)
        # `--help SETTING` is answered here; a bare --help is left to Hydra.
        given = command_line.read(sys.argv[1:])
        if given.asks_for_help and given.words:
            print(setting_help.answer(given.words, config_name))
            sys.exit(0)
        data = _prepare_words(given, config_name)
        run_with_hydra = hydra.main(
            version_base="1.3",
            config_path=str(conf_dir()),
            config_name=config_name,
        )

        @functools.wraps(task)
        def explained_task(config: DictConfig) -> None:
            # Explained in here too, before Hydra adds its comments to an error.
            with _explained(config_name, show_all):
                hydra_config = HydraConfig.get()
                refuse_chdir(hydra_config)
                _refuse_name_of_sweep(hydra_config)
                explaining.check_evaluations(hydra_config.overrides.task, config)
                if data:
                    _report_data(data, config)
                terminal.print_when_reader_leaves(_OUTPUT_IS_CLOSED)
                task(config)

        run_with_hydra(explained_task)()
    terminal.end_of_output()
    sys.exit(0)


def _report_data(data: RunData, config: DictConfig) -> None:
    """Prints, on the first process, which data set was taken over from a run."""
    line = data.describe(resolved(config))
    is_first = int(os.environ.get("RANK", "0")) == 0
    if line and is_first:
        print(terminal.escaped(line))


def refuse_chdir(hydra_config: Any) -> None:
    """Raises `UsageError` where hydra.job.chdir is true.

    Relative paths would then be relative to the run's folder and not to the folder of the command.
    """
    if hydra_config.job.chdir:
        # Hydra has changed the folder already; relative paths in messages count from the old one.
        os.chdir(hydra_config.runtime.cwd)
        raise UsageError(
            "hydra.job.chdir=true is not supported: in relloc, relative paths count from the "
            "folder in which the command was started. Leave the setting out"
        )


def _refuse_name_of_sweep(hydra_config: Any) -> None:
    """Raises `UsageError` where a single run is given the name of a sweep."""
    if hydra_config.mode == RunMode.MULTIRUN:
        return
    for word in hydra_config.overrides.task:
        if word.lstrip("+").startswith("sweep="):
            raise UsageError(
                f"{word} names a sweep, and this is one run: start it with -m, or leave sweep= out"
            )


def _prepare_words(given: CommandLine, config_name: str) -> RunData | None:
    """Checks the words of the command line and rewrites sys.argv as Hydra is to read it.

    Flags come first. An evaluation of a run takes over the data set of that run, which is returned.
    """
    if any(flag.startswith(_RERUN) for flag in given.flags):
        raise UsageError(
            f"{_RERUN} runs what a pickle holds, and relloc writes no pickles. "
            "Start the run's command again instead: it goes on where the run ended"
        )
    # Checks that need no composed config, from those of syntax to those of meaning
    typed = with_one_value_each(given.words)
    if config_name in EVALUATING_COMMANDS:
        command_line.check_bare_checkpoint(typed)
    words = command_line.check(typed, sweeps=given.sweeps)
    refuse_old_names(word.key_or_group for word in words)
    explaining.check_members(words)
    explaining.check_kinds(words, config_name)
    if not any(flag.startswith(_OWN_CONFIGS) for flag in given.flags):
        explaining.check_added(words, config_name)

    data = None
    if config_name in EVALUATING_COMMANDS:
        command_line.check_checkpoints(words)
        find = data_of_run.find_shared if given.sweeps else data_of_run.find_of_point
        data = find(words)

    # What was typed comes last, so that it wins over what was taken over from the run.
    words_of_run = data.words if data else ()
    sys.argv[1:] = [*given.flags, *words_of_run, *typed]
    # Of several processes only the first writes into the run folder; that holds for Hydra too.
    if int(os.environ.get("RANK", "0")) > 0:
        sys.argv += ["hydra.run.dir=${scratch:}", "hydra.output_subdir=null"]
    return data


class _Scratch:
    """The resolver of `${scratch:}` in a config: one temporary folder.

    The folder is made when it is first asked for and removed when the command ends.
    """

    def __init__(self, at_end: contextlib.ExitStack) -> None:
        self._at_end = at_end

    @functools.cached_property
    def _folder(self) -> str:
        return self._at_end.enter_context(tempfile.TemporaryDirectory(prefix="relloc_"))

    def __call__(self) -> str:
        return self._folder

    def __reduce__(self) -> NoReturn:
        """Refuses launchers of other projects, which pickle Hydra's state and so this resolver."""
        raise UsageError(
            "this hydra/launcher sends Hydra itself to other processes, where a point's errors and "
            "exit code are lost. Use hydra/launcher=submitit_slurm or launcher=slurm, which submit "
            "a command for each point, or launcher=local, which starts processes of this machine"
        )


@contextlib.contextmanager
def _explained(config_name: str, show_all: bool) -> Iterator[None]:
    """Ends the command with one message where a user's mistake is raised within the block."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        message = None if show_all else explaining.explain(error, config_name)
        if message is None:
            raise
        # A refused run leaves no folder behind.
        if HydraConfig.initialized():
            _remove_untouched_folder(HydraConfig.get())
        _exit(message, getattr(error, "exit_code", EXIT_MISTAKE))
    except OSError as error:
        if show_all or error.errno not in _DISK_ERRORS + _PATH_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _exit(
            f"{error.strerror}{where}. What was saved before stays; fix the cause and go on with "
            "the run's hydra.run.dir",
            EXIT_MISTAKE,
        )


def _remove_untouched_folder(hydra_config: Any) -> None:
    """Removes the folder of a refused run if it holds nothing but what Hydra wrote."""
    runtime = hydra_config.runtime
    if hydra_config.mode == RunMode.MULTIRUN or OmegaConf.is_missing(runtime, "output_dir"):
        return
    run_dir = Path(runtime.output_dir)
    # conf/ has Hydra write nothing, since the folder may be another run's. A user who sets
    # hydra.output_subdir has it write into that folder.
    output_subdir = hydra_config.output_subdir
    hydras_folder = run_dir / (output_subdir or "")
    # OSError: the folder is not empty, another process writes there, or it may not be removed.
    # Then it stays.
    with contextlib.suppress(OSError):
        hydras_files = {hydras_folder / name for name in _HYDRAS_FILES}
        present = {*run_dir.glob("*"), *hydras_folder.glob("*")}
        if output_subdir and present == {hydras_folder, *hydras_files}:
            for name in _HYDRAS_FILES:
                (hydras_folder / name).unlink()
            hydras_folder.rmdir()
        if not run_dir.samefile(Path.cwd()):
            run_dir.rmdir()


def _exit(message: str, exit_code: int) -> NoReturn:
    terminal.print_error(message)
    sys.exit(exit_code)


def _show_warning(message: Warning | str, *_where: object) -> None:
    terminal.print_error(message)
