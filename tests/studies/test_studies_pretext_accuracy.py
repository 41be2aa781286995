import collections
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked_networks import (
    GRID,
    STILL,
    Certain,
    Constant,
    Linear,
    asked_context,
    image_files,
    pretext,
    trained_network,
)
from made_boxes import Boxed
from PIL import Image
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from relloc.data.image_set import Splits
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import PretextModel
from relloc.features.source import EncodeConfig
from relloc.geometry import Area, PatchGrid
from relloc.patches.color import Drop
from relloc.pretext.held_out import accuracy, count_hits, predict_positions
from relloc.pretext.questions import POSITIONS
from relloc.results import Score
from relloc.runs.monitors import held_out_crops
from relloc.studies.accuracies import Share, draw_shares, share_of
from relloc.studies.asking import Answers, ask
from relloc.studies.pretext_accuracy.boxes import places_of_pairs
from relloc.studies.pretext_accuracy.reliability import reliability
from relloc.studies.pretext_accuracy.study import Pretext

CPU = torch.device("cpu")
CONFIG = EncodeConfig(batch=16, workers=0, device=CPU, precision="fp32", unreadable_share=0.5)
STUDY = Pretext(
    split="held_out",
    n_images=None,
    places=None,
    grid=None,
    min_box_patches=2.5,
    bins=5,
    batch=4,
)


def values(scores: list[Score]) -> dict[str, float]:
    assert len({score.metric for score in scores}) == len(scores)
    return {score.metric: score.value for score in scores}


def asked(images: Any, model: PretextModel, **changes: Any) -> Answers:
    settings = {"grid": GRID, "places": None, "seed": 3, "batch": 4, "config": CONFIG}
    return ask(model, images, range(len(images)), **settings | changes)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_accuracy_and_interval_are_those_of_held_out_accuracy(tmp_path: Path) -> None:
    images = image_files(tmp_path, 30)
    # Without jitter and random colors, both ask the same questions.
    network = trained_network()
    model = pretext(network, STILL)
    scores = list(STUDY.run(asked_context(images, model, tmp_path / "out", seed=3)))
    crops = held_out_crops(images, range(30), STILL, 3, CONFIG)
    predicted = predict_positions(
        network,
        (batch.pixels for batch in crops),
        model.patches,
        seed=3,
        device=CPU,
        bf16=False,
    )
    expected = accuracy(count_hits(predicted), [images.source(index) for index in range(30)])
    first = scores[0]
    assert (first.metric, first.headline, first.n) == ("accuracy", True, 30)
    assert first.value == pytest.approx(expected.percent, rel=1e-12)
    assert first.low == pytest.approx(expected.low, rel=1e-12)
    assert first.high == pytest.approx(expected.high, rel=1e-12)
    by_position = 100 * (predicted == torch.arange(8)).double().mean(dim=0)
    for position, percent in zip(POSITIONS, by_position.tolist(), strict=True):
        assert values(scores)[f"accuracy_{position}"] == pytest.approx(percent)
    of_cats = 100 * (predicted[::2] == torch.arange(8)).double().mean()
    assert values(scores)["accuracy_class_cat"] == pytest.approx(float(of_cats))
    assert "accuracy_class_a_dog" in values(scores)
    # Each number has a cell of its own in reports
    cells = {(score.table, score.column, score.variant) for score in scores}
    assert len(cells) == len(scores)
    assert all(score.table and score.column for score in scores)
    in_table = collections.Counter(score.table for score in scores)
    n_classes = 2
    assert sorted(in_table.values()) == [1, n_classes, 3, len(POSITIONS)]


@pytest.mark.parametrize("places", [None, 5])
def test_batches_workers_and_other_images_change_no_question(
    tmp_path: Path, places: int | None
) -> None:
    images = image_files(tmp_path, 9)
    grid = dataclasses.replace(GRID, resize=Area(low_px2=1500, high_px2=4000))
    model = pretext(Linear(), grid, color=Drop(noise="gaussian"))
    one = asked(images, model, grid=grid, places=places)
    for batch, workers in ((1, 0), (100, 0), (4, 2)):
        config = dataclasses.replace(CONFIG, workers=workers)
        other = asked(images, model, grid=grid, places=places, batch=batch, config=config)
        assert torch.allclose(one.logits, other.logits, atol=1e-5)
        assert (one.pair_boxes == other.pair_boxes).all()
    alone = ask(model, images, [7], grid=grid, places=places, seed=3, batch=4, config=CONFIG)
    assert torch.allclose(one.logits[one.images == 7], alone.logits, atol=1e-5)
    again = asked(images, model, grid=grid, places=places, seed=4)
    assert not torch.allclose(one.logits, again.logits, atol=1e-2)
    assert len(one.logits) == 9 * (places or 1)


