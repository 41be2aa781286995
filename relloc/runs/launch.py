"""Starting a command: finding conf/, composing with Hydra, turning mistakes into one clear message.

Nothing here imports torch, so that --help and a misspelt key are answered at once.
"""

import contextlib
import errno
import functools
import os
import secrets
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
from relloc.runs import command_line, data_of_run, explaining, setting_help
from relloc.runs.command_line import CommandLine
from relloc.runs.data_of_run import RunData
from relloc.runs.launcher_words import with_one_value_each
from relloc.runs.renamed import refuse_old_names
from relloc.runs.settings import conf_dir

EXIT_MISTAKE = 2
FULL_ERROR = "HYDRA_FULL_ERROR"
_ASKED_FOR_FULL = os.environ.get(
    FULL_ERROR
)  # by the user; what we set for ourselves is not for commands we start
_NOBODY_READS = (
    "nobody reads this command's output any more: it goes on, and its folder has all numbers"
)
_OWN_CONFIGS = (
    "--config-",
    "-cd",
    "-cn",
    "-cp",
)  # flags of Hydra that bring groups which we do not see
_RERUN = "--experimental-rerun"  # of Hydra
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
_PLACE_ERRORS = (
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_OF_HYDRA = ("config.yaml", "hydra.yaml", "overrides.yaml")  # what Hydra writes before it calls us


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for commands that this one starts."""
    given = {**os.environ, FULL_ERROR: _ASKED_FOR_FULL}
    return {name: value for name, value in given.items() if value is not None}


def launch(task: Callable[..., None], config_name: str) -> NoReturn:
    """Compose the config from the command line, run `task` with it, and exit.

    Mistakes that a user can make end in one message on stderr and exit code 2, Ctrl-C in 130.
    HYDRA_FULL_ERROR=1 shows where an error was raised instead. conf/ may name `${scratch:}` where
    Hydra wants a folder that nobody needs: it is a temporary one.
    """
    terminal.outlive_readers()
    show_all = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # errors reach the lines below instead of Hydra's printer
    warnings.showwarning = _say_warning
    _digits_of.cache_clear()
    with contextlib.ExitStack() as at_end, _explained(config_name, show_all):
        OmegaConf.register_new_resolver("scratch", _Scratch(at_end), replace=True)
        asked = command_line.read(sys.argv[1:])
        if asked.asks_for_help and asked.words:
            print(setting_help.answer(asked.words, config_name))
            sys.exit(0)
        data = _prepare_words(asked, config_name)
        start = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)

        @functools.wraps(task)
        def explained_task(config: DictConfig) -> None:
            with _explained(
                config_name, show_all
            ):  # inside too, where Hydra has not commented on it yet
                refuse_chdir(HydraConfig.get())
                _refuse_name_of_sweep(HydraConfig.get())
                if data:
                    given: Any = OmegaConf.to_container(config, resolve=True)
                    line = data.tell(given)
                    if line and int(os.environ.get("RANK", "0")) == 0:
                        print(terminal.escaped(line))
                terminal.tell_when_left(_NOBODY_READS)
                task(config)

        start(explained_task)()
    terminal.end_of_output()
    sys.exit(0)


def refuse_chdir(made: Any) -> None:
    """Raises `UsageError` where Hydra goes into the run's folder, or has: relative paths would count from there."""
    if made.job.chdir:
        os.chdir(made.runtime.cwd)
        raise UsageError(
            "hydra.job.chdir=true is not for relloc, whose runs have relative paths count from the folder of the "
            "command: leave it out"
        )


def _refuse_name_of_sweep(made: Any) -> None:
    """Raises `UsageError` where a run that is alone is given the name of a sweep."""
    named = [word for word in made.overrides.task if word.lstrip("+").startswith("sweep=")]
    if named and made.mode != RunMode.MULTIRUN:
        raise UsageError(
            f"{named[0]} names a sweep, and this is one run: start it with -m, or leave sweep= out"
        )


@functools.cache
def _digits_of(_pid: int) -> str:
    return secrets.token_hex(3)


def _unique() -> str:
    """What `${unique:}` in a config is: digits that tell this command from another of the same second."""
    return _digits_of(os.getpid())


# For all who compose conf/, also without `launch`, since the default names of runs and sweeps have it.
OmegaConf.register_new_resolver("unique", _unique, replace=True)


def _prepare_words(asked: CommandLine, config_name: str) -> RunData | None:
    """Have sys.argv say what Hydra is to read: flags first, and of an evaluation the data set of the run it names."""
    if any(flag.startswith(_RERUN) for flag in asked.flags):
        raise UsageError(
            f"{_RERUN} runs what a pickle holds, and relloc writes none: start the run's command again, which goes on"
        )
    given = with_one_value_each(asked.words)
    if config_name == "evaluate":
        command_line.check_bare_checkpoint(given)
    words = command_line.check(given, sweeps=asked.sweeps)
    refuse_old_names(word.key_or_group for word in words)
    explaining.check_members(words)
    explaining.check_kinds(words, config_name)
    if not any(flag.startswith(_OWN_CONFIGS) for flag in asked.flags):
        explaining.check_added(words, config_name)
    data = None
    if config_name == "evaluate":
        command_line.check_checkpoints(words)
        data = data_of_run.find_shared(words) if asked.sweeps else data_of_run.find_of_point(words)
    of_run = data.words if data else ()
    sys.argv[1:] = [*asked.flags, *of_run, *given]
    if int(os.environ.get("RANK", "0")) > 0:  # only the first writes in the run folder, Hydra too
        sys.argv += ["hydra.run.dir=${scratch:}", "hydra.output_subdir=null"]
    return data


class _Scratch:
    """What `${scratch:}` in a config is: one temporary folder, made where it is asked for and removed at the end."""

    def __init__(self, at_end: contextlib.ExitStack) -> None:
        self._at_end = at_end

    @functools.cached_property
    def _folder(self) -> str:
        return self._at_end.enter_context(tempfile.TemporaryDirectory(prefix="relloc_"))

    def __call__(self) -> str:
        return self._folder

    def __reduce__(self) -> NoReturn:
        """Launchers of others pickle Hydra's state, which this is part of, to have it composed again elsewhere."""
        raise UsageError(
            "this hydra/launcher sends Hydra itself to other processes, where a point's mistakes and end are lost: "
            "hydra/launcher=submitit_slurm and launcher=slurm submit a command for each point instead, launcher=local "
            "starts processes of this machine"
        )


@contextlib.contextmanager
def _explained(config_name: str, show_all: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        explained = None if show_all else explaining.explain(error, config_name)
        if explained is None:
            raise
        if HydraConfig.initialized():
            _remove_untouched_folder(HydraConfig.get())
        _exit(explained, getattr(error, "exit_code", EXIT_MISTAKE))
    except OSError as error:
        if show_all or error.errno not in _DISK_ERRORS + _PLACE_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _exit(
            f"{error.strerror}{where}. What was saved before stays; mend this and go on with the run's hydra.run.dir",
            EXIT_MISTAKE,
        )


def _remove_untouched_folder(made: Any) -> None:
    """Remove the folder of a refused run where it holds nothing but what Hydra wrote."""
    if made.mode == RunMode.MULTIRUN or OmegaConf.is_missing(made.runtime, "output_dir"):
        return
    run_dir = Path(made.runtime.output_dir)
    # By default Hydra writes nothing, since the folder may be another run's; this is where the user has it write.
    of_hydra = run_dir / (made.output_subdir or "")
    with contextlib.suppress(
        OSError
    ):  # it is not empty, or another process writes there, or may alone: then it stays
        expected = {of_hydra, *(of_hydra / name for name in _OF_HYDRA)}
        if made.output_subdir and {*run_dir.glob("*"), *of_hydra.glob("*")} == expected:
            for name in _OF_HYDRA:
                (of_hydra / name).unlink()
            of_hydra.rmdir()
        if not run_dir.samefile(Path.cwd()):
            run_dir.rmdir()


def _exit(explained: str, exit_code: int) -> NoReturn:
    terminal.complain(explained)
    sys.exit(exit_code)


def _say_warning(message: Warning | str, *_where: object) -> None:
    terminal.complain(message)
