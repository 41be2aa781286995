"""Commands as a user runs them: in a process of their own, in an empty folder."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A finished command; `text` is all that it printed."""

    code: int
    text: str


Relloc = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RELLOC_", "MLFLOW_"))}
    # One thread, as torchrun sets it: sums in another order would hide whether processes compute the same.
    fixed = {"COLUMNS": "160", "HYDRA_FULL_ERROR": "0", "OMP_NUM_THREADS": "1"}
    return kept | fixed | {"RELLOC_RUNS": str(tmp_path / "runs")}


@pytest.fixture
def relloc(tmp_path: Path, environment: dict[str, str]) -> Relloc:
    """Run `python -m relloc.COMMAND ARGUMENTS` in an empty folder."""

    def run(command: str, *arguments: str, launcher: tuple[str, ...] = (), **more: object) -> Done:
        line = [sys.executable, *launcher, "-m", f"relloc.{command}", *arguments]
        result = subprocess.run(
            line, cwd=tmp_path, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=300, **more
        )
        return Done(code=result.returncode, text=result.stdout)

    return run
