"""A run folder and a fresh SQLite store; the schema is built once a session (5 s) and copied."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from relloc.tracking import DatasetRecord, Journal, RunRecord, flatten, open_store

DATASETS = (
    DatasetRecord(
        name="voc07", context="train", digest="a" * 64, source="/data/voc07", n_images=5011
    ),
    DatasetRecord(
        name="voc07", context="eval", digest="b" * 64, source="/data/voc07", n_images=4952
    ),
)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    (path.parent / ".mlflow.db-killed").mkdir()
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder with a record and three journal lines (steps 0, 10, 20)."""

    def make(name: str = "run", **fields: object) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir()
        config = {
            "model": {"name": "resnet50"},
            "optimizer": {"lr": 1e-05, "epochs": 70, "nesterov": True},
        }
        record = {
            "name": name,
            "experiment": "relloc",
            "params": flatten(config),
            "datasets": DATASETS,
        }
        RunRecord(**{**record, **fields}).write(run_dir)  # type: ignore[arg-type]
        journal = Journal(run_dir)
        for step in (0, 10, 20):
            journal.log({"train/loss": 2.5 - step / 40, "train/top1": 12.5 + step}, step)
        return run_dir

    return make
