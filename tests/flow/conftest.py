"""Commands as a user runs them: in a process of their own, in an empty folder."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The photographs at a scale at which a run takes a second.
TINY = (
    *("data.source.tiles=[0.4]", "data.source.stride=0.5", "data.images_per_step=16", "data.images_per_forward=16"),
    *("grid.patch_px=16", "grid.gap_px=4", "grid.jitter_px=2", "grid.resize.px=64"),
    *("data.epochs=2", "data.warmup_epochs=0", "data.milestone_epochs=[1]", "report_every_steps=2"),
    *("view.short_px=64", "view.crop_px=56", "data.linear.epochs=2", "data.linear.milestone_epochs=[1]"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A finished command; `text` is all that it printed."""

    code: int
    text: str


Relloc = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RELLOC_", "MLFLOW_"))}
    return kept | {"RELLOC_RUNS": str(tmp_path / "runs"), "COLUMNS": "160", "HYDRA_FULL_ERROR": "0"}


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
