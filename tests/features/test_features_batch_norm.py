import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from relloc.features.batch_norm import recalibrate
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone


@pytest.fixture
def backbone() -> SmallBackbone:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()
    for index, norm in enumerate(norms_of(backbone)):
        norm.momentum = 0.1 + index / 100
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        norm.num_batches_tracked += 1000  # as after a long training
    return backbone


def norms_of(backbone: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def batches(n: int = 3, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, 3, 48, 48, generator=generator) * (1 + index) + index
        for index in range(n)
    ]


def test_statistics_become_the_averages_over_the_batches(backbone: SmallBackbone) -> None:
    twin = copy.deepcopy(backbone).train()
    seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms_of(twin)}
    for norm in seen:
        norm.register_forward_hook(lambda module, inputs, _output: seen[module].append(inputs[0]))
    with torch.no_grad():
        for images in batches():
            twin(images)
    assert recalibrate(backbone, iter(batches())) == 12
    for norm, inputs in zip(norms_of(backbone), seen.values(), strict=True):
        means = [x.transpose(0, 1).flatten(1).mean(dim=1) for x in inputs]
        variances = [x.transpose(0, 1).flatten(1).var(dim=1) for x in inputs]
        torch.testing.assert_close(
            norm.running_mean, torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            norm.running_var, torch.stack(variances).mean(dim=0), rtol=1e-4, atol=1e-6
        )


def test_weights_momenta_and_gradients_stay_and_the_network_is_left_in_eval_mode(
    backbone: SmallBackbone,
) -> None:
    before = copy.deepcopy(backbone)
    recalibrate(backbone.train(), batches())
    for (name, value), old in zip(backbone.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old), name
        assert value.grad is None
        assert value.requires_grad
    assert [norm.momentum for norm in norms_of(backbone)] == [
        norm.momentum for norm in norms_of(before)
    ]
    assert not any(module.training for module in backbone.modules())


def test_old_statistics_leave_no_trace(backbone: SmallBackbone) -> None:
    other = copy.deepcopy(backbone)
    for norm in norms_of(other):
        norm.running_mean += 100
    recalibrate(backbone, batches())
    recalibrate(other, batches())
    recalibrate(other, batches())
    for norm, twin in zip(norms_of(backbone), norms_of(other), strict=True):
        assert torch.equal(norm.running_mean, twin.running_mean)
        assert torch.equal(norm.running_var, twin.running_var)


def test_a_network_without_batch_norm_is_left_alone_and_no_image_is_read() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).train()

    def unread() -> Iterator[Tensor]:
        pytest.fail("an image was read")
        yield

    assert recalibrate(network, unread()) == 0
    assert network.training


def test_batch_norm_behind_the_stages_is_estimated_as_well() -> None:
    # fc6 of the AlexNet-like network sees what the stages return, and only where it embeds.
    torch.manual_seed(0)
    backbone = AlexNetBackbone()
    fc6 = backbone.fc6[1]
    assert isinstance(fc6, nn.BatchNorm1d)
    seen: list[Tensor] = []
    handle = fc6.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    recalibrate(backbone, batches(n=2))
    handle.remove()
    means = torch.stack([x.mean(dim=0) for x in seen])
    torch.testing.assert_close(fc6.running_mean, means.mean(dim=0), rtol=1e-4, atol=1e-6)
