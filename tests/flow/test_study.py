"""Studies as commands, and the network of the pretext task that they read from a run folder."""

import shutil
from pathlib import Path

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
    without = relloc("study", f"checkpoint={run}", "tracking=none")
    assert without.code == 2
    assert "--help study" in without.text

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
