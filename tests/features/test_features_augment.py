import collections
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from relloc.features.augment import JitterAndLighting

SEEDS = list(range(100, 112))
IMAGES = torch.rand(len(SEEDS), 3, 11, 11, generator=torch.Generator().manual_seed(0))
CHANGES = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])


def changed_by(color: JitterAndLighting, images: Tensor, seeds: list[int]) -> Tensor:
    return color.change(images, torch.tensor([color.draw(seed) for seed in seeds]))


def one_by_one(color: JitterAndLighting, images: Tensor, seeds: list[int]) -> Tensor:
    """Torchvision's functions on each image alone, in the drawn order with the drawn numbers."""
    changed = []
    for image, seed in zip(images, seeds, strict=True):
        drawn = color.draw(seed)
        for which in map(int, drawn[3:6]):
            image = CHANGES[which](image, drawn[which])
        shift = (EIGENVECTORS * torch.tensor(drawn[6:]) * EIGENVALUES).sum(dim=1)
        changed.append(image + shift.view(3, 1, 1))
    return torch.stack(changed)


@pytest.mark.parametrize(
    "color", [JitterAndLighting(), JitterAndLighting(brightness=1, contrast=1, saturation=1)]
)
def test_a_batch_is_changed_as_torchvision_changes_each_image_alone(
    color: JitterAndLighting,
) -> None:
    torch.testing.assert_close(
        changed_by(color, IMAGES, SEEDS), one_by_one(color, IMAGES, SEEDS), rtol=0, atol=2e-6
    )
    assert (changed_by(color, IMAGES, SEEDS) - IMAGES).abs().mean() > 0.05


def test_images_do_not_know_of_each_other() -> None:
    color = JitterAndLighting()
    backwards = changed_by(color, IMAGES.flip(0), SEEDS[::-1]).flip(0)
    torch.testing.assert_close(backwards, changed_by(color, IMAGES, SEEDS), rtol=0, atol=1e-6)
    assert not torch.allclose(
        changed_by(color, IMAGES, SEEDS[::-1]), changed_by(color, IMAGES, SEEDS), atol=1e-3
    )


def test_channels_last_and_given_images_stay_as_they_are() -> None:
    images = IMAGES.to(memory_format=torch.channels_last)
    changed = changed_by(JitterAndLighting(), images, SEEDS)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, IMAGES)
    torch.testing.assert_close(
        changed, changed_by(JitterAndLighting(), IMAGES, SEEDS), rtol=0, atol=1e-6
    )


def test_without_any_strength_nothing_changes() -> None:
    color = JitterAndLighting(brightness=0, contrast=0, saturation=0, lighting=0)
    torch.testing.assert_close(changed_by(color, IMAGES, SEEDS), IMAGES, rtol=0, atol=1e-6)


def test_factors_are_uniform_orders_alike_and_lighting_normal() -> None:
    drawn = torch.tensor([JitterAndLighting().draw(seed) for seed in range(6000)])
    factors, orders, normals = drawn.split(3, dim=1)
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert factors.mean(dim=0) == pytest.approx(1, abs=0.01)  # standard error 0.003
    assert factors.std(dim=0) == pytest.approx(0.8 / 12**0.5, abs=0.005)
    counts = collections.Counter(map(tuple, orders.long().tolist()))
    assert sorted(map(sorted, counts)) == [[0, 1, 2]] * 6
    assert min(counts.values()) > 880  # 1000 with standard error 29
    assert normals.mean(dim=0) == pytest.approx(0, abs=0.006)
    assert normals.std(dim=0) == pytest.approx(0.1, abs=0.004)
    correlations = torch.corrcoef(torch.cat([factors, normals], dim=1).T)
    assert (correlations - torch.eye(6)).abs().max() < 0.06


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", 1.5), ("saturation", -0.1), ("lighting", -1.0)]
)
def test_a_strength_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"color\.{name} is {value}"):
        JitterAndLighting(**{name: value})


@pytest.mark.parametrize(
    ("name", "limit"),
    [("brightness", "from 0 to 1"), ("contrast", "from 0 to 1"), ("lighting", "of 0 or more")],
)
@pytest.mark.parametrize("value", ["abc", None, True, math.nan])
def test_a_strength_that_is_no_number_is_refused(name: str, limit: str, value: object) -> None:
    made = JitterAndLighting()
    object.__setattr__(made, name, value)  # the type checker of tests would be first
    with pytest.raises(ValueError, match=rf"color\.{name} is {value}: .*{limit}"):
        made.__post_init__()


def test_words_for_a_protocol() -> None:
    assert str(JitterAndLighting()) == "color jitter 0.4/0.4/0.4 unrounded, lighting noise 0.1"
