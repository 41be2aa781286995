"""Starting a command: finding conf/, composing with Hydra, turning mistakes into one clear message.

Nothing here imports torch, so that --help and a misspelt key are answered at once.
"""

import contextlib
import difflib
import errno
import functools
import os
import re
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from relloc.errors import UsageError
from relloc.runs.launcher_words import with_one_value_each

EXIT_MISTAKE = 2
FULL_ERROR = "HYDRA_FULL_ERROR"
_ASKED_FOR_FULL = os.environ.get(FULL_ERROR)  # by the user; what we set for ourselves is not for commands we start
_RERUN = "--experimental-rerun"  # of Hydra
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
# A folder where a file should be, or the reverse
_PLACE_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG)
# What Hydra writes before it calls us where a user gives hydra.output_subdir. By default it writes nothing, since the
# folder may be another run's.
_OF_HYDRA = ["config.yaml", "hydra.yaml", "overrides.yaml"]


def conf_dir() -> Path:
    """The folder of configs: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for found in (here / "conf", here.parent / "conf"):
        if (found / "train.yaml").is_file():
            return found
    raise UsageError(f"conf/ is neither in {here} nor beside it: install relloc again")


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for commands that this one starts."""
    given = {name: value for name, value in os.environ.items() if name != FULL_ERROR}
    return given | ({FULL_ERROR: _ASKED_FOR_FULL} if _ASKED_FOR_FULL is not None else {})


def launch(task: Callable[[DictConfig], None], config_name: str) -> NoReturn:
    """Compose the config from the command line, run `task`, and exit.

    Mistakes that a user can make end in one message on stderr and exit code 2, Ctrl-C in 130.
    HYDRA_FULL_ERROR=1 shows where an error was raised instead. conf/ may name `${scratch:}` where
    Hydra wants a folder that nobody needs: it is a temporary one.
    """
    show_all = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # errors reach the lines below instead of Hydra's printer
    if int(os.environ.get("RANK", "0")) > 0:
        sys.argv += _silent_rank()
    sys.argv[1:] = with_one_value_each(sys.argv[1:])
    warnings.showwarning = _say_warning
    if any(word.startswith("--e") and _RERUN.startswith(word.partition("=")[0]) for word in sys.argv[1:]):
        _exit(
            f"{_RERUN} runs what a pickle holds, and relloc writes none: start the run's command again, which goes on"
        )
    start = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)

    @functools.wraps(task)
    def explained_task(config: DictConfig) -> None:
        with _explained(config_name, show_all):  # inside too, where Hydra has not commented on it yet
            refuse_chdir(HydraConfig.get())
            task(config)

    _digits_of.cache_clear()
    with _scratch_folder(), _explained(config_name, show_all):
        start(explained_task)()
    sys.exit(0)


def refuse_chdir(made: Any) -> None:
    """Raises `UsageError` where Hydra goes into the run's folder, or has: relative paths would count from there."""
    if made.job.chdir:
        os.chdir(made.runtime.cwd)
        raise UsageError(
            "hydra.job.chdir=true is not for relloc, whose runs have relative paths count from the folder of the "
            "command: leave it out"
        )


@functools.cache
def _digits_of(_pid: int) -> str:
    return secrets.token_hex(3)


def _unique() -> str:
    """What `${unique:}` in a config is: digits that tell this command from another of the same second."""
    return _digits_of(os.getpid())


# For all who compose conf/, also without `launch`, since the default names of runs and sweeps have it.
OmegaConf.register_new_resolver("unique", _unique, replace=True)


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
def _scratch_folder() -> Iterator[None]:
    with contextlib.ExitStack() as at_end:
        OmegaConf.register_new_resolver("scratch", _Scratch(at_end), replace=True)
        yield


