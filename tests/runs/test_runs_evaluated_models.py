"""Tests which backbones checkpoint= loads."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import hydra
import pytest
import torch
import torchvision

from relloc.checkpoints.backbone_files import BACKBONE_FILE, digest, save_backbone
from relloc.checkpoints.states import save_training
from relloc.errors import CheckpointError, UsageError
from relloc.evaluation.contract import EvaluatedModel
from relloc.models.resnet import ResNetBackbone
from relloc.runs import build
from relloc.runs.command_settings import Evaluating
from relloc.runs.evaluated_models import evaluated_models, supervised_weights
from relloc.runs.evaluating import _refuse_all_without_head, check_networks
from relloc.runs.naming import evaluation_name
from relloc.runs.recalibrating import ENTRY
from relloc.runs.settings import conf_dir

RESNET_18 = {
    "name": "resnet18",
    "backbone": {"_target_": "relloc.models.resnet.ResNetBackbone", "depth": 18},
}


def composed(*overrides: str) -> Evaluating:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.evaluating(hydra.compose("evaluate", list(overrides)))


def named(settings: Evaluating) -> EvaluatedModel:
    (found,) = evaluated_models(settings)
    return found


@pytest.fixture(scope="module")
def backbone() -> ResNetBackbone:
    torch.manual_seed(5)
    return ResNetBackbone(depth=18)


@pytest.fixture
def moco(tmp_path: Path, backbone: ResNetBackbone) -> Path:
    """A file with two encoders: ours, and one of zeros."""
    state = {f"module.encoder_q.{name}": tensor for name, tensor in backbone.state_dict().items()}
    zeros = {
        f"module.encoder_k.{name}": torch.zeros_like(tensor)
        for name, tensor in backbone.state_dict().items()
    }
    torch.save({"state_dict": state | zeros}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar"


def test_a_file_of_another_project_needs_no_model_and_is_named_by_its_path(
    moco: Path, backbone: ResNetBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    found = named(composed(f"checkpoint={moco}", "checkpoint_prefix=module.encoder_q"))
    assert (found.checkpoint, found.model) == (str(moco), "resnet18")
    assert digest(found.backbone.state_dict()) == digest(backbone.state_dict())
    output = capsys.readouterr().out.replace("\n", "")
    names = rf"{moco}: torchvision's names .*state_dict\.module\.encoder_q, 120 tensors"
    assert re.search(f"{names}; left out: 120 of mom", output)


def of_study(*overrides: str) -> Evaluating:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.evaluating(hydra.compose("study", list(overrides)))


def test_a_person_has_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_called(_name: str) -> NoReturn:
        raise AssertionError("a model was made")

    monkeypatch.setattr("relloc.runs.evaluated_models.model_of_conf", not_called)
    person = named(of_study("study=human"))
    assert (person.checkpoint, person.model) == ("person", "")
    assert not list(person.backbone.parameters())
    assert person.pretext is None
    assert evaluation_name([person], ["photos"], ["human"]) == "person on photos: human"


def test_a_network_whose_maps_are_too_small_for_a_study_is_refused() -> None:
    words = ("study=shortcuts", "checkpoint=random", "model=small")
    large = of_study(*words)
    models = evaluated_models(large)
    before = {name: tensor.clone() for name, tensor in models[0].backbone.state_dict().items()}
    check_networks(models, large)
    small = of_study(*words, "view.short_px=64", "view.crop_px=56")
    with pytest.raises(UsageError, match=r"study\.shortcuts\.layers"):
        check_networks(models, small)
    # The running statistics of batch norm are as they were.
    for name, tensor in models[0].backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_random_weights_of_a_sweep_are_left_out_where_a_study_asks_the_pretext_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = of_study("study=pretext", "checkpoint=random", "model=small")
    models = evaluated_models(settings)
    with pytest.raises(UsageError, match=r"checkpoint=random .*checkpoint=RUN_FOLDER"):
        _refuse_all_without_head(models, settings.evaluations)
    monkeypatch.setenv("RELLOC_SWEEP_CHECKPOINTS", json.dumps(["random", "torchvision"]))
    with pytest.raises(UsageError):
        _refuse_all_without_head(models, settings.evaluations)
    # Beside a run folder, as with checkpoint=[run,random] in one run
    monkeypatch.setenv("RELLOC_SWEEP_CHECKPOINTS", json.dumps(["run", "random"]))
    _refuse_all_without_head(models, settings.evaluations)


def test_a_path_of_bytes_that_are_no_text_is_told_as_text(tmp_path: Path, moco: Path) -> None:
    odd = shutil.copy(moco, tmp_path / os.fsdecode(b"caf\xe9.pth"))
    found = named(composed(f'checkpoint="{odd}"', "checkpoint_prefix=module.encoder_q"))
    assert found.checkpoint == rf"{tmp_path}/caf\xe9.pth"


def test_random_weights_of_a_sweep_are_of_the_model_of_its_other_points(
    tmp_path: Path, backbone: ResNetBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_backbone(tmp_path / BACKBONE_FILE, backbone, {"model": RESNET_18})
    assert named(composed("checkpoint=random")).model == "resnet50"
    monkeypatch.setenv("RELLOC_SWEEP_CHECKPOINTS", json.dumps(["random", str(tmp_path)]))
    assert named(composed("checkpoint=random")).model == "resnet18"
    assert named(composed("checkpoint=random", "model=small")).model == "small"


def test_random_weights_beside_a_file_have_its_width_and_strides(
    tmp_path: Path,
) -> None:
    finer = {**RESNET_18["backbone"], "width": 0.125, "last_stride": 1}
    torch.manual_seed(5)
    trained = ResNetBackbone(depth=18, width=0.125, last_stride=1)
    save_backbone(tmp_path / BACKBONE_FILE, trained, {"model": {**RESNET_18, "backbone": finer}})
    settings = composed(f"checkpoint=[{tmp_path},random]", "seed=3")
    file, random = evaluated_models(settings)
    assert file.weights == digest(trained.state_dict())
    torch.manual_seed(3)
    expected = ResNetBackbone(depth=18, width=0.125, last_stride=1)
    assert random.weights == digest(expected.state_dict())
    for model in (file, random):
        assert model.model == "resnet18 width=0.125"
        assert model.backbone.own_strides == "last_stride=1"


def test_recalibrated_statistics_name_the_strides_that_they_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finer = {**RESNET_18["backbone"], "width": 0.125, "last_stride": 1}
    trained = ResNetBackbone(depth=18, width=0.125, last_stride=1)
    about = {
        "model": {**RESNET_18, "backbone": finer},
        ENTRY: {"images": 32, "dataset": "photos"},
    }
    save_backbone(tmp_path / BACKBONE_FILE, trained, about)
    words = (f"checkpoint={tmp_path}", "eval=[knn]")
    (detail,) = named(composed(*words)).details
    assert "32 images" in detail
    assert "standard strides" in detail
    named(composed(*words, "strides=as_trained", "batch_norm=recalibrated"))
    assert "strides=as_trained" not in capsys.readouterr().out
    named(composed(*words, "strides=as_trained"))
    assert "strides=as_trained" in capsys.readouterr().out


def test_our_run_folder_is_the_same_subject_as_the_same_weights_elsewhere(
    tmp_path: Path, moco: Path, backbone: ResNetBackbone
) -> None:
    save_backbone(tmp_path / BACKBONE_FILE, backbone, {"model": RESNET_18})
    ours = named(composed(f"checkpoint={tmp_path}"))
    assert (ours.checkpoint, ours.model) == (str(tmp_path / BACKBONE_FILE), "resnet18")
    theirs = named(composed(f"checkpoint={moco}", "checkpoint_prefix=encoder_q", "model=resnet18"))
    assert ours.weights == theirs.weights == digest(backbone.state_dict())
    random = named(composed("checkpoint=random", "model=resnet18"))
    assert random.checkpoint == "random"
    assert random.weights != ours.weights
    with pytest.raises(CheckpointError, match=r"\(a resnet18\) does not fit .*Leave model= out"):
        named(composed(f"checkpoint={tmp_path}", "model=resnet50"))


@pytest.mark.parametrize("where", ["folder", "file", "training"])
def test_code_that_a_file_names_is_called_neither_from_a_folder_nor_from_a_file(
    tmp_path: Path, backbone: ResNetBackbone, where: str
) -> None:
    ran = tmp_path / "ran"
    node = {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": [str(ran)]}, "x"],
    }
    about = {"model": {"name": "resnet18", "backbone": node}}
    save_backbone(tmp_path / BACKBONE_FILE, backbone, about)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    trained = save_training(tmp_path, {"model": state, "about": about}, 3)
    checkpoint = {"folder": tmp_path, "file": tmp_path / BACKBONE_FILE, "training": trained}[where]
    with pytest.raises(CheckpointError, match=r"\bpathlib\.Path\.write_text .*model=NAME"):
        named(composed(f"checkpoint={checkpoint}"))
    assert not ran.exists()
    found = named(composed(f"checkpoint={checkpoint}", "model=resnet18"))  # the user's own word
    assert digest(found.backbone.state_dict()) == digest(backbone.state_dict())


def test_a_file_that_differs_from_the_hash_beside_it_is_refused_whoever_wrote_it(
    moco: Path,
) -> None:
    note = moco.with_name(f"{moco.name}.sha256")
    whole = hashlib.sha256(moco.read_bytes()).hexdigest()
    for text in ("written by another program\n", f"SHA256 ({moco.name}) = {whole.upper()}\n"):
        note.write_text(text)
        assert (
            named(composed(f"checkpoint={moco}", "checkpoint_prefix=encoder_q")).model == "resnet18"
        )
    note.write_text(f"{'0' * 64}  {moco.name}\n")
    with pytest.raises(CheckpointError, match=r"moco\.pth\.tar\.sha256"):
        named(composed(f"checkpoint={moco}", "checkpoint_prefix=encoder_q"))


def test_what_can_not_be_evaluated_is_one_message(
    tmp_path: Path, moco: Path, backbone: ResNetBackbone
) -> None:
    deep = {
        f"layer1.{block}.conv{conv}.weight": torch.ones(1)
        for block in range(4)
        for conv in (1, 2, 3)
    }
    torch.save(deep, tmp_path / "deep.pth")
    broken = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    broken["layer3.0.conv1.weight"][0] = torch.nan
    torch.save(broken, tmp_path / "nan.pth")
    save_backbone(tmp_path / BACKBONE_FILE, backbone, {"model": RESNET_18})
    prefix = "checkpoint_prefix=encoder_q"
    for words, message in [
        (
            (f"checkpoint={moco}",),
            "holds 2 backbones: state_dict.module.encoder_q, state_dict.module.encoder_k. Name one",
        ),
        (
            (f"checkpoint={moco}", prefix, "model=resnet50"),
            "missing (layer1.0.conv3.weight, layer1.0.bn3.weight, layer1.",
        ),
        (
            (f"checkpoint={tmp_path / 'deep.pth'}",),
            "4-0-0-0 bottleneck blocks, which is none of resnet18, resnet50",
        ),
        (
            (f"checkpoint={tmp_path / 'nan.pth'}",),
            "NaN or infinite weights, in 1 of 120 tensors, such as layer3.0.conv1",
        ),
        ((f"checkpoint={tmp_path}", prefix), "has no prefixes: leave checkpoint_prefix out"),
        (("checkpoint=random", "model=small", prefix), "checkpoint=random has no prefixes"),
        (
            (f"checkpoint={tmp_path / 'none'}",),
            "none does not exist: give a file of weights, or the run folder of",
        ),
    ]:
        with pytest.raises((CheckpointError, UsageError)) as raised:
            named(composed(*words))
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_without_internet_the_supervised_weights_are_read_from_the_file_that_the_message_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_internet(*_given: object, **_settings: object) -> NoReturn:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    with pytest.raises(CheckpointError) as refused:
        supervised_weights("resnet18")
    for named_there in (url, str(file), "TORCH_HOME", "checkpoint=", "model=resnet18"):
        assert named_there in str(refused.value)

    state = torchvision.models.resnet18().state_dict()
    torch.save(state, file)
    found = supervised_weights("resnet18")
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])
    # The same file may be given as a checkpoint.
    given = named(composed(f"checkpoint={file}", "model=resnet18"))
    assert digest(given.backbone.state_dict()) == digest(found)

    for damaged in (b"", b"<html>sign in</html>", file.read_bytes()[:10_000]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="delete it") as refused:
            supervised_weights("resnet18")
        assert str(file) in str(refused.value)
