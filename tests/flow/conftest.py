"""Commands as a user runs them, in an empty folder."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import FIXED, start

FAST = "test_whole_path.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != FAST:
            item.add_marker("slow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A finished command; `text` is all that it printed."""

    code: int
    text: str


Relloc = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RELLOC_", "MLFLOW_"))
    }
    return {**kept, **FIXED, "RELLOC_RUNS": str(tmp_path / "runs")}


@pytest.fixture
def relloc(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Relloc:
    """Runs `python -m relloc.COMMAND ARGUMENTS` in an empty folder.

    With `fresh` it has an interpreter of its own. Otherwise it is forked from one that has relloc
    imported, which costs a tenth. `through` names a module with its arguments that, as torchrun,
    gets `-m relloc.COMMAND ARGUMENTS`.
    """

    def run(
        command: str,
        *arguments: str,
        through: tuple[str, ...] = (),
        fresh: bool = False,
        processes: int = 1,
        **more: object,
    ) -> Done:
        line = [*through, *(("-m",) if through else ()), f"relloc.{command}", *arguments]
        if not fresh:
            output = tmp_path_factory.mktemp("output") / "output.txt"
            command = start(
                *line, folder=tmp_path, output=output, environment=environment, processes=processes
            )
            return Done(code=command.wait(600), text=command.text)
        result = subprocess.run(
            [sys.executable, "-m", *line],
            cwd=tmp_path,
            env=environment,
            stdout=-1,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            **more,
        )
        return Done(code=result.returncode, text=result.stdout)

    return run
