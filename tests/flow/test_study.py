"""Studies as commands, and the network of the pretext task that they read from a run folder."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TINY

from relloc.checkpoints.backbone_files import load_backbone
from relloc.checkpoints.paths import saved_trainings
from relloc.checkpoints.states import load_training
from relloc.errors import CheckpointError
from relloc.models.small import SmallBackbone
from relloc.results import read_results
from relloc.runs.pretext_models import pretext_model

pytestmark = pytest.mark.slow


def backbone_of(run: Path) -> SmallBackbone:
    weights, about = load_backbone(run)
    settings = about["model"]["backbone"]
    backbone = SmallBackbone(widths=settings["widths"])
    backbone.load_state_dict(weights)
    return backbone.eval()


def change_config(run: Path, group: str, **values: object) -> None:
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config[group] |= values
    file.write_text(yaml.safe_dump(config))


def check_neighbors(relloc: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    """Sheets and table of nearest patches have the same queries for both weights."""
    settings = {"sides_px": "[32,48]", "patch_px": 32, "n_images": 40, "queries": 5, "k": 3}
    words = [f"study.neighbors.{name}={value}" for name, value in settings.items()]
    command = ("study=neighbors", "tracking=none", "hydra.run.dir=found", *words)
    found = relloc("study", f"checkpoint=[{run},random]", *command)
    assert found.code == 0, found.text
    folders = sorted((tmp_path / "found" / "evaluations").iterdir())
    assert len(folders) == 2
    queries = []
    for folder in folders:
        assert (folder / "neighbors_embedding.png").stat().st_size > 10_000
        with open(folder / "neighbors.csv", encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        # Tiles of a photograph have one source, which gives a query one neighbor.
        assert all(line["image"] != line["query_image"] for line in lines)
        columns = [name for name in lines[0] if name.startswith("query")]
        queries.append([[line[name] for name in columns] for line in lines])
    assert queries[0] == queries[1]
    rows = read_results(tmp_path / "found")
    assert {row.kind for row in rows} == {"study"}
    # The class of a tile is its photograph, from which no neighbor is taken.
    metrics = {row.metric for row in rows}
    assert metrics == {"nearest_correlation", "mean_correlation"}
    headlines = {row.metric for row in rows if row.headline}
    assert headlines == {"nearest_correlation"}
    assert {row.n for row in rows} == {5}
    wrong = relloc("study", "checkpoint=random", *command, "study.neighbors.k=0")
    assert wrong.code == 2
    assert "study.neighbors.k is 0" in wrong.text


def check_discovery(relloc: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    """Discovered clusters have tables, sheets and the same constellations for both weights."""
    settings = {"sides_px": "[32,48]", "patch_px": 32, "n_images": 40, "n_seeds": 30, "set_size": 1}
    words = [f"study.discovery.{name}={value}" for name, value in settings.items()]
    command = ("study=discovery", "tracking=none", "hydra.run.dir=mined", *words)
    mined = relloc("study", f"checkpoint=[{run},random]", *command)
    assert mined.code == 0, mined.text
    folders = sorted((tmp_path / "mined" / "evaluations").iterdir())
    assert len(folders) == 2
    # Each folder says whose weights its pictures are of.
    about = [json.loads((folder / "about.json").read_text()) for folder in folders]
    assert {each["checkpoint"] for each in about} == {str(run / "backbone.safetensors"), "random"}
    constellations = []
    for folder in folders:
        assert (folder / "purity_coverage.png").stat().st_size > 10_000
        assert list(folder.glob("clusters*.png"))
        with open(folder / "clusters.csv", encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        lines.sort(key=lambda line: int(line["constellation"]))
        columns = ("constellation", "image", "left", "top", "side_px")
        constellations.append([[line[name] for name in columns] for line in lines])
    assert constellations[0] == constellations[1]
    rows = read_results(tmp_path / "mined")
    assert {row.kind for row in rows} == {"study"}
    assert {row.split for row in rows} == {"train"}
    assert sum(row.headline for row in rows) == 2
    wrong = relloc("study", "checkpoint=random", *command, "study.discovery.set_size=101")
    assert wrong.code == 2
    assert "study.discovery.set_size is 101" in wrong.text


def test_a_study_and_the_pretext_network_of_a_run(relloc, tmp_path):
    study = ("study=label_free", "study.label_free.n_images=50", "tracking=none")
    run = tmp_path / "run"
    trained = relloc(
        "train", *TINY, "eval=[]", *study, f"hydra.run.dir={run}", "grid.gap_px=5", "color=drop"
    )
    assert trained.code == 0, trained.text
    assert {row.eval for row in read_results(run) if row.kind != "pretext"} == {"label_free"}

    # The same study as a command of its own
    studied = relloc("study", f"checkpoint=[{run},random]", *study, "hydra.run.dir=studied")
    assert studied.code == 0, studied.text
    rows = read_results(tmp_path / "studied")
    assert {row.checkpoint for row in rows} == {str(run / "backbone.safetensors"), "random"}
    for row in rows:
        files = tmp_path / "studied" / "evaluations" / f"label_free_{row.fingerprint}"
        assert {"label_free.csv", "label_free.png"} <= {path.name for path in files.iterdir()}
    without = relloc("study", f"checkpoint={run}", "tracking=none")
    assert without.code == 2
    assert "--help study" in without.text

    check_neighbors(relloc, run, tmp_path)
    check_discovery(relloc, run, tmp_path)

    # A study that asks the head of the pretext task leaves out weights without one.
    asking = ("study=pretext", "study.pretext.places=2", "tracking=none")
    asked = relloc("study", f"checkpoint=[random,{run}]", *asking, "hydra.run.dir=asked")
    assert asked.code == 0, asked.text
    assert "skipped pretext of random" in asked.text
    rows = {row.metric: row for row in read_results(tmp_path / "asked")}
    assert {row.kind for row in rows.values()} == {"study"}
    assert {row.batch_norm for row in rows.values()} == {"as_trained"}
    assert rows["accuracy"].low is not None
    folder = tmp_path / "asked" / "evaluations" / f"pretext_{rows['accuracy'].fingerprint}"
    assert {path.name for path in folder.iterdir()} >= {"confusion.png", "by_class.csv"}
    wide = relloc("study", f"checkpoint={run}", *asking, "+study.pretext.grid=wide")
    assert wide.code == 2
    headless = relloc("study", "checkpoint=random", *asking, "model=small", "hydra.run.dir=no")
    assert headless.code == 2
    assert "checkpoint=RUN_FOLDER" in headless.text
    assert not (tmp_path / "no").exists()

    # The network of the pretext task has the trained head and the patches of the run.
    backbone = backbone_of(run)
    pretext = pretext_model(run, backbone)
    assert pretext is not None
    assert pretext.patches.grid.gap_px == 5
    assert not pretext.network.training
    state = load_training(saved_trainings(run)[-1])["model"]
    for name, tensor in pretext.network.state_dict().items():
        assert tensor.equal(state[name]), name
    milestone = saved_trainings(run)[-1]
    assert pretext_model(milestone, backbone) is not None

    # A stranger's folder can't have anything called, nor patches of another training used.
    for group, values in (
        ("color", {"_target_": "os.system", "command": "true"}),
        ("grid", {"gap_px": 6}),
        ("normalize", {"_partial_": True}),
    ):
        other = tmp_path / f"other_{group}"
        shutil.copytree(run, other)
        change_config(other, group, **values)
        with pytest.raises(CheckpointError):
            pretext_model(other, backbone)

    # Without the training's checkpoints there is no head.
    for file in saved_trainings(run):
        file.unlink()
    assert pretext_model(run, backbone) is None
