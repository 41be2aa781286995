from itertools import pairwise

import pytest
import torch

from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.pretext.optimizer import sgd
from relloc.pretext.relative_location import RelativeLocation

CARD = {
    "lr": 0.2,
    "lr_images_per_step": 512,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "head_weight_decay": 5e-4,
}


@pytest.fixture
def model() -> RelativeLocation:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 8, 8))
    head = PairHead(
        embedding_dim=8,
        hidden_dim=16,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.1,
        head_std=0.1,
        embed_dim=4,
    )
    model = RelativeLocation(backbone, head, batch_norm="separate", images_per_batch_norm=2)
    for value in model.parameters():
        torch.nn.init.uniform_(value, 1, 2)  # also biases, which start at zero and would not decay
    return model


def test_every_parameter_is_optimized_once(model: RelativeLocation) -> None:
    optimizer = sgd(model, **CARD, images_per_step=512)
    optimized = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(optimized) == sorted(id(value) for value in model.parameters())
    assert len(set(optimized)) == len(optimized)


@pytest.mark.parametrize(("images_per_step", "lr"), [(512, 0.2), (64, 0.025), (4096, 1.6)])
def test_the_rate_grows_linearly_with_the_images_of_a_step(
    model: RelativeLocation, images_per_step: int, lr: float
) -> None:
    optimizer = sgd(model, **CARD, images_per_step=images_per_step)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr])


def test_trunk_and_head_decay_by_their_own_amount_biases_and_batch_norm_included(
    model: RelativeLocation,
) -> None:
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = sgd(model, **CARD, images_per_step=512)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in model.named_parameters():
        decay = 5e-4 if name.startswith("head.") else 1e-4
        torch.testing.assert_close(
            before[name] - value, before[name] * 0.2 * decay, rtol=0.02, atol=0, msg=name
        )


def test_momentum_carries_a_gradient_on_without_nesterov(model: RelativeLocation) -> None:
    optimizer = sgd(
        model, **{**CARD, "weight_decay": 0.0, "head_weight_decay": 0.0}, images_per_step=512
    )
    value = model.head.answer.bias
    values = [value.detach().clone()]
    for gradient in (1.0, 0.0, 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        values.append(value.detach().clone())
    moves = [(before - after).mean().item() for before, after in pairwise(values)]
    assert moves == pytest.approx([0.2, 0.18, 0.162], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CARD if name != "lr_images_per_step"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_that_torch_would_take_or_find_late_are_refused(
    model: RelativeLocation, name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{name} "):
        sgd(model, **CARD | {name: value}, images_per_step=512)