@contextlib.contextmanager
def _explained(config_name: str, show_all: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        explained = None if show_all else _explain(error, config_name)
        if explained is None:
            raise
        if HydraConfig.initialized():
            _remove_untouched_folder(HydraConfig.get())
        _exit(explained, getattr(error, "exit_code", EXIT_MISTAKE))
    except OSError as error:
        if show_all or error.errno not in _DISK_ERRORS + _PLACE_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _exit(f"{error.strerror}{where}. What was saved before stays; mend this and go on with the run's hydra.run.dir")


def _remove_untouched_folder(made: Any) -> None:
    """Remove the folder of a refused run where it holds nothing but what Hydra wrote."""
    if made.mode == RunMode.MULTIRUN:
        return
    run_dir = Path(made.runtime.output_dir)
    if made.output_subdir is not None and _names(run_dir) == [made.output_subdir]:
        _remove(run_dir / made.output_subdir, _OF_HYDRA)
    _remove(run_dir, [])


def _remove(folder: Path, files: Sequence[str]) -> None:
    """Remove a folder if `files` are all it holds; not where we stand."""
    if _names(folder) != files or folder.samefile(Path.cwd()):
        return
    with contextlib.suppress(OSError):  # another process writes there, or may alone: then it stays
        for name in files:
            (folder / name).unlink()
        folder.rmdir()


def _names(folder: Path) -> list[str] | None:
    """What a folder holds; None where there is none that can be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return None


def _exit(explained: str, exit_code: int = EXIT_MISTAKE) -> NoReturn:
    print(f"relloc: {explained}", file=sys.stderr)
    sys.exit(exit_code)


def _say_warning(message: Warning | str, *_where: object) -> None:
    print(f"relloc: {message}", file=sys.stderr)


def _silent_rank() -> list[str]:
    """Overrides that keep Hydra on all ranks but the first from writing in the run folder."""
    return ["hydra.run.dir=${scratch:}", "hydra.output_subdir=null"]


def _explain(error: Exception, config_name: str) -> str | None:
    """One message for a user's mistake; None for an error inside a call that is none."""
    if isinstance(error, InstantiationException):
        return _explain_call(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, member = error.missing_cfg_file.rpartition("/")
        members = _members(group)
        near = difflib.get_close_matches(member, members, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        return f"there is no {group}={member}. {hint}There are {', '.join(members)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=VALUE (see --help)"
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return _explain_key(unknown[1], config_name)
    return str(error)


def _explain_call(error: InstantiationException) -> str | None:
    cause = error.__cause__
    if isinstance(cause, ValueError | UsageError):
        return str(cause)
    return str(error) if isinstance(cause, TypeError) else None


def _explain_key(wrong: str, config_name: str) -> str:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        known = list(_keys(OmegaConf.to_container(hydra.compose(config_name, _chosen_groups()), resolve=False)))
    parent, _, name = wrong.rpartition(".")
    having = [member for member in _members(parent) if name in OmegaConf.load(conf_dir() / parent / f"{member}.yaml")]
    swept = [word for word in sys.argv[1:] if word.startswith(f"{parent}=") and "," in word]
    if having and swept:  # Hydra composes the default member first, with all that is not swept
        return f"{wrong} can't be given beside {swept[0]}: start one command for each {parent}"
    if having:
        return f"there is no setting {wrong} here. It belongs to {', '.join(f'{parent}={member}' for member in having)}"
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.8) or difflib.get_close_matches(wrong, known, n=1)
    if near and (near[0] in siblings or not siblings):
        return f"there is no setting {wrong}. Did you mean {near[0]}?"
    if siblings and parent:
        names = ", ".join(name.rpartition(".")[2] for name in siblings)
        return f"there is no setting {wrong}: {parent} has {names}"
    return f"there is no setting {wrong}. See --help for the settings there are"


def _members(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) if group else []


def _chosen_groups() -> list[str]:
    """The command line's group=member words, which decide what settings there are."""
    words = [word for word in sys.argv[1:] if (conf_dir() / word.partition("=")[0]).is_dir()]
    return [word for word in words if "=" in word and "," not in word]


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name == "_target_":
                continue
            yield f"{prefix}{name}"
            yield from _keys(child, f"{prefix}{name}.")
