import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from commands import start
from contexts import context
from safetensors.torch import save_file
from torch import Tensor

from relloc.data.views import Center
from relloc.errors import UsageError
from relloc.evals import knn as knn_module
from relloc.evals.knn import Knn
from relloc.features.bank import Bank
from relloc.features.source import FeatureBatch
from relloc.features.voting import vote
from relloc.results import Score

CPU = torch.device("cpu")
K = (1, 5, 20, 100)
N_CLASSES = 5


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a few overlapping classes, of all lengths, so that the vote is not clear."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    centers = torch.randn(
        N_CLASSES, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(99)
    )
    rows = centers[labels] + 2 * torch.randn(n, 16, dtype=torch.float64, generator=generator)
    return rows * torch.rand(n, 1, dtype=torch.float64, generator=generator).exp(), labels


BANK, LABELS = drawn(400, seed=0)
QUERIES, ANSWERS = drawn(150, seed=1)


def bank_of(rows: Tensor, labels: Tensor, layers: Sequence[str] = ("avgpool",)) -> Bank:
    return Bank(
        features={layer: rows.float() for layer in layers},
        labels=labels,
        n_classes=N_CLASSES,
        channels=dict.fromkeys(layers, 16),
    )


def evaluation(**changes: object) -> Knn:
    view = Center(short_px=8, crop_px=8)
    settings = {
        "k": K,
        "temperature": 0.07,
        "layers": ("avgpool",),
        "view": view,
        "batch": 64,
        "bank_gib": 1.0,
    }
    return Knn(**{**settings, **changes})  # type: ignore[arg-type]


def scores(knn: Knn, train: Bank | None = None, held_out: Bank | None = None) -> list[Score]:
    train, held_out = train or bank_of(BANK, LABELS), held_out or bank_of(QUERIES, ANSWERS)
    return list(knn.run(context(train, held_out)))


def test_scores_are_the_share_of_right_votes_for_each_k() -> None:
    voted = vote(QUERIES, BANK, LABELS, k=K, temperature=0.07, n_classes=N_CLASSES)
    expected = {
        f"top1_k{k}": 100 * (classes == ANSWERS).double().mean().item()
        for k, classes in voted.items()
    }
    found = scores(evaluation())
    assert {score.metric: score.value for score in found} == pytest.approx(expected)
    assert [score.metric for score in found] == [f"{score.series}_k{score.k}" for score in found]
    assert {score.n for score in found} == {150}
    assert 100 / N_CLASSES < min(expected.values()) < max(expected.values()) < 100


@pytest.mark.parametrize("batch", [1, 149, 1000])
def test_the_batch_size_changes_no_score(batch: int) -> None:
    assert scores(evaluation(batch=batch)) == scores(evaluation())


def test_only_avgpool_is_the_published_protocol() -> None:
    layers = ("feature4", "avgpool")
    train, held_out = bank_of(BANK, LABELS, layers), bank_of(QUERIES, ANSWERS, layers)
    found = scores(evaluation(layers=layers), train, held_out)
    assert {score.protocol for score in found} == {"3.7"}
    assert {(score.layer, score.deviations) for score in found} == {
        ("avgpool", ()),
        ("feature4", ("features of feature4 pooled as in 3.1",)),
    }
    assert {score.variant for score in found} == set(layers)  # layers are lines of the same columns


def test_the_headline_is_the_number_of_neighbors_closest_to_20_of_those_allowed() -> None:
    assert [score.metric for score in scores(evaluation()) if score.headline] == ["top1_k20"]
    small = bank_of(BANK[:7], LABELS[:7])
    assert [score.metric for score in scores(evaluation(), small) if score.headline] == ["top1_k5"]


def test_numbers_of_neighbors_beyond_the_bank_are_left_out() -> None:
    small = bank_of(BANK[:20], LABELS[:20])
    found = scores(evaluation(), small)
    assert [score.metric for score in found] == ["top1_k1", "top1_k5", "top1_k20"]
    assert {score.details for score in found} == {
        ("T=0.07", "k=100 left out, the bank has 20 images")
    }
    with pytest.raises(UsageError, match=r"eval\.knn\.k .*50, 100.* 20 images"):
        scores(evaluation(k=(50, 100)), small)


def test_a_bank_beyond_the_memory_allowed_is_an_error_that_says_what_to_change() -> None:
    kib = 400 * 16 * 4 / 2**30
    assert scores(evaluation(bank_gib=1.01 * kib))
    with pytest.raises(
        UsageError, match=r"eval\.knn .*2\.38e-05 GiB .*400 images .*avgpool.*bank_gib="
    ):
        scores(evaluation(bank_gib=0.99 * kib))


