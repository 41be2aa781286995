"""What torchvision, detectron2 and mmdetection are handed, and that it comes back to the bit."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from relloc.checkpoints import layouts, weight_files
from relloc.checkpoints.backbone_files import BACKBONE_FILE, digest, load_backbone, save_backbone
from relloc.checkpoints.fitting import fill
from relloc.evaluation.calibration import calibration_batches
from relloc.export import main
from relloc.features.source import EncodeConfig
from relloc.models.resnet import ResNetBackbone
from relloc.models.small import SmallBackbone
from relloc.runs.recalibrating import ENTRY, Recalibration, settings_of_words


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a ResNet-18 that has running statistics of its own."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    backbone = ResNetBackbone(depth=18)
    for name, value in backbone.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 2)
    save_backbone(folder / BACKBONE_FILE, backbone, {"model": {"name": "resnet18"}})
    return folder


@pytest.fixture(scope="module")
def backbone(run_dir: Path) -> ResNetBackbone:
    backbone = ResNetBackbone(depth=18).eval()
    backbone.load_state_dict(load_file(run_dir / BACKBONE_FILE))
    return backbone


IMAGES = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def export(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [
        ("torchvision", ".pth"),
        ("torchvision", ".safetensors"),
        ("detectron2", ".pkl"),
        ("mmdetection", ".pth"),
    ],
)
def test_it_comes_back_to_the_bit(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path, layout: str, suffix: str
) -> None:
    out = tmp_path / f"new/x{suffix}"
    assert export(run_dir, "--layout", layout, "--out", out) == 0
    found = layouts.find(weight_files.read(out), origin="x")
    other = ResNetBackbone(depth=18).eval()
    fill(other, found.fitted(other.state_dict()), "x")
    assert digest(other.state_dict()) == digest(backbone.state_dict())
    with torch.no_grad():
        maps, expected = other(IMAGES), backbone(IMAGES)
    assert all(torch.equal(maps[stage], expected[stage]) for stage in expected)


@pytest.mark.slow
def test_torchvision_loads_it_strictly_as_the_printed_lines_say(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("x.pth", ()), ("x.safetensors", ()), ("fc.pth", ("--fc", "10"))):
        assert export(run_dir, "--layout", "torchvision", "--out", tmp_path / name, *more) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"{tmp_path / name}: resnet18 in torchvision's layout\n")
        lines = [line for line in output.splitlines() if line.startswith("model")]
        given: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
        exec("import safetensors.torch\n" + "\n".join(lines), given)
        with torch.no_grad():
            answer = given["model"].eval()(IMAGES)
            expected = backbone.embed(IMAGES)
        assert torch.equal(answer, torch.zeros(1, 10) if more else expected)


def finer_file(folder: Path, **settings: Any) -> tuple[Path, ResNetBackbone]:
    """A file of relloc with a ResNet-18 of settings of its own, and its backbone."""
    torch.manual_seed(3)
    backbone = ResNetBackbone(depth=18, **settings).eval()
    node = {"_target_": "relloc.models.resnet.ResNetBackbone", "depth": 18, **settings}
    file = folder / "finer.safetensors"
    save_backbone(file, backbone, {"model": {"name": "resnet18", "backbone": node}})
    return file, backbone


@pytest.mark.parametrize("stem", ["stride_1", "no_pool"])
def test_a_finer_network_loads_into_an_unchanged_resnet_and_gets_its_strides_by_printed_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stem: str
) -> None:
    file, backbone = finer_file(tmp_path, last_stride=1, stem=stem)
    assert export(file, "--layout", "torchvision", "--out", tmp_path / "x.pth") == 0
    lines = capsys.readouterr().out.splitlines()
    code = [line for line in lines if line.startswith("model")]
    loading = [line for line in code if "stride" not in line and "maxpool" not in line]
    given: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec("\n".join(loading), given)
    with torch.no_grad():
        standard = given["model"].eval()(IMAGES)
        assert torch.equal(standard, backbone.with_standard_strides().embed(IMAGES))
        exec("\n".join(code[len(loading) :]), given)
        own = given["model"](IMAGES)
        assert torch.equal(own, backbone.embed(IMAGES))
        assert not torch.equal(own, standard)


def test_a_wider_network_is_refused_since_others_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = finer_file(tmp_path, width=0.25)
    assert export(file, "--layout", "torchvision", "--out", tmp_path / "x.pth") == 2
    assert "resnet18 width=0.25" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()


PHOTOS = (
    *("photos", "data.source.tiles=[0.4]", "data.source.stride=0.5", "view.short_px=64"),
    *("view.crop_px=56", "view.batch=8", "calibration_images=16", "device=cpu", "workers=0"),
)


@torch.no_grad()
def test_recalibrated_statistics_are_those_of_whole_images_and_weights_stay(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    line = (run_dir, "--layout", "torchvision", "--out", out, "--recalibrate", *PHOTOS)
    assert export(*line) == 0
    assert "16 images of photos train" in capsys.readouterr().out
    weights = load_file(out)
    # The first batch norm by hand: statistics of what it sees, averaged over both batches
    settings = settings_of_words(PHOTOS)
    config = EncodeConfig(
        batch=8, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0
    )
    images = settings.data.read().train
    batches = list(
        calibration_batches(images, settings.view, n_images=16, seed=settings.seed, config=config)
    )
    seen = [backbone.conv1(batch) for batch in batches]
    mean = torch.stack([maps.mean(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    variance = torch.stack([maps.var(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    assert [len(batch) for batch in batches] == [8, 8]
    torch.testing.assert_close(weights["bn1.running_mean"], mean)
    torch.testing.assert_close(weights["bn1.running_var"], variance)
    for name, value in backbone.named_parameters():
        assert torch.equal(weights[name], value)


def test_no_strides_are_advised_that_recalibrated_statistics_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, backbone = finer_file(tmp_path, last_stride=1)
    line = (file, "--layout", "torchvision", "--out", tmp_path / "x.pth", "--recalibrate", *PHOTOS)
    assert export(*line) == 0
    text = capsys.readouterr().out
    assert "last_stride=1" in text
    assert "stride = " not in text
    # Likewise of the second file that a training wrote
    _, about = load_backbone(file)
    save_backbone(file, backbone, {**about, ENTRY: {"images": 16}})
    assert export(file, "--layout", "torchvision", "--out", tmp_path / "y.pth") == 0
    assert "stride = " not in capsys.readouterr().out


def test_a_file_of_other_statistics_is_not_taken_for_that_of_a_recalibration(
    backbone: ResNetBackbone, tmp_path: Path
) -> None:
    settings = settings_of_words(PHOTOS)
    recalibration = Recalibration(
        backbone=backbone, images=settings.data.read().train, settings=settings
    )
    file = tmp_path / "x.safetensors"
    save_backbone(file, backbone, {ENTRY: {**recalibration.about, "images": 16}})
    assert recalibration.is_in(file)
    for of_others in ({"version": 0}, {"decode": "other"}, {"strides": "as_trained"}):
        save_backbone(file, backbone, {ENTRY: {**recalibration.about, **of_others}})
        assert not recalibration.is_in(file)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("nowhere",), "nowhere"),
        (("photos", "eval=[]"), "eval=[]"),
        (("photos", "calibration_images"), "calibration_images"),
        (("photos", "calibration_images=0"), "calibration_images"),
        (("photos", "data.sources=1"), "data.sources"),
        (("in1k",), "data.root"),
    ],
)
def test_images_to_recalibrate_on_are_asked_for_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.delenv("RELLOC_IN1K", raising=False)
    out = tmp_path / "x.pth"
    line = ("none", "--layout", "torchvision", "--out", out, "--recalibrate", *words)
    assert export(*line) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert named in message


def test_detectron2_finds_what_its_own_converter_writes(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run_dir, "--layout", "detectron2", "--out", tmp_path / "x.pkl") == 0
    content = pickle.loads(
        (tmp_path / "x.pkl").read_bytes(), encoding="latin1"
    )  # as detectron2 does
    model = content.pop("model")
    assert content == {"__author__": "relloc", "matching_heuristics": True}
    assert all(type(array) is np.ndarray for array in model.values())
    kernel = backbone.layer2[0].downsample[0].weight.detach()
    assert np.array_equal(model["res3.0.shortcut.weight"], kernel.numpy())
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_mean",
        "res5.1.conv2.norm.bias",
    } <= model.keys()
    output = capsys.readouterr().out
    for line in (
        f'  WEIGHTS: "{tmp_path / "x.pkl"}"',
        "  PIXEL_MEAN: [123.675, 116.28, 103.53]",
        "  PIXEL_STD: [58.395, 57.12, 57.375]",
        "    DEPTH: 18",
        "    STRIDE_IN_1X1: False",
        "    RES2_OUT_CHANNELS: 64",
        '  FORMAT: "RGB"',
    ):
        assert line in output.splitlines()


def test_mmdetection_is_told_the_file_the_style_and_the_colors(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run_dir, "--layout", "mmdetection", "--out", tmp_path / "x.pth") == 0
    state = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    assert list(state) == list(backbone.state_dict())
    output = " ".join(capsys.readouterr().out.split())  # long paths fold its lines
    assert f"init_cfg=dict(type='Pretrained', checkpoint='{tmp_path / 'x.pth'}')" in output
    assert "depth=18, style='pytorch'" in output
    assert "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True" in output


def test_a_file_of_another_project_goes_through(
    run_dir: Path, backbone: ResNetBackbone, tmp_path: Path
) -> None:
    moco = {f"module.{which}.{name}": tensor for which in ("encoder_q", "encoder_k")
            for name, tensor in backbone.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": moco}, tmp_path / "moco.pth.tar")
    line = (
        tmp_path / "moco.pth.tar",
        "--layout",
        "torchvision",
        "--out",
        tmp_path / "x.safetensors",
    )
    assert export(*line) == 2
    assert export(*line, "--checkpoint-prefix", "encoder_q") == 0
    assert digest(load_file(tmp_path / "x.safetensors")) == digest(backbone.state_dict())


def test_mistakes_are_one_message_and_leave_what_was_there(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.pth").write_bytes(b"precious")
    small = SmallBackbone(widths=[8, 8, 8, 8, 8])
    save_backbone(tmp_path / "small.safetensors", small, {"model": {"name": "small"}})
    (tmp_path / "file").write_bytes(b"")
    for checkpoint, layout, out, more, message in [
        (
            run_dir,
            "torchvision",
            "there.pth",
            (),
            "there.pth is there already",
        ),
        (
            run_dir,
            "detectron2",
            "x.pth",
            (),
            "suffixes that tell the format: torchvision: .pth or .safetensors; det",
        ),
        (
            run_dir,
            "detectron2",
            "x.pkl",
            ("--fc", 3),
            "--fc 3: it takes a number of classes",
        ),
        (run_dir, "torchvision", "x.pth", ("--fc", 0), "--fc 0: it takes a number of classes"),
        (
            run_dir,
            "torchvision",
            "x.pth",
            ("--checkpoint-prefix", "a"),
            "has no prefixes: leave --checkpoint-prefix out",
        ),
        (
            tmp_path / "none",
            "torchvision",
            "x.pth",
            (),
            "none does not exist: give a file of weights",
        ),
        (
            tmp_path / "small.safetensors",
            "mmdetection",
            "x.pth",
            (),
            "is a small, which torchvision, detectron2 and mm",
        ),
        (run_dir, "torchvision", "file/x.pth", (), "x.pth could not be written (File exists)"),
    ]:
        assert export(checkpoint, "--layout", layout, "--out", tmp_path / out, *more) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("relloc: ")
        assert output.err.count("\n") == 1
        assert message in output.err
    assert (tmp_path / "there.pth").read_bytes() == b"precious"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["file", "small.safetensors", "small.safetensors.sha256", "there.pth"]
    assert (
        export(run_dir, "--layout", "torchvision", "--out", tmp_path / "there.pth", "--force") == 0
    )
    assert weight_files.read(tmp_path / "there.pth")
