"""Tests the names of runs in MLflow."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from relloc.evaluation.contract import EvaluatedModel
from relloc.models.small import SmallBackbone
from relloc.runs import build
from relloc.runs.naming import evaluation_name, pretraining_name
from relloc.runs.settings import conf_dir
from relloc.tracking import RunRecord

SHOWN = 20  # characters, in MLflow's table of runs


def name(*words: str) -> str:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return pretraining_name(build.pretraining(compose("train", list(words))), "gray")


def test_a_pretraining_tells_its_grid_first_and_then_its_length_data_model_seed_and_color() -> None:
    assert name("data=in1k", "model=resnet50") == "gap21 jit0..21 70ep in1k r50 s0 gray"
    assert (
        name("grid.gap_px=0", "grid.jitter_px=7", "seed=3") == "gap0 jit7 6ep photos small s3 gray"
    )


def test_what_else_is_done_to_patches_comes_last() -> None:
    words = (
        "grid.yoked_jitter=true",
        "grid.scale=[0.9,1.1]",
        "pretext_flip=0.5",
        "curriculum=linear",
    )
    of_patches = "yoked_jitter scaled flip curriculum"
    assert name(*words) == f"gap21 jit0..21 6ep photos small s0 gray {of_patches}"
    groups = ("chroma_blur=mundhenk2018", "aperture=mundhenk2018")
    assert name(*groups) == "gap21 jit0..21 6ep photos small s0 gray chroma_blur aperture"


def test_what_is_unusual_about_the_network_is_told() -> None:
    usual = "gap21 jit0..21 6ep photos r50 s0 gray"
    finer = ("model=resnet50", "model.backbone.last_stride=1", "model.head.embed_dim=1000")
    assert name("model=resnet50") == usual
    assert name(*finer) == f"{usual} last_stride=1 embed_dim=1000"
    together = ("model=resnet50", "normalize=patch", "pretext_batch_norm=joint")
    assert name(*together) == f"{usual} patch_normalized joint_batch_norm"
    pairs = name("model=resnet50", "pairs=adjacent")
    assert pairs == f"{usual} 40pairs"


def test_trainings_of_other_length_or_data_have_other_names() -> None:
    runs = (
        ["data=in1k"],
        [
            "data=in1k",
            "schedule.epochs=2",
            "schedule.warmup_epochs=0",
            "schedule.milestone_epochs=[]",
        ],
        ["data=photos", "schedule.epochs=2", "schedule.milestone_epochs=[]"],
        ["data=photos", "schedule.epochs=0.5", "schedule.milestone_epochs=[]"],
        ["data=folder", "data.root=/data/birds"],
        ["data=folder", "data.root=/data/cars"],
        ["data=folder", "data.root=[/data/birds,/data/cars]"],
        ["data=folder", "data.shards=/packed/boats"],
    )
    names = [name(*run) for run in runs]
    assert len(set(names)) == len(names)
    assert len({told[:SHOWN] for told in names[:4]}) > 2
    assert " birds " in names[4]
    assert all(len(told) <= 70 for told in names)


def subject(checkpoint: str, model: str = "resnet50") -> EvaluatedModel:
    return EvaluatedModel(
        backbone=SmallBackbone(widths=[8] * 5), checkpoint=checkpoint, model=model, weights=""
    )


def test_an_evaluation_tells_whose_weights_on_which_data(tmp_path: Path) -> None:
    run = tmp_path / "20261128-120000_train"
    run.mkdir()
    RunRecord(name="gap21 jit7 70ep in1k r50 s0 gray", experiment="relloc").write(run)
    ours = subject(str(run / "backbone.safetensors"))
    assert evaluation_name([ours], ["voc2007"]) == "gap21 jit7 70ep in1k r50 s0 gray on voc2007"
    kept = subject(str(run / "checkpoints" / "epoch_30.pt"))
    assert (
        evaluation_name([kept], ["voc2007"])
        == "gap21 jit7 70ep in1k r50 s0 gray epoch_30 on voc2007"
    )
    assert (
        evaluation_name([subject("random")], ["in1k", "in1k", "voc2007"])
        == "random r50 on in1k, voc2007"
    )
    # Studies of the same weights and images are told from each other.
    studies = ["neighbors", "discovery"]
    assert evaluation_name([subject("random")], ["photos"], studies) == (
        "random r50 on photos: neighbors, discovery"
    )


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/x/moco_v2.pth", "moco_v2 r50 on a"),
        ("/x/swav/checkpoint.pth", "swav/checkpoint r50 on a"),
    ],
)
def test_a_file_of_another_project_is_told_by_its_name(file: str, name: str) -> None:
    assert evaluation_name([subject(file)], ["a"]) == name


def test_a_damaged_record_costs_only_the_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    assert (
        evaluation_name([subject(str(tmp_path / "backbone.safetensors"))], ["a"])
        == f"{tmp_path.name} on a"
    )