@dataclasses.dataclass
class Unkept:
    """A bank's features, but not known to be in memory."""

    bank: Bank

    n = property(lambda self: self.bank.n)
    n_classes = property(lambda self: self.bank.n_classes)
    dims = property(lambda self: self.bank.dims)
    channels = property(lambda self: self.bank.channels)

    def batches(
        self, indices: Tensor, size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[FeatureBatch]:
        return self.bank.batches(indices, size, layers, epoch, epochs)


def test_a_source_that_is_no_bank_gives_the_same_scores() -> None:
    train, held_out = Unkept(bank_of(BANK, LABELS)), Unkept(bank_of(QUERIES, ANSWERS))
    assert list(evaluation().run(context(train, held_out))) == scores(evaluation())


def test_queries_are_gathered_so_that_the_bank_is_not_walked_through_for_each_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counted(queries: Tensor, *given: object, **named: object) -> dict[int, Tensor]:
        asked.append(len(queries))
        return vote(queries, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(knn_module, "vote", counted)
    unkept = context(bank_of(BANK, LABELS), Unkept(bank_of(QUERIES, ANSWERS)))
    list(evaluation(batch=20).run(unkept))
    assert asked == [150]
    monkeypatch.setattr(knn_module, "_QUERY_BYTES", 4 * 16 * 50)
    asked.clear()
    found = list(evaluation(batch=20).run(unkept))
    assert asked == [60, 60, 30]
    assert found == scores(evaluation())


def test_features_that_are_not_finite_are_told_with_their_layer() -> None:
    layers = ("feature4", "feature5")
    train, held_out = bank_of(BANK, LABELS, layers), bank_of(QUERIES, ANSWERS, layers)
    spoilt = train.features["feature5"].clone()
    spoilt[3, 5] = float("nan")
    broken = dataclasses.replace(train, features={**train.features, "feature5": spoilt})
    with pytest.raises(UsageError, match=r"eval\.knn .*feature5: 1 of 400 images .*NaN"):
        scores(evaluation(layers=layers), broken, held_out)


def test_memory_is_no_part_of_what_tells_evaluations_apart() -> None:
    assert repr(evaluation(bank_gib=1)) == repr(evaluation(bank_gib=64))
    assert repr(evaluation(temperature=0.1)) != repr(evaluation())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": [1.5]}, r"eval.knn.k is \[1.5\]: "),
        ({"k": 5}, r"eval.knn.k is 5: "),
        ({"k": []}, r"eval.knn.k is \[\]: "),
        ({"temperature": "abc"}, "eval.knn.temperature is abc: "),
        ({"temperature": 0}, "eval.knn.temperature is 0: "),
        ({"layers": "feature1"}, "eval.knn.layers is feature1: "),
        ({"view": None}, "eval.knn.view is None: "),
        ({"batch": 0}, "eval.knn.batch is 0: "),
        ({"bank_gib": "abc"}, "eval.knn.bank_gib is abc: "),
    ],
)
def test_wrong_constants_are_told_with_setting_and_value(
    wrong: dict[str, object], message: str
) -> None:
    made = evaluation()
    for name, value in wrong.items():
        object.__setattr__(made, name, value)  # the type checker of tests would be first
    with pytest.raises(ValueError, match=message):
        made.__post_init__()


TWO_RANKS = """
import json
import sys
from pathlib import Path

import torch
from contexts import context
from safetensors.torch import load_file

from relloc import ranks
from relloc.data.views import Center
from relloc.evals.knn import Knn
from relloc.features.bank import Bank
from relloc.features.voting import vote

ranks.join(torch.device("cpu"))
rank = ranks.rank()
given = load_file(sys.argv[1])
k, n_classes = (1, 5, 20, 100), 5
half = [slice(0, 137), slice(137, 400)][rank]
found = vote(given["queries"], given["bank"][half], given["labels"][half], k=k, temperature=0.07,
             n_classes=n_classes, chunk=50, across_ranks=True)
if rank == 0:  # as monitors do while the other ranks train on: this must not wait for them
    alone = vote(given["queries"], given["bank"][half], given["labels"][half], k=k,
                 temperature=0.07, n_classes=n_classes)
    assert alone.keys() == found.keys()


def bank_of(rows, labels):
    return Bank(features={"avgpool": rows.float()}, labels=labels, n_classes=n_classes,
                channels={"avgpool": 16})


class Unkept:
    def __init__(self, bank):
        self.n, self.n_classes = bank.n, bank.n_classes
        self.dims, self.channels = bank.dims, bank.channels
        self.batches = bank.batches


knn = Knn(k=k, temperature=0.07, layers=("avgpool",), view=Center(short_px=8, crop_px=8), batch=64,
          bank_gib=1.0)


def scores(train):
    given_to_it = context(train, bank_of(given["queries"], given["answers"]))
    return [str(score) for score in knn.run(given_to_it)]


whole = bank_of(given["bank"], given["labels"])
few = bank_of(given["bank"][:5], given["labels"][:5])
told = {
    "vote": {k: classes.tolist() for k, classes in found.items()},
    "scores": scores(whole),
    "unkept": scores(Unkept(whole)),
    "few": scores(few),
}
ranks.leave()
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_that_share_the_bank_find_what_one_does(tmp_path: Path) -> None:
    assert Knn.across_ranks  # by which the command knows
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    given = tmp_path / "given.safetensors"
    save_file({"queries": QUERIES, "answers": ANSWERS, "bank": BANK, "labels": LABELS}, given)
    done = start(str(script), str(given), str(tmp_path), folder=tmp_path, processes=2)
    assert done.wait() == 0, done.text
    few = bank_of(BANK[:5], LABELS[:5])
    voted = vote(QUERIES, BANK, LABELS, k=K, temperature=0.07, n_classes=N_CLASSES)
    expected = {
        "vote": {str(k): classes.tolist() for k, classes in voted.items()},
        "scores": [str(score) for score in scores(evaluation())],
        "unkept": [str(score) for score in scores(evaluation())],
        "few": [str(score) for score in scores(evaluation(), few)],
    }
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
