from collections.abc import Callable
from pathlib import Path

import pytest
import rows

from relloc.results import Result, append_results
from relloc.tracking import RunRecord

NewRun = Callable[..., Path]
NewResult = Callable[..., Result]
COMMIT = "6a6cf28a1b2c3d4e5f60718293a4b5c6d7e8f901"


@pytest.fixture
def result() -> NewResult:
    return rows.result


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """A run folder below runs/ that is newer than those made before it."""
    started = 0

    def new(name: str, *results: Result, commit: str | None = COMMIT) -> Path:
        nonlocal started
        started += 1
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        tags = {"relloc.commit": commit} if commit else {}
        RunRecord(name=name, experiment="relloc", tags=tags, started_ms=started).write(run_dir)
        append_results(run_dir, results)
        return run_dir

    return new
