"""The VOC07 evaluations beside the published pipeline, which was written with scikit-learn."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch
from contexts import context
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torch import Tensor

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.shards import ShardImages
from relloc.data.views import Squash
from relloc.errors import DataError, UsageError
from relloc.evals.low_shot import Voc07LowShot, draw
from relloc.evals.voc07_svm import Voc07Svm
from relloc.evaluation.contract import Context, NamedEvaluation
from relloc.features.bank import Bank
from relloc.results import CHOSEN_WITHOUT_TEST, Result, Score

CPU = torch.device("cpu")
VIEW = Squash(short_px=256, side_px=224)
COSTS = (1e-4, 0.01, 1.0, 10.0)
CLASSES = ("bird", "cat", "dog")
LAYER = "feature4"


def bank(n: int, seed: int, present: Tensor | None = None) -> Bank:
    """Features that tell of three classes, of which an image shows any; some are difficult."""
    rng = torch.Generator().manual_seed(seed)
    if present is None:
        present = torch.where(torch.rand(n, 3, generator=rng) < 0.3, 1, -1)
        present[torch.rand(n, 3, generator=rng) < 0.08] = 0
    directions = torch.randn(3, 30, generator=torch.Generator().manual_seed(9))
    rows = (
        (present != -1).float() @ directions * 0.5 + torch.randn(n, 30, generator=rng) + 0.5
    ).relu()
    return Bank(features={LAYER: rows}, labels=present, n_classes=3, channels={LAYER: 30})


@pytest.fixture(scope="module")
def sets() -> Context:
    return context(bank(120, 0), bank(80, 1), classes=CLASSES)


def svm(**changes: object) -> Voc07Svm:
    return Voc07Svm(
        **{"layers": (LAYER,), "view": VIEW, "costs": COSTS, "folds": 3, "batch": 50, **changes}
    )  # type: ignore[arg-type]


def low_shot(**changes: object) -> Voc07LowShot:
    settings = {
        "layers": (LAYER,),
        "view": VIEW,
        "shots": (1, 2),
        "draws": 3,
        "costs": COSTS,
        "batch": 50,
    }
    return Voc07LowShot(**{**settings, **changes})  # type: ignore[arg-type]


def scores_of(
    evaluation: Voc07Svm | Voc07LowShot, sets: Context, seed: int = 0
) -> dict[str, Score]:
    return {score.metric: score for score in evaluation.run(dataclasses.replace(sets, seed=seed))}


def normalized(source: Bank) -> np.ndarray:
    rows = source.features[LAYER].double().numpy()
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def published_svm(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-8, max_iter=1_000_000, dual=True)


def published_ap(scores: np.ndarray, labels: np.ndarray) -> float:
    """All-point average precision of images that are not difficult, by its definition."""
    kept = labels != 0
    positive = (labels[kept] == 1)[np.argsort(-scores[kept])]
    precision = np.cumsum(positive) / np.arange(1, len(positive) + 1)
    best_later = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * float(best_later[positive].mean())


def test_svm_equals_the_published_pipeline(sets: Context) -> None:
    x, z = normalized(sets.train), normalized(sets.held_out)
    aps, validated = [], []
    for c in range(3):
        y = np.where(
            sets.train.labels[:, c].numpy() == 1, 1, -1
        )  # difficult images are negative in training
        svms = [published_svm(cost) for cost in COSTS]
        by_cost = [
            cross_val_score(one, x, y, cv=3, scoring="average_precision").mean() for one in svms
        ]
        fitted = published_svm(COSTS[int(np.argmax(by_cost))]).fit(x, y)
        validated.append(100 * max(by_cost))
        aps.append(published_ap(fitted.decision_function(z), sets.held_out.labels[:, c].numpy()))
    found = scores_of(svm(), sets)
    assert found["map"].value == pytest.approx(np.mean(aps), abs=1e-2)
    assert found["map_cv"].value == pytest.approx(np.mean(validated), abs=1e-2)
    assert (found["map"].n, found["map_cv"].n) == (80, 120)
    assert (found["map"].on_train, found["map_cv"].on_train) == (False, True)
    assert found["map"].deviations == ()
    assert [score.metric for score in found.values() if score.headline] == ["map"]
    assert found["map_cv"].table == ""  # a detail


def test_low_shot_equals_the_published_pipeline(sets: Context) -> None:
    """Two draws of seed 7: the chosen cost is neither the first nor always the best on test."""
    x, z = normalized(sets.train), normalized(sets.held_out)
    labels, tested = sets.train.labels.numpy(), sets.held_out.labels.numpy()
    found = scores_of(low_shot(draws=2, shots=(1, 2, 3)), sets, seed=7)
    choices = []
    for k in (1, 2, 3):
        drawn = draw(sets.train.labels, range(3), k, 2, 7).numpy()
        on_test, on_rest, on_all = np.zeros(
            (3, 2, len(COSTS), 3)
        )  # draws, costs and classes of each
        for c, number, index in itertools.product(range(3), range(2), range(len(COSTS))):
            rows = drawn[c, number]
            fitted = published_svm(COSTS[index]).fit(x[rows], np.where(labels[rows, c] == 1, 1, -1))
            rest = np.setdiff1d(np.arange(len(x)), rows)
            on_test[number, index, c] = published_ap(fitted.decision_function(z), tested[:, c])
            on_rest[number, index, c] = published_ap(
                fitted.decision_function(x[rest]), labels[rest, c]
            )
            on_all[number, index, c] = published_ap(fitted.decision_function(x), labels[:, c])
        best, chosen, circular = (
            int(one.mean(axis=(0, 2)).argmax()) for one in (on_test, on_rest, on_all)
        )
        values = on_test.mean(axis=2)
        by_draw = values[:, best]
        expected = {
            "": by_draw.mean(),
            "_std": by_draw.std(),
            "_min": by_draw.min(),
            "_max": by_draw.max(),
        }
        for suffix, value in (expected | {"_cv": values[:, chosen].mean()}).items():
            score = found[f"map_k{k}{suffix}"]
            assert score.value == pytest.approx(value, abs=1e-2)
            is_spread = suffix in ("_std", "_min", "_max")
            expected_text = ("map", k, suffix[1:]) if is_spread else (f"map{suffix}", k, "")
            assert (score.series, score.k, score.spread) == expected_text
        assert found[f"map_k{k}"].choice == f"cost {COSTS[best]:g} of 4 chosen on test as published"
        assert (
            found[f"map_k{k}_cv"].choice
            == f"cost {COSTS[chosen]:g} of 4 chosen on the training images not drawn"
        )
        choices.append((best, chosen, circular))
    assert all(chosen != 0 for _, chosen, _ in choices)
    assert any(chosen != best for best, chosen, _ in choices)
    assert any(
        chosen != circular for _, chosen, circular in choices
    )  # images drawn would have misled it


def test_without_positive_images_beyond_the_drawn_no_cost_is_chosen_by_them_and_that_is_said(
    sets: Context,
) -> None:
    labels = -torch.ones(120, 3, dtype=torch.int64)
    for c in range(3):
        labels[2 * c : 2 * c + 2, c] = 1
    used_up = dataclasses.replace(sets, train=dataclasses.replace(sets.train, labels=labels))
    found = scores_of(low_shot(), used_up)
    assert "map_k1_cv" in found
    assert "positive image" not in " ".join(found["map_k1"].details)
    assert "map_k2_cv" not in found
    assert (
        "no cost chosen without the test set, as draws leave no positive image"
        in found["map_k2"].details
    )
    labels[10, 1] = 1
    found = scores_of(low_shot(), used_up)
    assert (
        "2 of 3 classes have no positive image left to choose a cost by"
        in found["map_k2_cv"].details
    )
    assert "left to choose" not in " ".join(found["map_k1_cv"].details)


def test_draws_have_k_positives_and_19_k_negatives_and_change_with_the_seed(sets: Context) -> None:
    labels = sets.train.labels
    drawn = draw(labels, (0, 2), 2, 5, 0)
    assert drawn.shape == (2, 5, 40)
    for index, c in enumerate((0, 2)):
        for rows in drawn[index]:
            assert len(set(rows.tolist())) == 40
            assert labels[rows[:2], c].tolist() == [1, 1]
            assert set(labels[rows[2:], c].tolist()) == {-1}  # difficult ones are neither
    assert torch.equal(draw(labels, (2,), 2, 2, 0), drawn[1:, :2])  # whatever else is drawn
    assert not torch.equal(draw(labels, (0, 2), 2, 5, 1), drawn)
    other = [scores_of(low_shot(shots=(1,)), sets, seed)["map_k1"].details for seed in (0, 1)]
    assert other[0] != other[1]  # the hash of the draws


def test_a_class_without_positives_is_left_out_and_said(sets: Context) -> None:
    labels = sets.train.labels.clone()
    labels[:, 1] = -1
    train = dataclasses.replace(sets.train, labels=labels)
    lacking = dataclasses.replace(sets, train=train)
    two = [0, 2]
    without = context(
        train=dataclasses.replace(train, labels=labels[:, two], n_classes=2),
        held_out=dataclasses.replace(
            sets.held_out, labels=sets.held_out.labels[:, two], n_classes=2
        ),
        classes=("bird", "dog"),
    )
    for evaluation, metric in ((svm(), "map"), (low_shot(), "map_k2_cv")):
        found = scores_of(evaluation, lacking)[metric]
        assert found.deviations == ("without cat (no positive image to train on or to test on)",)
        if metric == "map":
            assert found.value == pytest.approx(
                scores_of(evaluation, without)[metric].value, abs=1e-6
            )
    nothing = dataclasses.replace(
        sets, train=dataclasses.replace(train, labels=torch.full_like(labels, -1))
    )
    for evaluation in (svm(), low_shot()):
        with pytest.raises(UsageError, match="no class"):
            scores_of(evaluation, nothing)


@pytest.mark.parametrize("positives", [1, 2])
def test_fewer_positives_than_folds_are_validated_where_they_can_be(
    sets: Context, positives: int
) -> None:
    labels = -torch.ones(120, 3, dtype=torch.int64)
    labels[:positives] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = dataclasses.replace(sets, train=dataclasses.replace(sets.train, labels=labels))
        found = scores_of(svm(), few)
    assert 0 < found["map"].value <= 100
    assert ("map_cv" in found) == (positives == 2)  # of one, no fold has it on both sides


def test_more_shots_than_there_are_images_are_left_out_and_said(sets: Context) -> None:
    found = scores_of(low_shot(shots=(1, 2, 64)), sets)
    assert {metric for metric in found if metric.endswith("_std")} == {"map_k1_std", "map_k2_std"}
    assert found["map_k1"].deviations == ("no k=64, for which a class has too few images",)
    with pytest.raises(
        UsageError,
        match=r"eval\.voc07_low_shot\.shots.*\[64\].* \d+ positive .* \d+ negative",
    ):
        scores_of(low_shot(shots=(64,)), sets)


def test_features_that_are_not_finite_are_named(sets: Context) -> None:
    rows = sets.train.features[LAYER].clone()
    rows[7, 3] = float("nan")
    broken = dataclasses.replace(
        sets, train=dataclasses.replace(sets.train, features={LAYER: rows})
    )
    for evaluation in (svm(), low_shot()):
        with pytest.raises(UsageError, match="feature4 .*not finite"):
            scores_of(evaluation, broken)


def refuse(made: object, wrong: dict[str, object], message: str) -> None:
    """Expects a wrong constant to be refused; a call would fail in the type checker before that."""
    for name, value in wrong.items():
        object.__setattr__(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.__post_init__()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"costs": ()}, r"costs is \(\): "),
        ({"costs": (0.0,)}, r"costs is \(0.0,\): "),
        ({"costs": "abc"}, "costs is abc: "),
        ({"costs": 3}, r"costs is 3: "),
        ({"layers": ("conv1",)}, "layers is .*conv1"),
        ({"batch": 0}, "batch is 0: "),
        ({"batch": "abc"}, "batch is abc: "),
        ({"view": None}, "view is None: "),
    ],
)
def test_constants_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    for make, name in ((svm, "voc07_svm"), (low_shot, "voc07_low_shot")):
        refuse(make(), wrong, rf"^eval\.{name}\.{message}")


@pytest.mark.parametrize("folds", [1, 2.5, "abc"])
def test_a_number_of_folds_that_makes_no_sense_is_refused(folds: object) -> None:
    refuse(svm(), {"folds": folds}, f"^eval.voc07_svm.folds is {folds}: ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draws": 0}, "draws is 0: "),
        ({"draws": 1.5}, "draws is 1.5: "),
        ({"draws": "abc"}, "draws is abc: "),
        ({"shots": 3}, r"shots is 3: "),
        ({"shots": [1.5]}, r"shots is \[1.5\]: "),
        ({"shots": []}, r"shots is \[\]: "),
    ],
)
def test_shots_and_draws_that_make_no_sense_are_refused(
    wrong: dict[str, object], message: str
) -> None:
    refuse(low_shot(), wrong, rf"^eval\.voc07_low_shot\.{message}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown(FolderImages):
    """Images of which nothing but what they show is asked."""

    presence_rows: list[list[int]]

    def presence(self) -> list[list[int]]:
        return self.presence_rows


def splits_of(train: Tensor, held_out: Tensor) -> Splits:
    both = (("trainval", train), ("test", held_out))
    made = [
        Shown(
            name="voc",
            split=split,
            paths=["x"] * len(presence_rows),
            presence_rows=presence_rows.tolist(),
        )
        for split, presence_rows in both
    ]
    return Splits(train=made[0], held_out=made[1])


def test_too_few_images_are_told_before_features_are_asked_for(sets: Context) -> None:
    labels, tested = sets.train.labels, sets.held_out.labels
    most = int(torch.maximum((labels == 1).sum(dim=0), 120 - (labels == 1).sum(dim=0)).min())
    enough, expected_text = (
        splits_of(labels, tested),
        f"folds is {most + 1}: of 120 .*{most} folds or fewer",
    )
    for evaluation in (svm(), low_shot(shots=(1, 64)), svm(folds=most)):
        evaluation.check(enough)
    with pytest.raises(UsageError, match=expected_text):
        svm(folds=most + 1).check(enough)
    with pytest.raises(UsageError, match=r"eval\.voc07_low_shot\.shots.*\[64\]"):
        low_shot(shots=(64,)).check(enough)
    with pytest.raises(UsageError, match=r"folds is 3: .*\b2 training images"):
        svm().check(splits_of(torch.tensor([[1, -1, -1], [-1, 1, 1]]), tested))
    for n in (1, 5):  # nothing to tell apart in one, no positive in five
        for evaluation in (svm(), low_shot()):
            with pytest.raises(UsageError, match="no class"):
                evaluation.check(splits_of(torch.full((n, 3), 1 if n == 1 else -1), tested))
    job = NamedEvaluation(name="voc07_svm", evaluation=svm(folds=100), splits=enough)
    with pytest.raises(UsageError, match="folds is 100"):
        job.check_images()


def test_what_images_show_has_to_be_known_of_both_splits(sets: Context) -> None:
    known = splits_of(sets.train.labels, sets.held_out.labels)
    unknown = FolderImages(name="voc", split="test", paths=["x"])
    NamedEvaluation(name="voc07_svm", evaluation=svm(), splits=known).check_images()
    for splits in (
        Splits(train=known.train, held_out=unknown),
        Splits(train=unknown, held_out=known.held_out),
    ):
        with pytest.raises(UsageError, match=r"eval\.voc07_svm .*PASCAL VOC.*voc do not$"):
            NamedEvaluation(name="voc07_svm", evaluation=svm(), splits=splits).check_images()
    packed_before = ShardImages.__new__(ShardImages)  # by a relloc that did not keep it
    packed_before.name, packed_before.split = "voc2007", "trainval"
    packed_before.labels, packed_before.classes = None, CLASSES
    job = NamedEvaluation(
        name="mine",
        evaluation=svm(),
        splits=Splits(train=packed_before, held_out=packed_before),
        unreadable_share=0.1,
    )
    with pytest.raises(UsageError, match=r"\bvoc2007\b.*pack it again.*eval\.mine\.data\.root"):
        job.check_images()


class Lost(Shown):
    """Images whose lists of classes are missing."""

    def presence(self) -> list[list[int]]:
        raise DataError("cat_test.txt is missing: data.root is to hold VOC")


@pytest.mark.parametrize(("share", "setting"), [(0.1, "eval.mine.data.root"), (None, "data.root")])
def test_a_missing_list_names_the_evaluations_own_root(
    sets: Context, share: float | None, setting: str
) -> None:
    lost = Lost(name="voc", split="test", paths=["x"], presence_rows=[])
    splits = dataclasses.replace(splits_of(sets.train.labels, sets.held_out.labels), held_out=lost)
    for evaluation in (svm(), low_shot()):
        job = NamedEvaluation(
            name="mine", evaluation=evaluation, splits=splits, unreadable_share=share
        )
        with pytest.raises(DataError, match=rf"^cat_test\.txt is missing: {setting} "):
            job.check_images()


def test_folds_that_unreadable_images_leave_too_few_for_are_told_too(sets: Context) -> None:
    left = Bank(
        features={LAYER: sets.train.features[LAYER][:5]},
        labels=torch.tensor([[1, -1, -1], [1, -1, 1], [-1, 1, -1], [-1, 1, 1], [-1, 1, -1]]),
        n_classes=3,
        channels={LAYER: 30},
    )
    with pytest.raises(UsageError, match=r"folds is 4: .*\b5 training images.*\b3 folds"):
        scores_of(svm(folds=4), dataclasses.replace(sets, train=left))


def row(layer: str, metric: str, value: float) -> Result:
    who = {"checkpoint": "random", "model": "small", "fingerprint": layer}
    where = {"eval": "voc07_svm", "dataset": "voc2007", "split": "test", "n": 80, "seed": 0}
    return Result(layer=layer, metric=metric, value=value, protocol="3.1 SVM", **where, **who)  # type: ignore[arg-type]


def test_the_best_layer_is_chosen_on_test_as_published_and_by_cross_validation() -> None:
    rows = [row("feature2", "map", 50), row("feature2", "map_cv", 61), row("feature4", "map", 52)]
    rows.append(row("feature4", "map_cv", 60))
    evaluation = svm()
    by_test, by_validation = evaluation.summary(rows)
    assert (by_test.metric, by_test.layer, by_test.value) == ("map_best", "feature4", 52)
    assert by_test.choice == "best of 2 layers, chosen on test as published"
    assert [(one.column, one.variant, one.headline) for one in (by_test, by_validation)] == [
        ("best layer", "", False),
        ("best layer", CHOSEN_WITHOUT_TEST, False),
    ]
    assert (by_validation.metric, by_validation.layer, by_validation.value) == (
        "map_best_cv",
        "feature2",
        50,
    )
    assert list(evaluation.summary([])) == []
    assert [row.metric for row in evaluation.summary(rows[::2])] == [
        "map_best"
    ]  # nothing could be validated
