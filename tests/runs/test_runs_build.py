"""What is built of a config, and what is said against points of a sweep before any is started."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from annotated_sets import write_proposals, write_voc
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from relloc.data.image_set import Splits
from relloc.data.packing import Packing
from relloc.data.photos import photos
from relloc.errors import DataError, MissingData, UsageError
from relloc.pretext.relative_location import RelativeLocation
from relloc.runs import build, explaining, saving
from relloc.runs.build import refusals
from relloc.runs.data_sets import DataSet
from relloc.runs.settings import conf_dir

WIDE_JITTER = ["grid.gap_px=64", "grid.jitter_px=[0,64]"]


def composed(command: str, *words: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, list(words))


def said_of(command: str, *words: str, made_by_jobs: Sequence[str] = ()) -> str | None:
    (found,) = refusals(command, [composed(command, *words)], made_by_jobs)
    return found


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["grid.gap_px=48"], "grid needs 309 px"),
        (
            ["grid.rows=2", "pairs=adjacent", "grid.patch_px=110", "grid.jitter_px=7"],
            "grid.rows=2",
        ),
        (["~color"], "color=none"),
        (["~normalize"], "normalize="),
        (["~model"], "model="),
        (["~monitor"], "monitor.every_epochs=null"),
        (["~tracking"], "tracking=none"),
        (["experiment=mundhenk2018", "data=photos", "~grid"], "grid="),
        (["study=pretext", "rotation=quarter_turns"], "study.pretext"),
        (["grid.patch_px=0"], "grid.patch_px"),
        (["grid.jitter_px=[3,1]"], "grid.jitter_px"),
        (["schedule.warmup_epochs=9"], "warmup"),
        (
            ["recipe.images_per_step=20", "recipe.images_per_batch_norm=16"],
            "recipe.images_per_step",
        ),
        (["recipe.images_per_step=0"], "recipe.images_per_step"),
        (["images_per_forward=many"], "images_per_forward"),
        (["collapse_steps=x"], "collapse_steps"),
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
        (
            ["batch_norm=[recalibrated]", "view.batch=1", "view.crop_px=16", "model=resnet18"],
            "view.batch",
        ),
        (
            ["recipe.images_per_batch_norm=1", "grid.patch_px=16", "model=resnet18"],
            "recipe.images_per_batch_norm=1",
        ),
        (["pretext_answers=regression", "grid.patch_px=32", *WIDE_JITTER], "64 px nearer"),
        (["pretext_flip=1.5"], "pretext_flip"),
        (["pretext_flip=true"], "pretext_flip"),
        (["pretext_answers=regression", "curriculum=linear"], "curriculum.gap_px=8"),
        (["data=imagenette"], "data.root is not set"),
        (
            ["eval=voc07_svm", "eval.voc07_svm.data.root=nowhere"],
            "eval.voc07_svm.data.root=nowhere",
        ),
        (
            ["study=shortcuts", "view.short_px=64", "view.crop_px=56", "model=small"],
            "study.shortcuts.layers",
        ),
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
        (["checkpoint=random", "watch_every_s=5"], "watch_every_s=5"),
        (["checkpoint=random", "watch_patience_min=x"], "watch_patience_min=x"),
        (["watch=nowhere", "watch_every_s=0"], "watch_every_s"),
        (["watch=nowhere", "watch_patience_min=-1"], "watch_patience_min"),
        (["checkpoint=random", "tracking.uri=ftp://there"], "tracking.uri"),
        (["checkpoint=random", "data=folder", "data.root=nowhere"], "data.root=nowhere"),
    ],
)
def test_an_evaluation_that_cannot_be_is_told_by_its_setting(
    words: list[str], setting: str
) -> None:
    assert setting in (said_of("evaluate", *words) or "")


def test_nothing_is_said_against_what_can_run(tmp_path: Path) -> None:
    assert said_of("train") is None
    assert said_of("train", "grid.gap_px=39", "model=resnet18", "device=cuda", "color=drop") is None
    assert said_of("train", "grid.rows=2", "pairs=adjacent", "pretext_batch_norm=cell") is None
    assert said_of("train", "data=folder", f"data.root={tmp_path}") is None
    # Only patches that are moved apart by the jitter may be nearest to another cell.
    of_distance = ("pretext_answers=regression", "grid.patch_px=32")
    assert said_of("train", *of_distance, *WIDE_JITTER, "grid.yoked_jitter=true") is None
    of_colors = ("curriculum.treated=0", "curriculum.gap_px=null", "curriculum.jitter_px=null")
    assert said_of("train", *of_distance, "curriculum=linear", *of_colors) is None
    assert (
        said_of("train", "data=imagenette", f"data.root={tmp_path / 'new'}") is None
    )  # it is downloaded there
    assert said_of("evaluate", f"checkpoint=[{tmp_path},random,torchvision]") is None
    # Not read where every evaluation brings its own
    own = (
        "eval=voc07_svm",
        f"eval.voc07_svm.data.root={tmp_path}",
        "data=folder",
        "data.root=nowhere",
    )
    assert said_of("evaluate", "checkpoint=random", *own) is None
    # A job that copies its data to its node's own disk makes the folder there.
    staged = ("data=folder", "data.root=/local/set")
    assert said_of("train", *staged, made_by_jobs=["cp -r SET /local/set"]) is None
    assert said_of("train", *staged, made_by_jobs=["module load cuda"])


def test_what_points_share_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def check(model: RelativeLocation, patch_px: int) -> None:
        assert next(model.parameters()).is_meta  # without memory a network takes next to no time
        looked.append(model.backbone.embedding_dim)

    monkeypatch.setattr(build, "check_batch_norms", check)
    build._check_network.cache_clear()
    points = [
        composed("train", f"seed={seed}", f"grid.gap_px={gap}")
        for seed in (0, 1)
        for gap in (0, 48)
    ]
    points.append(composed("train", "report_every_steps=3"))
    points.append(composed("train", "model=resnet18"))
    found = refusals("train", points)
    build._check_network.cache_clear()
    assert [told is None for told in found] == [True, False, True, False, True, True]
    assert looked == [256, 512]


def test_what_is_built_of_a_training_is_made_once_and_shared() -> None:
    settings = build.pretraining(
        composed("train", "seed=3", "images_per_forward=64", "batch_norm=recalibrated")
    )
    assert (settings.seed, settings.images_per_forward, settings.collapse_steps) == (3, 64, None)
    assert settings.batch_norms == ["recalibrated"]
    assert settings.patches.grid is settings.patches.grid
    assert [one.name for one in settings.evaluations] == ["linear_fast", "knn"]
    assert settings.about["model"]["name"] == settings.model.name == "small"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 4  # type: ignore[misc]


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    settings = build.pretraining(composed("train", "seed=3"))
    torch.manual_seed(99)
    first, second = settings.network().state_dict(), settings.network().state_dict()
    other = dataclasses.replace(settings, seed=4).network().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.stem.0.weight"], other["backbone.stem.0.weight"])


def test_building_a_training_draws_no_random_number() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build.pretraining(composed("train", "model=resnet18"))
    assert torch.equal(torch.rand(3), expected)


def test_evaluations_of_the_same_images_list_them_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [f"eval.{name}.data.root={tmp_path}" for name in ("voc07_svm", "voc07_low_shot")]
    settings = build.evaluating(
        composed("evaluate", "checkpoint=random", "eval=[voc07_svm,voc07_low_shot,knn]", *words)
    )
    read: list[str] = []

    def listing(data: DataSet) -> Splits:
        read.append(data.setting)
        return photos(tiles=[0.4], stride=0.2)

    monkeypatch.setattr(DataSet, "read", listing)
    own = photos(tiles=[0.4], stride=0.2)
    found, left_out = settings.named_evaluations(own)
    assert left_out == {}
    assert read == ["eval.voc07_svm.data"]
    assert found[0].splits is found[1].splits
    assert found[2].splits is own
    assert (found[0].unreadable_share, found[2].unreadable_share) == (
        settings.data.unreadable_share,
        None,
    )


def test_evaluations_that_bring_their_own_data_leave_that_of_the_run_alone() -> None:
    asked = ("checkpoint=random", "eval.voc07_svm.data.root=/voc")
    assert not build.evaluating(composed("evaluate", *asked, "eval=voc07_svm")).needs_own_data
    assert build.evaluating(composed("evaluate", *asked, "eval=[voc07_svm,knn]")).needs_own_data


VARIABLES = (
    *("RELLOC_DATA", "RELLOC_VOC", "RELLOC_IN1K", "RELLOC_PLACES205"),
    *("RELLOC_COCO", "RELLOC_CITYSCAPES", "RELLOC_VOC_PROPOSALS"),
)


VIEWS = "relloc.data.views"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval=knn", "decode=gpu"], "decode is gpu"),
        (["eval=voc0712_detection", "decode=device"], "decode=device .*voc0712_detection"),
        (
            [
                "eval=linear",
                "eval.linear.augment._target_=relloc.data.views.RandomSquare",
                "decode=device",
            ],
            r"decode=device.*eval\.linear\.augment",
        ),
    ],
)
def test_decoding_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("RELLOC_VOC", "/data")
    with pytest.raises(UsageError, match=message):
        build.evaluating(composed("evaluate", "checkpoint=random", *words))


def test_decoding_on_the_device_is_taken_where_one_evaluation_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RELLOC_VOC", "/data")
    words = ["checkpoint=random", "eval=[knn,voc0712_detection]", "decode=device"]
    assert build.evaluating(composed("evaluate", *words)).decode == "device"


@pytest.mark.parametrize(
    ("evaluations", "words", "unused"),
    [
        ("voc07_svm", ["view.short_px=64", "view.crop_px=56"], ["view.short_px=64", "crop_px=56"]),
        ("voc07_svm", ["view.batch=3"], []),  # features are kept, and encoded so many at once
        ("linear_in1k", ["view.crop_px=56"], ["view.crop_px=56"]),
        ("linear", ["view.crop_px=56", "batch_norm=as_trained"], []),
        ("linear", ["view.batch=3"], []),  # of recalibrated batch norm
        ("linear", ["view.batch=3", "batch_norm=as_trained"], ["view.batch=3"]),
        ("voc0712_detection", ["view.batch=3"], ["view.batch=3"]),
        ("voc07_finetune", ["view.batch=3"], ["view.batch=3"]),
        ("cityscapes_fcn", ["view.batch=3", "view.crop_px=56"], ["crop_px=56", "view.batch=3"]),
        ("semisup_1", ["view.batch=3"], []),  # so many are tested at once
        ("semisup_1", ["view.short_px=300"], ["view.short_px=300"]),
        ("[voc0712_detection,knn]", ["view.batch=3", "view.crop_px=56"], []),  # knn has a use
        ("[voc07_svm,voc12aug_fcn]", ["view.crop_px=56"], ["view.crop_px=56"]),
        ("voc12aug_fcn", ["view.batch=64", "view.crop_px=224"], []),  # as they are anyway
    ],
)
def test_a_setting_of_the_view_that_no_evaluation_takes_is_refused(
    monkeypatch: pytest.MonkeyPatch, evaluations: str, words: list[str], unused: list[str]
) -> None:
    monkeypatch.setenv("RELLOC_DATA", "/data")
    for name in VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)
    asked = composed("evaluate", "checkpoint=random", f"eval={evaluations}", *words)
    if not unused:
        build.evaluating(asked)
        return
    with pytest.raises(UsageError) as refused:
        build.evaluating(asked)
    message = str(refused.value)
    for word in unused:
        assert word in message
    # The setting that would do something is named.
    first = evaluations.strip("[]").split(",")[0]
    assert f"eval={evaluations}" in message
    assert f"eval.{first}.view" in message


def test_all_data_sets_whose_place_nobody_said_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError) as refused:
        build.evaluating(composed("evaluate", "checkpoint=random", "eval=card"))
    first, *lines = str(refused.value).splitlines()
    assert first.startswith("16 evaluations ")
    # A line for each data set, whoever needs it: its variable, its setting, what it is, and whence.
    voc07 = "voc07_svm,voc07_low_shot,voc07_finetune_fc,voc07_finetune"
    for variable, evaluation, words in (
        ("RELLOC_VOC", f"{{{voc07}}}", "VOC2007 .*VOC site"),
        ("RELLOC_VOC", "voc0712_detection", "VOC2007 .*trainval and test.*VOC2012 .*VOC site"),
        ("RELLOC_VOC", "voc07_fast_rcnn", "VOC2007 .*VOC site.*RELLOC_VOC_PROPOSALS.*mat"),
        ("RELLOC_VOC", "voc12aug_fcn", "VOC2012 .*VOC site.*SBD"),
        ("RELLOC_PLACES205", "linear_places205", "Places site"),
        ("RELLOC_COCO", "coco_mask_rcnn_fpn_1x", "zip.*COCO site"),
        ("RELLOC_CITYSCAPES", "cityscapes_fcn", "zip.*Cityscapes site"),
    ):
        setting = re.escape(f"{variable} or eval.{evaluation}.data.root=FOLDER: ")
        (line,) = [line for line in lines if re.match(rf"\s*{setting}", line)]
        assert re.search(words, line)
    # The eighth is ImageNet.
    assert len(lines) == 8


def test_a_data_set_of_a_reader_that_asks_for_nothing_is_told_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RELLOC_DATA", raising=False)
    monkeypatch.delenv("RELLOC_VOC", raising=False)
    own = "eval.voc07_svm.data.source._target_=relloc.data.photos.photos"
    with pytest.raises(UsageError) as refused:
        build.evaluating(composed("evaluate", "checkpoint=random", "eval=voc07_svm", own))
    assert str(refused.value).endswith("RELLOC_VOC or eval.voc07_svm.data.root=FOLDER")


def test_folders_that_hold_nothing_of_any_data_set_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    asked = ["checkpoint=random", "eval=[voc07_svm,linear_in1k]", "missing_data=skip"]
    asked.append(f"eval.voc07_svm.data.root={tmp_path}")
    with pytest.raises(MissingData) as refused:
        build.evaluating(composed("evaluate", *asked)).named_evaluations(None)
    first, *lines = str(refused.value).splitlines()
    assert "2 evaluations" in first
    assert [bool(re.search("is missing.*VOC2007", line)) for line in lines] == [True, False]
    assert [bool(re.search("RELLOC_IN1K.*ImageNet", line)) for line in lines] == [False, True]


def test_of_evaluations_without_data_some_may_be_left_out_but_not_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RELLOC_DATA", "RELLOC_VOC", "RELLOC_IN1K", "RELLOC_COCO"):
        monkeypatch.delenv(name, raising=False)
    asked = ("checkpoint=random", "eval=[voc07_svm,linear_in1k,knn]", "missing_data=skip")
    own = photos(tiles=[0.4], stride=0.2)
    named, left_out = build.evaluating(composed("evaluate", *asked)).named_evaluations(own)
    assert [one.name for one in named] == ["knn"]
    assert list(left_out) == ["voc07_svm", "linear_in1k"]
    for setting, variable, where in (
        ("voc07_svm", "RELLOC_VOC", "PASCAL VOC2007"),
        ("linear_in1k", "RELLOC_IN1K", "ImageNet"),
    ):
        assert re.search(
            rf"eval\.{setting}\.data\.root=FOLDER\b.*\b{variable}\b.*\b{where}\b",
            left_out[setting],
        )
    said = said_of("evaluate", *asked, "eval=[voc07_svm,linear_in1k]") or ""
    assert said.startswith("2 evaluations ")
    said = said_of("evaluate", *asked, "missing_data=leave") or ""
    assert re.search(r"missing_data is leave\b.*\berror\b.*\bskip\b", said)


def test_images_whose_proposals_nobody_gave_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RELLOC_VOC", str(write_voc(tmp_path)))
    monkeypatch.delenv("RELLOC_VOC_PROPOSALS", raising=False)
    asked = ("checkpoint=random", "eval=[voc07_fast_rcnn,knn]", "missing_data=skip")
    own = photos(tiles=[0.4], stride=0.2)
    _, left_out = build.evaluating(composed("evaluate", *asked)).named_evaluations(own)
    setting = r"eval\.voc07_fast_rcnn\.data\.proposals=FOLDER"
    assert re.search(rf"{setting}\b.*\bRELLOC_VOC_PROPOSALS\b", left_out["voc07_fast_rcnn"])
    monkeypatch.setenv("RELLOC_VOC_PROPOSALS", str(write_proposals(tmp_path / "boxes")))
    with pytest.warns(UserWarning, match="the published set"):
        named, _ = build.evaluating(composed("evaluate", *asked)).named_evaluations(own)
    assert [one.name for one in named] == ["voc07_fast_rcnn", "knn"]


def test_a_folder_without_anything_of_the_data_set_is_missing_data_but_a_half_one_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RELLOC_DATA", raising=False)
    asked = ["checkpoint=random", "eval=[voc12aug_fcn,knn]", "missing_data=skip"]
    asked.append(f"eval.voc12aug_fcn.data.root={tmp_path}")
    own = photos(tiles=[0.4], stride=0.2)
    # As where RELLOC_VOC holds 2007 alone
    (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages").mkdir(parents=True)
    _, left_out = build.evaluating(composed("evaluate", *asked)).named_evaluations(own)
    assert re.search(r"VOC2012/JPEGImages is missing.*eval\.voc12aug_fcn", left_out["voc12aug_fcn"])
    (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(DataError, match="SegmentationClass is missing"):
        build.evaluating(composed("evaluate", *asked)).named_evaluations(own)
    with pytest.raises(DataError, match="/nowhere is not a folder"):
        build.evaluating(
            composed("evaluate", *asked, "eval.voc12aug_fcn.data.root=/nowhere")
        ).named_evaluations(own)


@pytest.mark.parametrize(
    ("preset", "proposed"), [("card2022", "data=in1k"), ("nowhere", "in1k, "), ("", "in1k, ")]
)
def test_a_preset_given_to_prepare_is_answered_with_the_data_set_to_name(
    preset: str, proposed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = f"experiment={preset}"
    monkeypatch.setattr(sys, "argv", ["prepare", word])
    mistake = ConfigCompositionException("Could not override 'experiment'.")
    message = explaining.explain(mistake, "prepare") or ""
    assert proposed in message
    assert "data=" in message
    assert word in message


def test_a_preset_of_another_command_is_told() -> None:
    with pytest.raises(UsageError, match=r"python -m relloc\.evaluate"):
        build.pretraining(composed("evaluate", "checkpoint=random"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Packing(short_px=292, quality=90, subsampling="4:2:0", images_per_shard=5000)),
        (
            ["format=pixels", "short_px=336"],
            Packing(short_px=336, format="pixels", enlarge=True, images_per_shard=500),
        ),
        (
            ["format=pixels", "enlarge=false", "images_per_shard=7", "quality=null"],
            Packing(short_px=292, format="pixels", images_per_shard=7),
        ),
        (
            ["enlarge=true", "quality=80"],
            Packing(
                short_px=292, quality=80, subsampling="4:2:0", images_per_shard=5000, enlarge=True
            ),
        ),
    ],
)
def test_the_format_of_packing_decides_what_is_not_given(
    words: list[str], expected: Packing
) -> None:
    assert build.preparing(composed("prepare", *words)).packing == expected


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["out=''"], "out= names no folder"),
        (
            ["out=there", "data=folder", "data.shards=/packed"],
            "data.shards",
        ),
        (["workers=0"], "workers is 0"),
        (["short_px=0"], "short_px is 0"),
        (["quality=101"], "quality is 101"),
        (["subsampling='4:1:1'"], "subsampling is 4:1:1"),
        (["format=png"], "format is png"),
        (["format=null"], "format is None"),
        (["format=pixels", "quality=95"], "quality is 95"),
        (["format=pixels", "subsampling=4:4:4"], "subsampling is 4:4:4"),
        (["images_per_shard=0"], "images_per_shard is 0"),
    ],
)
def test_a_packing_that_cannot_be_is_told_by_its_setting(words: list[str], setting: str) -> None:
    with pytest.raises(UsageError, match=re.escape(setting)):
        build.preparing(composed("prepare", *words))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("milestones", 5, r"milestones is 5: .*\[5\]"),
        ("milestones", ["abc"], r"milestones is \['abc'\]: .*numbers of 0 or more"),
        ("save_every_s", "abc", "save_every_s is abc: .* 0 or more"),
        ("bank_gib", "abc", "bank_gib is abc: .* 0 or more"),
        ("seed", 1.5, "seed is 1.5: .*whole number .*0 or more"),
        ("batch_norms", ["fresh"], r"batch_norm is \['fresh'\]: .* as_trained, recalibrated"),
        ("batch_norms", [], r"batch_norm is \[\]: .* as_trained, recalibrated"),
        ("collapse_steps", "x", "collapse_steps is x: .*whole number .*1 or more"),
        (
            "images_per_step",
            "many",
            "recipe.images_per_step is many: .*whole number .*1 or more",
        ),
    ],
)
def test_settings_check_themselves(name: str, value: object, message: str) -> None:
    settings = build.pretraining(composed("train"))
    object.__setattr__(
        settings, name, value
    )  # of whatever type: the type checker of tests would be first
    with pytest.raises(UsageError, match=f"^{message}"):
        settings.__post_init__()


RECORDED = Path(__file__).parent / "recorded" / "training_version_0.json"


@pytest.mark.parametrize(
    ("words", "changed"), [((), ""), (("optimizer.lr=0.4",), "optimizer.lr was 0.8, now 0.4")]
)
def test_a_training_that_was_begun_before_recipes_is_known_by_its_settings(
    words: Sequence[str], changed: str
) -> None:
    """`recorded/` has the default run's identity from when data sets held rates and spans."""
    noted = json.loads(RECORDED.read_text())
    now = build.pretraining(composed("train", *words)).identity
    of_the_images = {
        name: noted[name] for name in ("precision", saving.RANDOM_NUMBERS, "training images")
    }
    assert saving.difference(noted, {**now, **of_the_images}) == changed
