"""What tests need to have a SLURM of their own on this machine."""

import contextlib
import os
import random
import shutil
import socket
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "launchers" / "one_machine"


def environment_of(folder: Path, *, accounting: bool) -> dict[str, str]:
    """For up.sh, down.sh and SLURM's clients: a cluster in `folder`, with ports of its own."""
    needed = ("slurmctld", *(("slurmdbd", "mariadbd") if accounting else ()))
    if missing := [program for program in needed if shutil.which(program) is None]:
        pytest.skip(
            f"{' and '.join(missing)} not installed: "
            "launchers/one_machine/install.sh does that on Debian"
        )
    return {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RELLOC_", "MLFLOW_", "SLURM"))
        },
        "RELLOC_SLURM_DIR": str(folder),
        "RELLOC_SLURM_ACCT": str(int(accounting)),
        "RELLOC_SLURM_PORT": str(_free_ports()),
        "SLURM_CONF": str(folder / "slurm.conf"),
    }


def _free_ports() -> int:
    """The first of twelve ports that nothing listens to: other clusters may run beside this one."""
    for first in random.sample(range(20000, 30000, 20), 20):
        with contextlib.ExitStack() as bound, contextlib.suppress(OSError):
            for port in range(first, first + 12):
                bound.enter_context(socket.create_server(("", port)))
            return first
    raise AssertionError("no ports are free")


def left_of(folder: Path) -> list[str]:
    """What is left of a cluster: processes with its folder, its line in /etc/hosts, the folder."""
    left = [line for line in Path("/etc/hosts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().replace("\0", " ")
            if str(folder) in words + (process / "environ").read_text():
                left.append(f"{process.name}: {words}")
    return left + [str(path) for path in (folder,) if path.exists()]
