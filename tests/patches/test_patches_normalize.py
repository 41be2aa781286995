import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from relloc.patches.normalize import ByDataset, PerPatch

PIXELS = torch.randint(256, (4, 9, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()


def test_by_dataset_is_torchvisions_totensor_and_normalize() -> None:
    oracle = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    expected = [
        oracle(Image.fromarray(patch.permute(1, 2, 0).numpy().astype(np.uint8)))
        for patch in PIXELS.flatten(0, 1)
    ]
    actual = ByDataset()(PIXELS)
    torch.testing.assert_close(actual, torch.stack(expected).view_as(PIXELS))
    torch.testing.assert_close(
        ByDataset()(PIXELS[:, 0]), actual[:, 0]
    )  # whole images, as evaluations give them


def test_per_patch_gives_each_patch_zero_mean_and_unit_variance() -> None:
    brighter = PIXELS * torch.linspace(0.2, 1, 9).view(9, 1, 1, 1)
    actual = PerPatch()(brighter)
    for patch, normalized in zip(
        brighter.flatten(0, 1).numpy(), actual.flatten(0, 1).numpy(), strict=True
    ):
        np.testing.assert_allclose(normalized, (patch - patch.mean()) / patch.std(), atol=1e-5)


def test_per_patch_keeps_what_distinguishes_the_channels() -> None:
    patch = torch.zeros(1, 1, 3, 2, 2)
    patch[:, :, 0] = 90.0
    red, green, blue = PerPatch()(patch)[0, 0, :, 0, 0].tolist()
    assert red == pytest.approx(2**0.5)
    assert green == blue == pytest.approx(-(2**-0.5))


@pytest.mark.parametrize("level", [0.0, 77.0, 255.0])
def test_a_flat_patch_becomes_zeros(level: float) -> None:
    assert torch.equal(PerPatch()(torch.full((1, 9, 3, 8, 8), level)), torch.zeros(1, 9, 3, 8, 8))


def test_noise_below_the_floor_is_not_blown_up() -> None:
    faint = 100 + 0.01 * torch.randn(2, 9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(PerPatch()(faint).std(), faint.std(), rtol=0.05, atol=0)
    assert PerPatch(floor_px=0.001)(faint).std().item() == pytest.approx(1, rel=0.01)
