"""Tests what a pretraining works out from its settings."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.runs import build, pretraining
from relloc.runs.command_settings import Pretraining
from relloc.runs.engine import Engine
from relloc.runs.invocation import Invocation
from relloc.runs.pretraining import fastest_images_per_forward, has_kernels
from relloc.runs.settings import conf_dir, plain


@pytest.fixture(scope="module")
def settings() -> Pretraining:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.pretraining(compose("train", []))


@pytest.mark.parametrize(
    ("compiled", "world", "step", "expected"),
    [
        (False, 1, 512, 64),  # one ghost batch
        (False, 8, 512, 64),
        (True, 1, 512, 512),  # the whole step
        (True, 8, 512, 64),  # a process's share of it
        (True, 2, 512, 256),
        (True, 1, 1024, 512),  # no more than fit a GPU
        (True, 1, 960, 320),  # 960 / 3: 512 and 448 and 384 do not divide it
        (True, 1, 64 * 11, 64),  # a prime number of ghost batches
        (True, 8, 64, 64),  # nothing fits: the plan says why
    ],
)
def test_a_forward_is_a_ghost_batch_or_compiled_the_most_that_divide_a_share(
    settings: Pretraining,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    world: int,
    step: int,
    expected: int,
) -> None:
    monkeypatch.setattr("relloc.ranks.world_size", lambda: world)
    asked = dataclasses.replace(settings, images_per_step=step, images_per_batch_norm=64)
    assert fastest_images_per_forward(asked, compiled=compiled) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # By the values that layers of a patch have: patches of 96 px have 2.25 times those of
        # 64 px, layers of twice the width 2 times, and twice the rows and columns 4 times.
        (["model.backbone.last_stride=1"], 512),
        (["model.backbone.width=2"], 512),
        (["model.backbone.stem=stride_1"], 256),
        (["model.backbone.stem=stride_1", "model.backbone.width=2"], 128),
    ],
)
def test_wider_and_finer_networks_take_fewer_images_at_once(
    words: list[str], expected: int
) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        asked = build.pretraining(compose("train", ["model=resnet50", *words]))
    asked = dataclasses.replace(asked, images_per_step=512, images_per_batch_norm=64)
    assert fastest_images_per_forward(asked, compiled=True) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"compiled": False}, False),
        ({"device": torch.device("cpu")}, False),
        ({"precision": "tf32"}, False),
        ({"memory_format": "contiguous"}, False),
        ({"deterministic": True}, False),
    ],
)
def test_a_resnet_has_kernels_where_a_gpu_would_compile_it_in_bfloat16(
    changes: dict[str, object], expected: bool
) -> None:
    engine = Engine(
        device=torch.device("cuda"),
        precision="bf16",
        compiled=True,
        cuda_graphs=True,
        memory_format="channels_last",
        deterministic=False,
        workers=0,
    )
    engine = dataclasses.replace(engine, **changes)
    with torch.device("meta"):
        assert has_kernels(ResNetBackbone(depth=18), engine) == expected
        assert not has_kernels(SmallBackbone(widths=(8, 8, 8, 8, 8)), engine)


def test_what_needs_no_labels_is_proposed_for_images_without() -> None:
    assert pretraining._label_free_members() == ["label_free"]


@pytest.mark.parametrize(
    ("evaluation", "proposed"),
    [
        ("knn", {"view.short_px=64", "view.crop_px=56", "view.batch=8"}),
        # It has a view of its own, and relloc.evaluate refuses what nothing makes use of.
        ("voc07_svm", {"view.batch=8"}),
        ("voc12aug_fcn", set()),
        ("[]", {"view.short_px=64", "view.crop_px=56", "view.batch=8"}),
    ],
)
def test_the_next_command_has_the_settings_of_the_view_that_its_evaluations_take(
    monkeypatch: pytest.MonkeyPatch, evaluation: str, proposed: set[str]
) -> None:
    monkeypatch.setenv("RELLOC_VOC", "/voc")
    words = ["view.short_px=64", "view.crop_px=56", "view.batch=8", f"eval={evaluation}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", words)
    chosen = [] if evaluation == "[]" else [evaluation]
    invocation = Invocation(
        command="train",
        folder=Path("/runs/a"),
        names_folder=False,
        words=tuple(words),
        choices={"eval": chosen},
        settings=plain(config),
        files={},
    )
    names = pretraining._chosen_evaluations(invocation)
    given = pretraining._words_of_evaluations(invocation, names, build.pretraining(config))
    assert set(given) == proposed
