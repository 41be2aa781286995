"""A network that was trained with strides of its own, evaluated with these or the standard ones."""

import dataclasses

import pytest
import torch

from relloc.evaluation.contract import EvaluatedModel
from relloc.evaluation.strides import by_strides
from relloc.models.resnet import ResNetBackbone


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An evaluation by its name, and the config group that it was chosen from."""

    name: str
    group: str = "eval"


KNN, PICTURES = Chosen("knn"), Chosen("neighbors", "study")


def model(**settings: object) -> EvaluatedModel:
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=18, width=0.125, **settings).eval()  # type: ignore[arg-type]
    return EvaluatedModel(backbone=backbone, checkpoint="/a/b", model="resnet18", weights="one")


def test_a_network_without_strides_of_its_own_comes_once_as_it_is() -> None:
    standard = model()
    assert by_strides([standard], [KNN, PICTURES], ["standard", "as_trained"]) == [
        (standard, [KNN, PICTURES])
    ]


@pytest.mark.parametrize(
    ("chosen", "looking"),
    [
        (["standard"], {"": [KNN], "as_trained": [PICTURES]}),
        (["as_trained"], {"as_trained": [KNN, PICTURES]}),
        (["as_trained", "standard"], {"": [KNN], "as_trained": [KNN, PICTURES]}),
    ],
)
def test_evaluations_take_the_chosen_strides_and_studies_those_of_the_training(
    chosen: list[str], looking: dict[str, list[Chosen]]
) -> None:
    variants = by_strides([model(last_stride=1)], [KNN, PICTURES], chosen)
    assert {variant.strides: evaluations for variant, evaluations in variants} == looking


@torch.no_grad()
def test_both_have_the_maps_and_the_names_of_their_strides() -> None:
    trained = model(last_stride=1)
    (standard, _), (own, _) = by_strides([trained], [KNN], ["standard", "as_trained"])
    images = torch.randn(1, 3, 64, 64)
    assert standard.backbone(images)["feature5"].shape[-1] == 2
    assert own.backbone(images)["feature5"].shape[-1] == 4
    assert (standard.model, own.model) == ("resnet18", "resnet18 last_stride=1")
    for variant in (standard, own):
        [detail] = variant.details
        assert "last_stride=1" in detail
    # The weights are those of the training, and so is the network that was given.
    assert standard.weights == own.weights == trained.weights
    assert trained.backbone.own_strides == "last_stride=1"
