"""Recorded runs, for the notebooks and for what loads them."""

import sys
from pathlib import Path

import pytest
from archives import unpack

HERE = Path(__file__).parent
# Modules beside the notebooks import each other by their names alone
sys.path.insert(0, str(HERE.parents[1] / "analysis"))
RECORDED_RUNS = "/recorded/runs"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The recorded runs, in the folder that RELLOC_RUNS names."""
    folder = tmp_path / "runs"
    unpack(HERE / "recorded.tar.xz", folder)
    for file in folder.rglob("*.json*"):
        file.write_text(file.read_text().replace(RECORDED_RUNS, str(folder)))
    # MLflow keeps copies of results beside the runs, which are no runs
    copies = folder / "mlartifacts"
    copies.mkdir()
    (copies / "results.jsonl").write_bytes((folder / "long" / "results.jsonl").read_bytes())
    monkeypatch.setenv("RELLOC_RUNS", str(folder))
    monkeypatch.delenv("RELLOC_MLFLOW", raising=False)
    monkeypatch.delenv("RELLOC_SELECT", raising=False)
    return folder
