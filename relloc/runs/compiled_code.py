"""Keeps what torch.compile makes beside the runs, so that later processes start at once."""

import fcntl
import os
from pathlib import Path

from torch._functorch import config as autograd_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

FOLDER = ".compiled"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable that names torch's folder for compiled code."""


def keep_compiled_code(runs: Path) -> None:
    """Makes torch.compile use a folder below `runs` as its cache, before anything is compiled.

    If the user has set TORCHINDUCTOR_CACHE_DIR, the folder that it names is used instead. torch
    finds compiled code by a hash of the computation, of its own version and of the card, and writes
    each file at one go, so that many processes can share the folder.
    """
    # A network with an `autograd.Function`, such as ghost batch norm, is traced and differentiated
    # anew in each process by default. The switch is off in torch 2.11 to 2.15 only until it has
    # been tried more widely (pytorch pull request 149751): the hash covers both directions of such
    # a function.
    autograd_config.autograd_cache_allow_custom_autograd_functions = True
    named = os.environ.get(VARIABLE, "")
    if named and not is_torchs_default(named):
        return
    folder = runs.absolute() / FOLDER
    # Otherwise torch's default remains, a folder of the system's temporary directory.
    if _is_usable(folder):
        os.environ[VARIABLE] = str(folder)


def is_torchs_default(folder: str) -> bool:
    """Returns whether torch sets `VARIABLE` to this folder itself, as it does while imported.

    It is a folder of the temporary directory of this process.
    """
    return Path(folder).resolve() == Path(default_cache_dir()).resolve()


def _is_usable(folder: Path) -> bool:
    """Makes the folder; returns whether only this user may write to it, and locks work there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Files of the folder are run as programs: nobody else may put them there.
        status = folder.stat()
        others_may_write = bool(status.st_mode & 0o022)
        if status.st_uid != os.getuid() or others_may_write:
            return False
        # torch locks some files, which network file systems may refuse.
        with open(folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return False
    return True