def test_pairs_lie_in_pixels_of_the_stored_image(tmp_path: Path) -> None:
    # 80 x 120 px, resized to 40 x 60: a crop of 32 at (4, 14), whose patches are 12 px apart.
    Image.new("RGB", (120, 80)).save(tmp_path / "black.png")
    images = dataclasses.replace(
        image_files(tmp_path, 1), paths=[str(tmp_path / "black.png")], labels=[0]
    )
    found = asked(images, pretext(Certain(), STILL), grid=STILL)
    assert found.patch_sides.tolist() == [[16, 16]]
    # Up left: rows 4 to 24 and columns 14 to 34, of the resized image; right: the center's rows.
    assert found.pair_boxes[0, 0].tolist() == [28, 8, 68, 48]
    assert found.pair_boxes[0, 4].tolist() == [52, 32, 92, 48]


def test_a_network_that_always_answers_the_same(tmp_path: Path) -> None:
    images = image_files(tmp_path, 10)
    logits = (0.0, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    out = tmp_path / "out"
    found = values(list(STUDY.run(asked_context(images, pretext(Constant(*logits)), out))))
    confidence = math.exp(1.5) / (math.exp(1.5) + 7)
    assert found["accuracy"] == pytest.approx(12.5)
    assert found["accuracy_up_right"] == 100
    assert found["accuracy_up"] == found["accuracy_down_left"] == 0
    assert found["mean_confidence"] == pytest.approx(100 * confidence)
    assert found["calibration_error"] == pytest.approx(100 * (confidence - 0.125))
    assert found["nll"] == pytest.approx(math.log(math.exp(1.5) + 7) - 1.5 / 8)
    # Equal confidences are in one bin.
    [line] = table(out / "reliability.csv")
    assert line == {
        "pairs": "80",
        "mean_confidence_percent": str(round(100 * confidence, 3)),
        "accuracy_percent": "12.5",
    }
    counts = table(out / "confusion.csv")
    assert [row["up_right"] for row in counts] == ["10"] * 8
    for name in ("confusion", "reliability", "by_class"):
        with Image.open(out / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 30


def test_a_network_that_is_always_right(tmp_path: Path) -> None:
    images = image_files(tmp_path, 4)
    found = list(STUDY.run(asked_context(images, pretext(Certain()), tmp_path / "out")))
    # Nothing varies: the interval is that of four right answers in four.
    exact = binomtest(4, 4).proportion_ci(0.95, method="exact")
    assert (found[0].value, found[0].high) == (100, 100)
    assert found[0].low == pytest.approx(100 * exact.low)
    assert values(found)["calibration_error"] < 1e-3


@pytest.mark.parametrize(
    ("low", "high", "is_told"), [(0, 100, False), (12.5, 12.5, False), (3, 40, True)]
)
def test_words_leave_out_an_interval_that_tells_nothing(
    low: float, high: float, is_told: bool
) -> None:
    share = Share(name="all", percent=12.5, low=low, high=high, pairs=1, images=1)
    assert ("interval" in share.in_words) == is_told
    assert "12.5 % of 1 pair " in share.in_words


def test_calibration_agrees_with_scikit_learn_and_with_a_plain_twin() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.125, 1, 1001)
    right = rng.uniform(size=1001) < confidences**2
    found = reliability(confidences, right, 10)
    true, predicted = calibration_curve(right, confidences, n_bins=10, strategy="quantile")
    assert found.accuracies == pytest.approx(true)
    assert found.confidences == pytest.approx(predicted)
    order = np.argsort(confidences)
    error = 0.0
    for part in np.array_split(order, 10):
        error += len(part) * abs(confidences[part].mean() - right[part].mean()) / 1001
    assert found.expected_error == pytest.approx(error)
    # The order of pairs does not matter, also where confidences are equal.
    rounded = confidences.round(1)
    shuffled = rng.permutation(1001)
    one, other = reliability(rounded, right, 6), reliability(rounded[shuffled], right[shuffled], 6)
    assert one.expected_error == pytest.approx(other.expected_error)
    assert one.counts.sum() == 1001
    few = reliability(confidences[:3], right[:3], 10)
    assert few.counts.tolist() == [1, 1, 1]


def test_the_likelihood_is_that_of_scikit_learn(tmp_path: Path) -> None:
    images = image_files(tmp_path, 12)
    model = pretext(Linear())
    found = values(list(STUDY.run(asked_context(images, model, tmp_path / "out", seed=3))))
    answers = asked(images, model)
    probabilities = answers.logits.double().softmax(dim=2).flatten(0, 1).numpy()
    labels = np.tile(np.arange(8), 12)
    assert found["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert found["mean_confidence"] == pytest.approx(100 * probabilities.max(axis=1).mean())


@pytest.mark.parametrize("changed", [False, True])
def test_rows_say_whether_questions_are_those_of_the_end_of_a_curriculum(
    tmp_path: Path, changed: bool
) -> None:
    model = dataclasses.replace(pretext(Linear()), changed=changed)
    first = next(STUDY.run(asked_context(image_files(tmp_path, 3), model, tmp_path / "out")))
    asked_as = [detail for detail in first.details if detail.startswith("jitter and colors (Keep)")]
    when = "as at the end of training" if changed else "as in training"
    assert asked_as == [f"jitter and colors (Keep) {when}, drawn image by image"]


def test_the_paper_s_way_is_a_matter_of_settings(tmp_path: Path) -> None:
    train, held_out = image_files(tmp_path, 20, split="train"), image_files(tmp_path, 3)
    study = dataclasses.replace(STUDY, split="train", n_images=5, places=4)
    made = asked_context(
        held_out,
        pretext(Linear()),
        tmp_path / "out",
        splits=Splits(train=train, held_out=held_out),
    )
    first = next(study.run(made))
    assert (first.on_train, first.n, first.protocol) == (True, 5, "3.12")
    assert first.details[0] == "160 pairs"
    other = next(dataclasses.replace(STUDY, split="train", n_images=5).run(made))
    assert (other.protocol, other.details[0]) == ("1.1", "40 pairs")
    assert str(study.view) != str(STUDY.view)


def test_intervals_are_clustered_by_image_and_leave_out_what_has_no_pair() -> None:
    right = np.zeros((6, 8), dtype=bool)
    right[[0, 1, 4]] = True
    chosen = np.ones_like(right)
    chosen[5] = False
    images = np.array([0, 0, 1, 1, 2, 3])
    sources = np.array([f"image {index}" for index in images])
    found = share_of("some", right, chosen, images, sources)
    assert found is not None
    hits = torch.tensor([8, 8, 0, 0, 8])
    expected = accuracy(hits, sources[:5].tolist())
    assert (found.percent, found.pairs, found.images) == (60, 40, 3)
    assert (found.low, found.high) == (expected.low, expected.high)
    none = share_of("wrong", np.zeros_like(right), chosen, images, sources)
    assert none is not None
    exact = binomtest(0, 3).proportion_ci(0.95, method="exact")
    assert (none.low, none.high) == (0, pytest.approx(100 * exact.high))
    assert share_of("none", right, np.zeros_like(right), images, sources) is None


def test_pictures_of_many_classes_show_the_best_and_the_worst(tmp_path: Path) -> None:
    one = share_of(
        "$a_b$", np.ones((2, 8), bool), np.ones((2, 8), bool), np.arange(2), np.array(["a", "b"])
    )
    assert one is not None
    draw_shares([one], tmp_path / "one.png", title="$one")
    draw_shares([one] * 500, tmp_path / "many.png", title="many")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "one.png") as few:
        assert few.height < many.height < 2000


def place(boxes: Any, pair: tuple[float, ...], least_patches: float = 0.0, **more: Any) -> str:
    """Where one pair lies in an image of some boxes (x y width height)."""
    images = Boxed(boxes=boxes, **more)
    pairs = np.tile(np.array(pair, dtype=np.float64), (1, 8, 1))
    sides = np.array([[10.0, 20.0]])  # of a patch: height and width
    found = places_of_pairs(
        images, np.zeros(1, dtype=np.int64), pairs, sides, least_patches=least_patches
    )
    names = {"inside": found.inside, "outside": found.outside, "across": found.across}
    [name] = [name for name, chosen in names.items() if chosen.all()]
    assert found.of_class[0, 0].tolist() == [name == "inside", False]
    return name


BOX = ((10.0, 20.0, 50.0, 30.0),)  # to x 60 and y 50


def test_a_pair_is_inside_where_the_box_around_both_patches_is() -> None:
    assert place(BOX, (10, 20, 60, 50)) == "inside"
    assert place(BOX, (30, 30, 40, 40)) == "inside"
    assert place(BOX, (30, 30, 61, 40)) == "across"
    assert place(BOX, (30, 19, 40, 40)) == "across"
    assert place(BOX, (0, 0, 100, 100)) == "across"
    assert place(BOX, (60, 20, 90, 50)) == "outside"
    assert place(BOX, (10, 50, 60, 90)) == "outside"
    assert place((), (10, 20, 60, 50)) == "outside"


def test_small_difficult_occluded_and_crowd_objects_do_not_count() -> None:
    inside = (12, 22, 20, 30)
    # 30 px are 3 patches of 10 px high, 50 px are 2.5 patches of 20 px wide.
    assert place(BOX, inside, 2.5) == "inside"
    assert place(BOX, inside, 2.51) == "across"
    for name in ("difficult", "occluded", "crowd"):
        assert place(BOX, inside, **{name: (True,)}) == "across"
    assert place(BOX, inside, occluded=(False,)) == "inside"
    # Another object around it counts all the same.
    both = (*BOX, (0.0, 0.0, 90.0, 90.0))
    assert place(both, inside, difficult=(True, False)) == "inside"


@pytest.mark.parametrize(
    ("right_end", "expected"),
    [
        # Five pairs lie left of x = 75, and the answer about one of them is right.
        (75.0, {"inside": 20, "inside_thing": 20, "across": 0}),
        (15.0, {"outside": 12.5}),
        (100.0, {"inside": 12.5, "inside_thing": 12.5}),
    ],
)
def test_accuracy_inside_and_outside_of_boxes(
    tmp_path: Path, right_end: float, expected: dict[str, float]
) -> None:
    # The image is resized to 40 x 48 px. Patches begin at columns 8, 20 and 32, so at x = 20, 50
    # and 80 of the stored image, and are 20 px wide there.
    images = Boxed(boxes=((0.0, 0.0, right_end, 100.0),), n=6, height=100, width=120)
    network = Constant(*(5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    out = tmp_path / "out"
    study = dataclasses.replace(STUDY, min_box_patches=0.5)
    scores = list(study.run(asked_context(images, pretext(network, STILL), out)))
    found = values(scores)
    by_box = {}
    for name in ("inside", "outside", "across", "inside_thing", "inside_other"):
        if f"accuracy_{name}" in found:
            by_box[name] = found[f"accuracy_{name}"]
    assert by_box == pytest.approx(expected)
    lines = {score.variant for score in scores if "boxes" in score.table}
    assert lines == {name.replace("_", " ") for name in expected}
    assert [row["place"] for row in table(out / "by_box.csv")][1:] == [
        name for name in ("inside", "outside", "across", "inside_thing") if name in expected
    ]
    assert (out / "by_box.png").is_file()
    # Images have no labels.
    assert not (out / "by_class.csv").exists()


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    images = image_files(tmp_path, 6, broken=(0, 3))
    first = next(STUDY.run(asked_context(images, pretext(Linear()), tmp_path / "out")))
    assert first.n == 4
    with pytest.raises(DataError):
        asked(image_files(tmp_path, 2, broken=(0, 1)), pretext(Linear()))


def test_networks_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    images = image_files(tmp_path, 2)
    without = asked_context(images, None, tmp_path / "out", checkpoint="random")
    with pytest.raises(UsageError, match="random"):
        next(STUDY.run(without))
    other = PatchGrid(patch_px=9, gap_px=0, jitter_px=0, resize=None)
    with pytest.raises(UsageError, match=r"study.pretext.grid.patch_px is 9.* 8 px"):
        next(
            dataclasses.replace(STUDY, grid=other).run(
                asked_context(images, pretext(Linear()), tmp_path / "out")
            )
        )
    diverged = pretext(Constant(math.nan, *([0.0] * 7)))
    with pytest.raises(UsageError, match="precision=fp32"):
        next(STUDY.run(asked_context(images, diverged, tmp_path / "out")))


def test_a_study_has_its_own_gap_if_one_is_given(tmp_path: Path) -> None:
    images = image_files(tmp_path, 2)
    wide = dataclasses.replace(STILL, gap_px=7)
    study = dataclasses.replace(STUDY, grid=wide)
    found = values(list(study.run(asked_context(images, pretext(Linear()), tmp_path / "out"))))
    hits = asked(images, pretext(Linear()), grid=wide, seed=0).logits.argmax(dim=2)
    assert found["accuracy"] == 100 * float((hits == torch.arange(8)).double().mean())


def test_the_batch_is_no_part_of_what_is_measured() -> None:
    assert repr(STUDY) == repr(dataclasses.replace(STUDY, batch=9))
    assert repr(STUDY) != repr(dataclasses.replace(STUDY, places=9))
    assert STUDY.batch_norms(["recalibrated"]) == ("as_trained",)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("split", "test"),
        ("n_images", 0),
        ("n_images", 2.5),
        ("places", 0),
        ("min_box_patches", -1.0),
        ("bins", 0),
        ("bins", True),
        ("batch", 0),
        ("grid", "wide"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting: str, value: object) -> None:
    made = dataclasses.replace(STUDY)
    object.__setattr__(made, setting, value)  # the type checker of tests would be first
    with pytest.raises(UsageError, match=f"study.pretext.{setting} is {value}: "):
        made.__post_init__()
