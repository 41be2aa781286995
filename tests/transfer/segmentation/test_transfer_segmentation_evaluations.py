"""The evaluations of segmentation, on images made of noise and squares."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from PIL import Image

from relloc.data.annotations import VOID
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context
from relloc.features.source import EncodeConfig
from relloc.models.small import SmallBackbone
from relloc.results import Score
from relloc.transfer.cityscapes_fcn import CityscapesFcn
from relloc.transfer.segmentation.fine_tuning import FcnFineTuning
from relloc.transfer.segmentation.inference import SlidingWindows, WholeImage
from relloc.transfer.segmentation.transforms import TrainingCrops
from relloc.transfer.voc12aug_fcn import Voc12AugFcn

CPU = torch.device("cpu")
CROPS = TrainingCrops(box=(96, 64), ratio=(0.9, 1.1), crop_px=64)
WINDOWS = SlidingWindows(box=(96, 64), window_px=48, stride_px=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares:
    """Noise with a bright square, whose corner depends on the index; the last class is nowhere."""

    n: int
    split: str = "train"
    name: str = "squares"
    broken: tuple[int, ...] = ()
    labels: None = None
    classes: tuple[str, ...] = ("background", "square", "dining table")

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImage("it is broken")
        pixels = np.random.default_rng(index).integers(60, 120, (64, 96, 3), dtype=np.uint8)
        pixels[self.class_map(index) == 1] = (250, 240, 20)
        return Image.fromarray(pixels)

    def class_map(self, index: int) -> np.ndarray:
        classes = np.zeros((64, 96), dtype=np.uint8)
        left = 32 * (index % 2)
        classes[16:48, left : left + 32] = 1
        classes[:2] = VOID
        return classes

    def source(self, index: int) -> str:
        return f"square {index}"

    def digest(self) -> str:
        return "0"


def evaluation(kind: type[FcnFineTuning] = Voc12AugFcn, **changes: Any) -> FcnFineTuning:
    settings: dict[str, Any] = {
        "iterations": 4,
        "batch": 4,
        "images_per_forward": None,
        "learning_rate": 0.1,
        "lowest_rate": 1e-3,
        "power": 0.9,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "evaluate_every": 2,
        "augment": CROPS,
        "view": WholeImage(box=(96, 64)),
    }
    return kind(**{**settings, **changes})


def given(train: Any = None, held_out: Any = None, **changes: Any) -> Context:
    splits = Splits(train=train or Squares(n=6), held_out=held_out or Squares(n=3, split="val"))
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(16, 16, 32, 32, 64)).eval().requires_grad_(False)
    return context(splits=splits, **{"backbone": backbone, **changes})


def by_metric(scores: list[Score]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


@pytest.mark.parametrize(
    ("kind", "view"), [(Voc12AugFcn, WholeImage(box=(96, 64))), (CityscapesFcn, WINDOWS)]
)
def test_squares_are_found_after_a_few_iterations(
    kind: type[FcnFineTuning], view: WholeImage | SlidingWindows, tmp_path: Path
) -> None:
    curves: dict[str, list[int]] = {}

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name in numbers:
            curves.setdefault(name, []).append(step)

    folder = tmp_path / "pictures"
    one = evaluation(kind, iterations=80, evaluate_every=40, view=view)
    given_context = given(folder=folder, log=log)
    before = {name: value.clone() for name, value in given_context.backbone.state_dict().items()}
    scores = by_metric(list(one.run(given_context)))
    assert scores["miou"].value > 70
    # The headline is the mean over the classes that are somewhere.
    iou_names = {"iou_background", "iou_square"}
    assert set(scores) == {"miou", "miou_unrounded", "pixel_accuracy", *iou_names}
    # mmseg prints two decimals.
    assert scores["miou"].value == round(scores["miou_unrounded"].value, 2)
    assert scores["miou_unrounded"].value == pytest.approx(
        (scores["iou_background"].value + scores["iou_square"].value) / 2
    )
    assert [name for name, score in scores.items() if score.headline] == ["miou"]
    assert scores["miou"].n == 3
    assert scores["miou"].table == one.table
    assert not scores["iou_square"].table
    assert curves["miou"] == [40, 80]
    pictures = {path.name for path in folder.iterdir()}
    files = {"confusion.png", "confusion.csv", *(f"image_{index}.png" for index in range(3))}
    assert pictures == files
    # A copy of the backbone is trained.
    for name, value in given_context.backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_rows_name_all_that_differs_from_the_published_training(tmp_path: Path) -> None:
    (score, *_) = evaluation().run(given(folder=tmp_path))
    text = " | ".join(score.deviations)
    for words in ("6 images", "10,582", "crops of 64 px", "iterations 4", "batch 4"):
        assert words in text
    assert "tested on whole image fitted into 96 x 64 px" in text
    assert "brightness 32" in text
    assert "momentum" not in text
    assert "power" not in text


def test_numbers_of_colors_without_their_class_are_refused() -> None:
    crops = dataclasses.replace(CROPS)
    # As Hydra gives it; the type checks of the tests would refuse it as an argument.
    object.__setattr__(crops, "photometric", {"brightness": 0})
    with pytest.raises(UsageError, match=r"augment.photometric .*_target_=.*photometric\.Photo"):
        crops.__post_init__()


def test_another_seed_gives_other_losses_and_the_same_gives_the_same(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        found = []

        def log(numbers: Mapping[str, float], step: int) -> None:
            found.extend(value for name, value in numbers.items() if name == "loss")

        list(evaluation().run(given(folder=tmp_path, seed=seed, log=log)))
        return found

    assert len(losses(0)) == 2
    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_images_that_can_not_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    config = EncodeConfig(batch=4, workers=0, device=CPU, precision="fp32", unreadable_share=0.5)
    train, held_out = Squares(n=6, broken=(2,)), Squares(n=3, split="val", broken=(1,))
    given_context = given(train, held_out, folder=tmp_path, encode_config=config)
    (score, *_) = evaluation().run(given_context)
    assert score.n == 2
    assert any("tested on 2 of 3 images" in text for text in score.deviations)
    strict = dataclasses.replace(config, unreadable_share=0.0)
    with pytest.raises(DataError, match="square 1: it is broken"):
        list(evaluation().run(given(None, held_out, folder=tmp_path, encode_config=strict)))
    none = Squares(n=1, split="val", broken=(0,))
    lenient = dataclasses.replace(config, unreadable_share=1.0)
    with pytest.raises(DataError, match="none of the images of squares val"):
        list(evaluation().run(given(None, none, folder=tmp_path, encode_config=lenient)))


def test_images_without_class_maps_and_other_classes_are_refused_before_the_training() -> None:
    plain = FolderImages(name="plain", split="val", paths=[], labels=[], classes=("a",))
    with pytest.raises(UsageError, match="eval.voc12aug_fcn .* plain val"):
        evaluation().check(Splits(train=Squares(n=6), held_out=plain))
    others = Squares(n=3, split="val", classes=("background", "circle"))
    with pytest.raises(UsageError, match="eval.cityscapes_fcn: squares has 3 classes"):
        evaluation(CityscapesFcn).check(Splits(train=Squares(n=6), held_out=others))
    evaluation().check(given().splits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"power": 0}, "eval.voc12aug_fcn.power is 0"),
        ({"lowest_rate": 0.2}, "eval.voc12aug_fcn.lowest_rate is 0.2: .*0.1"),
        ({"batch": 0}, "eval.voc12aug_fcn.batch is 0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluation(**changes)


def test_any_batch_is_trained_on(tmp_path: Path) -> None:
    scores = by_metric(list(evaluation(batch=3, iterations=2).run(given(folder=tmp_path))))
    assert "2 iterations of 3 images" in scores["miou"].details
