"""What is said against points before any is started."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from relloc.models.backbone import Backbone
from relloc.runs import assemble
from relloc.runs.foreseeing import refusals
from relloc.runs.settings import conf_dir

Point = tuple[DictConfig, dict[str, Any]]


def composed(command: str, *words: str) -> Point:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose(command, list(words))
    return config, OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def said_of(command: str, *words: str, made_by_jobs: Sequence[str] = ()) -> str | None:
    (found,) = refusals(command, [composed(command, *words)], made_by_jobs)
    return found


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["grid.gap_px=48"], "grid needs 309 px"),
        (["grid.patch_px=0"], "grid.patch_px"),
        (["grid.jitter_px=[3,1]"], "grid.jitter_px"),
        (["schedule.warmup_epochs=9"], "warmup"),
        (["recipe.images_per_step=20", "recipe.images_per_batch_norm=16"], "recipe.images_per_step"),
        (["recipe.images_per_step=0"], "recipe.images_per_step"),
        (["images_per_forward=many"], "images_per_forward"),
        (["collapse_steps=x"], "collapse_steps"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["seed=-1"], "seed"),
        (["eval.knn.layers=[feature9]"], "layers"),
        (["batch_norm=other"], "batch_norm"),
        (["grid.gap_px=ten"], "PatchGrid"),
        (["view.crop_px=0"], "view.crop_px"),
        (["grid.patch_px=2.5"], "patch_px"),
        (["grid.jitter_px=[0,1.5]"], "jitter"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["optimizer.lr=nan"], "optimizer.lr"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay"),
        (["optimizer.lr_images_per_step=0"], "optimizer.lr_images_per_step"),
        (["device=cuda:x"], "device"),
        (["precision=fp8"], "precision"),
        (["memory_format=other"], "memory_format"),
        (["compile=sometimes"], "compile"),
        (["workers=-2"], "workers"),
        (["tracking.uri=ftp://there"], "tracking.uri"),
        (["data=folder"], "data.root is not set"),
        (["data=folder", "data.root=nowhere"], "data.root=nowhere"),
        (["data=folder", "data.root=[/,nowhere]"], "data.root=nowhere"),
        (["data.shards=nowhere"], "data.shards=nowhere"),
        (["tracking.uri=host:5000"], "tracking.uri"),
        (["tracking.experiment=''"], "tracking.experiment"),
        (["batch_norm=[recalibrated]", "view.batch=1", "view.crop_px=16", "model=resnet18"], "view.batch"),
        (["recipe.images_per_batch_norm=1", "grid.patch_px=16", "model=resnet18"], "recipe.images_per_batch_norm=1"),
        (["data=imagenette"], "data.root is not set"),
        (["eval=voc07_svm", "eval.voc07_svm.data.root=nowhere"], "eval.voc07_svm.data.root=nowhere"),
    ],
)
def test_a_training_that_cannot_be_is_told_by_its_setting(
    monkeypatch: pytest.MonkeyPatch, words: list[str], setting: str
) -> None:
    monkeypatch.delenv("RELLOC_DATA", raising=False)
    assert setting in (said_of("train", *words) or "")


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere"),
        (["checkpoint=[random,nowhere]"], "checkpoint=nowhere"),
        (["checkpoint=[]"], "checkpoint=[]"),
        (["checkpoint=random", "eval=[]"], "eval=[]"),
        (["checkpoint=random", "precision=fp8"], "precision"),
        (["checkpoint=random", "tracking.uri=ftp://there"], "tracking.uri"),
        (["checkpoint=random", "data=folder", "data.root=nowhere"], "data.root=nowhere"),
    ],
)
def test_an_evaluation_that_cannot_be_is_told_by_its_setting(words: list[str], setting: str) -> None:
    assert setting in (said_of("evaluate", *words) or "")


def test_nothing_is_said_against_what_can_run(tmp_path: Path) -> None:
    assert said_of("train") is None
    assert said_of("train", "grid.gap_px=39", "model=resnet18", "device=cuda", "color=drop") is None
    assert said_of("train", "data=folder", f"data.root={tmp_path}") is None
    assert said_of("train", "data=imagenette", f"data.root={tmp_path / 'new'}") is None  # it is downloaded there
    assert said_of("evaluate", f"checkpoint=[{tmp_path},random,torchvision]") is None
    # Not read where every evaluation brings its own
    own = ("eval=voc07_svm", f"eval.voc07_svm.data.root={tmp_path}", "data=folder", "data.root=nowhere")
    assert said_of("evaluate", "checkpoint=random", *own) is None
    # A job that copies its data to its node's own disk makes the folder there.
    staged = ("data=folder", "data.root=/local/set")
    assert said_of("train", *staged, made_by_jobs=["cp -r SET /local/set"]) is None
    assert said_of("train", *staged, made_by_jobs=["module load cuda"])


def test_what_points_share_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def backbone(model: DictConfig) -> Backbone:
        if torch.get_default_device().type != "meta":  # one without memory takes next to no time
            made.append(model.name)
        return _plain(model)

    monkeypatch.setattr("relloc.runs.assemble.backbone", backbone)
    points = [composed("train", f"seed={seed}", f"grid.gap_px={gap}") for seed in (0, 1) for gap in (0, 48)]
    points.append(composed("train", "optimizer.lr=0.5"))
    points.append(composed("train", "model=resnet18"))
    found = refusals("train", points)
    assert [told is None for told in found] == [True, False, True, False, True, True]
    assert made == ["small", "resnet18"]


def _plain(model: DictConfig) -> Any:
    return assemble.call(OmegaConf.create(dict(model)).backbone)
