"""Tests that new kinds of evaluations run, resume and report like the built-in ones."""

import copy
import csv
import dataclasses
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.views import Center, View
from relloc.errors import UsageError
from relloc.evaluation.contract import (
    Context,
    EvalSettings,
    EvaluatedModel,
    Evaluation,
    NamedEvaluation,
)
from relloc.features.source import EncodeConfig
from relloc.files import write_whole
from relloc.models.small import SmallBackbone
from relloc.pretext.stopping import Stopped, stop_request
from relloc.results import Result, Score, read_results
from relloc.runs.folder import UNREADABLE_FILE, RunFolder
from relloc.runs.measuring import ABOUT_FILE, evaluate_model
from relloc.runs.reusing import EvalRun, state_file
from relloc.tracking import list_artifacts_to_send, read_journal

CPU = torch.device("cpu")
ran: list[object] = []  # what evaluations did, in order: epochs of training, and names of studies


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxedImages:
    """Images of several sizes, each with as many boxes (left, top, right, bottom) as its number."""

    split: str
    n: int
    name: str = "boxed"
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(
            256, size=(64 + 8 * (index % 3), 96, 3), dtype=np.uint8
        )
        return Image.fromarray(pixels)

    def boxes(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        corner = torch.rand(1 + index % 3, 2, generator=generator)
        return torch.cat(
            [corner, corner + torch.rand(1 + index % 3, 2, generator=generator)], dim=1
        )

    def source(self, index: int) -> str:
        return f"{self.split}/{index}.png"

    def digest(self) -> str:
        return f"{self.split} {self.n}"


SPLITS = Splits(train=BoxedImages(split="train", n=6), held_out=BoxedImages(split="val", n=4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeImage:
    """What a detector sees: an image of any size. Unlike square views it can't be called."""

    def __str__(self) -> str:
        return "whole images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(Evaluation):
    """The mean box of an image, by a copy of the backbone trained on images of all sizes."""

    kind = "fine-tuned"
    labels = "own"
    version = 1
    layers = ()

    epochs: int
    stop_after: int | None = dataclasses.field(default=None, repr=False)
    view: WholeImage = dataclasses.field(default_factory=WholeImage)

    def check(self, splits: Splits) -> None:
        if not all(isinstance(split, BoxedImages) for split in (splits.train, splits.held_out)):
            raise UsageError("eval.boxes needs images with boxes")

    def run(self, context: Context) -> Iterator[Score]:
        torch.manual_seed(context.seed)
        network = nn.ModuleDict(
            {"trunk": copy.deepcopy(context.backbone), "head": nn.Linear(8, 4)}
        ).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        saved = context.state.load() or {"epochs": 0}
        if saved["epochs"]:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
        for epoch in range(saved["epochs"], self.epochs):
            ran.append(epoch)
            for index in range(len(context.splits.train)):
                optimizer.zero_grad()
                self._error(network, context.splits.train, index).backward()
                optimizer.step()
            if epoch + 1 == self.stop_after:
                os.kill(os.getpid(), signal.SIGUSR1)
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            context.state.save({"epochs": epoch + 1, **state})
        network.eval()
        n = len(context.splits.held_out)
        error = (
            sum(self._error(network, context.splits.held_out, index).item() for index in range(n))
            / n
        )
        yield Score(
            table="Detection",
            column="error",
            metric="box_error",
            unit="sides",
            higher_is_better=False,
            headline=True,
            value=error,
            n=n,
        )

    def _error(self, network: nn.ModuleDict, images: BoxedImages, index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(images.read(index))).permute(2, 0, 1)[None] / 255
        found = network["head"](network["trunk"](pixels)["feature5"].mean(dim=(2, 3)))
        return (found - images.boxes(index).mean(dim=0)).square().mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(Evaluation):
    """How far the features of images spread, as a number, a table and a picture."""

    kind = "study"
    labels = "none"
    version = 1

    layers: Sequence[str] = ("feature5",)
    view: View = dataclasses.field(default_factory=lambda: Center(short_px=64, crop_px=64))

    def run(self, context: Context) -> Iterator[Score]:
        ran.append("spread")
        ((features, _),) = context.held_out.batches(
            torch.arange(context.held_out.n), 100, self.layers
        )
        spread = features["feature5"].std(dim=0)
        table = io.StringIO()
        csv.writer(table).writerows([["number", "spread"], *enumerate(spread.tolist())])
        write_whole(context.folder / "spread.csv", table.getvalue().encode())
        picture = io.BytesIO()
        Image.fromarray((255 * spread / spread.max()).byte().numpy()[None]).save(picture, "png")
        write_whole(context.folder / "pictures" / "spread.png", picture.getvalue())
        yield Score(
            metric="spread",
            unit="",
            higher_is_better=None,
            value=float(spread.mean()),
            n=len(features["feature5"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve(Spread):
    """An evaluation with a curve, whose images may be decoded on the device."""

    may_decode_on_device = True
    layers: Sequence[str] = ()

    def run(self, context: Context) -> Iterator[Score]:
        context.log({"end": 1.0}, 1)
        yield Score(metric="end", value=1.0, n=1)


def model() -> EvaluatedModel:
    torch.manual_seed(0)
    return EvaluatedModel(
        backbone=SmallBackbone(widths=(8, 8, 8, 8, 8)),
        checkpoint="/one/backbone",
        model="small",
        weights="w",
    )


def measured(
    run_dir: Path,
    evaluations: dict[str, Evaluation],
    *batch_norms: str,
    reused_runs: Path | None = None,
) -> list[Result]:
    """The rows in the run folder once a run that evaluates the model there has ended."""
    encode_config = EncodeConfig(
        batch=4, workers=0, device=CPU, precision="fp32", unreadable_share=0.0
    )
    settings = EvalSettings(
        encode_config=encode_config,
        batch_norms=batch_norms or ("as_trained",),
        calibration_images=4,
        bank_gib=1.0,
        seed=3,
    )
    named = [
        NamedEvaluation(name=name, evaluation=one, splits=SPLITS)
        for name, one in evaluations.items()
    ]
    for one in named:
        one.check_images()
    run_dir.mkdir(exist_ok=True)
    folder = RunFolder(run_dir, None)
    with stop_request() as stop:
        run = EvalRun(
            run_dir=run_dir, folder=folder, stop=stop, save_every_s=3600, reused_runs=reused_runs
        )
        folder.summarize(evaluate_model(model(), named, settings, run))
    return list(read_results(run_dir))


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def test_curves_have_the_names_of_their_rows_whatever_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for decoder in ("", "nvJPEG"):
        monkeypatch.setattr(EncodeConfig, "decoder", decoder)
        [row] = measured(tmp_path / f"run {decoder}", {"curve": Curve()})
        [entry] = read_journal(tmp_path / f"run {decoder}")
        assert entry.metrics == {row.tracked_name: row.value}
        found[decoder] = row.tracked_name
    assert found == {"": "curve/end", "nvJPEG": "curve_nvJPEG/end"}


def test_boxes_and_a_study_become_rows_and_files_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured(
        tmp_path, {"boxes": Boxes(epochs=2), "spread": Spread()}, "as_trained", "recalibrated"
    )
    about = [
        (row.eval, row.kind, row.metric, row.unit, row.layer, row.view, row.batch_norm, row.n)
        for row in rows
    ]
    assert about == [
        ("boxes", "fine-tuned", "box_error", "sides", "", "whole images", "as_trained", 4),
        ("spread", "study", "spread", "", "", "center view 64/64 px", "as_trained", 4),
        ("spread", "study", "spread", "", "", "center view 64/64 px", "recalibrated", 4),
    ]
    assert rows[1].value != rows[2].value
    assert rows[0].tracked_name == "boxes/box_error"
    sent = list_artifacts_to_send(tmp_path)
    for row in rows[1:]:  # each of its own, named by what it is
        folder = Path("evaluations") / f"spread_{row.fingerprint}"
        assert len((tmp_path / folder / "spread.csv").read_text().splitlines()) == 1 + 8 * 2 * 2
        assert {str(folder / "spread.csv"), str(folder / "pictures" / "spread.png")} <= set(sent)
        # The name of the folder does not tell whose weights these are.
        said = json.loads((tmp_path / folder / ABOUT_FILE).read_text())
        for fact in ("checkpoint", "model", "batch_norm", "fingerprint"):
            assert said[fact] == getattr(row, fact)
        assert said["evaluation"] == "spread"
        assert said["images"] == [f"{row.dataset} {row.split}"]
        assert str(folder / ABOUT_FILE) in sent
    # Of an evaluation without files there is no folder.
    assert not list((tmp_path / "evaluations").glob("boxes_*"))
    shown = (
        capsys.readouterr()
        .out.partition("on images held out of the evaluation's training")[2]
        .splitlines()
    )
    (line,) = [line for line in shown if "box_error" in line]
    assert line.split()[-1] == f"{rows[0].value:.3f}"
    assert any(line.split()[-1:] == ["value"] for line in shown)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    both = {"boxes": Boxes(epochs=2), "spread": Spread()}
    once = measured(tmp_path, both)
    assert ran == [0, 1, "spread"]
    assert measured(tmp_path, both) == once
    assert ran == [0, 1, "spread"]
    longer = measured(tmp_path, {"boxes": Boxes(epochs=3)})
    assert longer[: len(once)] == once
    assert len(longer) == len(once) + 1


def test_what_another_run_measures_now_is_awaited_and_all_else_measured_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Waited(Exception):
        pass

    def wait(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr("relloc.runs.measuring.time.sleep", wait)
    both = {"spread": Spread(), "boxes": Boxes(epochs=2)}
    of_spread = Spread.run

    def run_with_another_beside(self: Spread, context: Context) -> Iterator[Score]:
        with pytest.raises(Waited):
            measured(tmp_path / "beside", both, reused_runs=tmp_path)
        yield from of_spread(self, context)

    monkeypatch.setattr(Spread, "run", run_with_another_beside)
    (spread,) = measured(tmp_path / "first", {"spread": Spread()}, reused_runs=tmp_path)
    assert ran == [0, 1, "spread"]  # boxes beside, but not the spread that was being measured
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("waits for spread of the same weights, which another run measures") == 1
    # The first run has ended, and what it measured is found.
    rows = measured(tmp_path / "beside", both, reused_runs=tmp_path)
    assert [(row.eval, row.measured_in) for row in rows] == [
        ("boxes", ""),
        ("spread", str(tmp_path / "first")),
    ]
    assert rows[1].value == spread.value
    assert ran == [0, 1, "spread"]


def test_results_of_fewer_images_are_marked_before_a_run_that_waits_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_spread = Spread.run

    def run_with_a_broken_image(self: Spread, context: Context) -> Iterator[Score]:
        context.encode_config.note_unreadable({"val/1.png": "broken"})
        yield from of_spread(self, context)

    monkeypatch.setattr(Spread, "run", run_with_a_broken_image)
    # The first run is not closed here, as if it had other evaluations to do.
    measured(tmp_path / "first", {"spread": Spread()}, reused_runs=tmp_path)
    assert "val/1.png" in (tmp_path / "first" / UNREADABLE_FILE).read_text()
    (row,) = measured(tmp_path / "second", {"spread": Spread()}, reused_runs=tmp_path)
    assert (row.measured_in, ran) == ("", ["spread", "spread"])


def test_boxes_that_were_stopped_go_on_to_the_same_bits(tmp_path: Path) -> None:
    (whole,) = measured(tmp_path / "whole", {"boxes": Boxes(epochs=4)})
    ran.clear()
    with pytest.raises(Stopped) as stopped:
        measured(tmp_path / "stopped", {"boxes": Boxes(epochs=4, stop_after=2)})
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert read_results(tmp_path / "stopped") == []
    assert state_file(tmp_path / "stopped", whole.fingerprint).exists()
    assert measured(tmp_path / "stopped", {"boxes": Boxes(epochs=4)}) == [whole]
    assert ran == [0, 1, 2, 3]
    assert not state_file(tmp_path / "stopped", whole.fingerprint).exists()


def test_images_without_the_labels_of_an_evaluation_are_refused_before_anything_runs() -> None:
    plain = FolderImages(name="plain", split="val", paths=[])
    splits = Splits(train=SPLITS.train, held_out=plain)
    named = NamedEvaluation(name="boxes", evaluation=Boxes(epochs=1), splits=splits)
    with pytest.raises(UsageError, match="needs images with boxes"):
        named.check_images()
    assert ran == []
