from collections.abc import Sequence

import pytest
import torch
from contexts import context
from torch import Tensor

from relloc.data.views import Center
from relloc.errors import UsageError
from relloc.evals.label_free import LabelFree
from relloc.features.source import Bank
from relloc.features.spectrum import alpha_req, rankme
from relloc.results import Score

CPU = torch.device("cpu")
ROWS = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 12)


def bank_of(**layers: Tensor) -> Bank:
    n = len(next(iter(layers.values())))
    return Bank(
        features=layers,
        labels=torch.zeros(n, dtype=torch.int64),
        n_classes=0,
        channels=dict.fromkeys(layers, 1),
    )


def evaluation(
    layers: Sequence[str] = ("feature4", "avgpool"), n_images: int = 100, batch: int = 7
) -> LabelFree:
    return LabelFree(
        layers=layers, n_images=n_images, view=Center(short_px=8, crop_px=8), batch=batch
    )


def scores(run: LabelFree, held_out: Bank) -> list[Score]:
    return list(run.run(context(held_out, held_out)))


def test_each_layer_has_both_measures_of_its_features() -> None:
    run = evaluation()
    found = scores(run, bank_of(feature4=ROWS, avgpool=ROWS.square()))
    assert [(score.layer, score.metric) for score in found] == [
        *(("feature4", "rankme"), ("feature4", "alpha_req")),
        *(("avgpool", "rankme"), ("avgpool", "alpha_req")),
    ]
    expected = [measure(rows) for rows in (ROWS, ROWS.square()) for measure in (rankme, alpha_req)]
    assert [score.value for score in found] == expected
    assert {score.n for score in found} == {60}
    assert "features of feature4 pooled as in 3.1" in found[0].details
    assert found[2].details == ("singular values of 60 images, evenly spaced over the split",)
    assert [(score.unit, score.higher_is_better, score.headline) for score in found[:2]] == [
        ("directions", None, True),
        ("exponent", None, False),
    ]


def test_more_images_than_asked_for_are_taken_in_even_steps() -> None:
    found = scores(evaluation(("avgpool",), n_images=20), bank_of(avgpool=ROWS))
    assert found[0].value == rankme(ROWS[::3])
    assert {score.n for score in found} == {20}


def test_a_layer_of_few_directions_has_no_alpha_and_says_so() -> None:
    flat = ROWS[:, :3].contiguous()
    found = scores(evaluation(("avgpool",)), bank_of(avgpool=flat))
    assert [score.metric for score in found] == ["rankme"]
    assert "no alpha-ReQ: features of 60 images span 3 directions" in " ".join(found[0].details)


@pytest.mark.parametrize(
    ("spoilt", "reason"), [(float("nan"), "1 of 720 features"), (None, "are zero")]
)
def test_features_without_directions_are_told_with_their_layer(
    spoilt: float | None, reason: str
) -> None:
    rows = torch.zeros_like(ROWS) if spoilt is None else ROWS.clone()
    if spoilt is not None:
        rows[5, 5] = spoilt
    with pytest.raises(
        UsageError, match=f"eval.label_free at feature5: .*{reason}.*batch_norm=recalibrated"
    ):
        scores(evaluation(("feature5",)), bank_of(feature5=rows))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layers", ("feature9",), "eval.label_free.layers is .*feature9"),
        ("layers", "feature1", "eval.label_free.layers is feature1: "),
        ("n_images", 1, "eval.label_free.n_images is 1: "),
        ("n_images", 20.5, "eval.label_free.n_images is 20.5: "),
        ("batch", 0, "eval.label_free.batch is 0: "),
    ],
)
def test_wrong_constants_are_refused(setting: str, value: object, message: str) -> None:
    made = evaluation()
    object.__setattr__(made, setting, value)  # the type checker of tests would be first
    with pytest.raises(ValueError, match=message):
        made.__post_init__()
