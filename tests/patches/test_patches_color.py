import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomGrayscale

from relloc.patches.color import IMAGENET_MEAN_PX, Drop, Gray, Keep, Project
from relloc.patches.normalize import IMAGENET_MEAN
from relloc.patches.pipeline import Color

TREATMENTS = [
    Keep(),
    Gray(p=0.66, weights="luma"),
    Gray(p=0.66, weights="mean"),
    Drop(noise="gaussian"),
    Drop(noise="uniform"),
    Project(),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def treated_by(treatment: Color, patches: Tensor, generator: torch.Generator) -> Tensor:
    b, n, _, p, _ = patches.shape
    return treatment(patches, *treatment.draw(b, n, p, generator))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=seeded(seed)).float()


def far_from_share(count: float, n: int, share: float) -> float:
    """In standard deviations of a binomial count."""
    return abs(count - n * share) / (n * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("treatment", TREATMENTS, ids=repr)
def test_a_treatment_is_decided_by_the_seed_and_leaves_its_input_alone(treatment: Keep) -> None:
    patches = noise(20, 9, 3, 4, 4)
    before = patches.clone()
    first, again, other = (treated_by(treatment, patches, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape == patches.shape
    assert first.dtype == patches.dtype
    assert torch.equal(patches, before)
    assert torch.equal(first, other) == isinstance(treatment, Keep | Project)


def test_keep_changes_nothing() -> None:
    patches = noise(2, 9, 3, 4, 4)
    assert torch.equal(treated_by(Keep(), patches, seeded(0)), patches)


def test_luma_is_torchvisions_grayscale_of_pillow_images_bit_for_bit() -> None:
    patches = noise(4, 9, 3, 64, 64)
    gray = treated_by(Gray(p=1, weights="luma"), patches, seeded(0))
    to_gray = RandomGrayscale(p=1)
    for patch, actual in zip(patches.flatten(0, 1), gray.flatten(0, 1), strict=True):
        image = to_gray(Image.fromarray(patch.byte().permute(1, 2, 0).numpy()))
        assert torch.equal(actual, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())


def test_mean_weights_are_thirds() -> None:
    patches = noise(2, 9, 3, 8, 8)
    gray = treated_by(Gray(p=1, weights="mean"), patches, seeded(0))
    red, green, blue = patches.unbind(2)
    for channel in gray.unbind(2):
        torch.testing.assert_close(channel, (red + green + blue) / 3)


@pytest.mark.parametrize("weights", ["luma", "mean"])
@pytest.mark.parametrize("p", [0, 0.66, 1])
def test_all_nine_patches_of_an_image_become_gray_with_probability_p(
    p: float, weights: str
) -> None:
    n = 4000
    patches = noise(n, 9, 3, 2, 2)
    treated = treated_by(Gray(p=p, weights=weights), patches, seeded(3))  # type: ignore[arg-type]
    is_gray = (treated == treated[:, :, :1]).flatten(2).all(dim=2)
    kept = (treated == patches).flatten(2).all(dim=2)
    assert (is_gray == is_gray[:, :1]).all()
    assert torch.equal(kept, ~is_gray)
    if p in (0, 1):
        assert is_gray.float().mean() == p
    else:
        assert far_from_share(is_gray[:, 0].sum().item(), n, p) < 4


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_gray_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match=rf"color.p is {p}"):
        Gray(p=p, weights="luma")


@pytest.mark.parametrize(
    ("treatment", "fields", "message"),
    [
        (Gray, {"p": 0.5, "weights": "lume"}, "color.weights is lume"),
        (Drop, {"noise": "gausian"}, "color.noise is"),
    ],
)
def test_a_misspelt_way_is_refused(
    treatment: type[Gray] | type[Drop], fields: dict[str, object], message: str
) -> None:
    unchecked = object.__new__(
        treatment
    )  # in tests beartype would refuse it before the class itself
    vars(unchecked).update(fields)
    with pytest.raises(ValueError, match=message):
        unchecked.__post_init__()


def of_different_contrast(n_images: int, p: int) -> Tensor:
    """Patches with deviations of 5, 20 and 40 of red, green and blue, times 0.5 to 1.5 by cell."""
    unit = torch.randn(n_images, 9, 3, p, p, generator=seeded(5))
    return 100 + unit * torch.tensor([5.0, 20, 40]).view(3, 1, 1) * torch.linspace(
        0.5, 1.5, 9
    ).view(9, 1, 1, 1)


@pytest.mark.parametrize("noise_kind", ["gaussian", "uniform"])
def test_each_patch_keeps_exactly_one_channel_and_each_channel_a_third_of_the_time(
    noise_kind: str,
) -> None:
    n = 1000
    patches = of_different_contrast(n, 4)
    treated = treated_by(Drop(noise=noise_kind), patches, seeded(6))  # type: ignore[arg-type]
    unchanged = (treated == patches).flatten(3).all(dim=3)
    touched = (treated != patches).flatten(3).all(dim=3)
    assert (unchanged.sum(dim=2) == 1).all()
    assert (touched.sum(dim=2) == 2).all()
    kept = unchanged.int().argmax(dim=2)
    for channel in range(3):
        assert far_from_share((kept == channel).sum().item(), 9 * n, 1 / 3) < 4
    alike = (kept[:, 0] == kept[:, 1]).sum().item()  # drawn for each patch on its own
    assert far_from_share(alike, n, 1 / 3) < 4


def dropped_channels(patches: Tensor, treated: Tensor) -> tuple[Tensor, Tensor]:
    """Both dropped channels of each patch minus ImageNet's mean, and the kept one's deviation."""
    assert torch.allclose(torch.tensor(IMAGENET_MEAN_PX), torch.tensor(IMAGENET_MEAN) * 255)
    centered = (treated - torch.tensor(IMAGENET_MEAN_PX).view(3, 1, 1)).flatten(0, 1)
    kept = (treated == patches).flatten(3).all(dim=3).flatten(0, 1)
    n = len(kept)
    return centered[~kept].view(n, 2, *centered.shape[2:]), patches.flatten(0, 1)[kept].std(
        dim=(1, 2)
    )


def test_gaussian_filling_has_a_hundredth_of_the_kept_channels_deviation_around_the_mean() -> None:
    patches = of_different_contrast(30, 32)
    filling, kept_sd = dropped_channels(
        patches, treated_by(Drop(noise="gaussian"), patches, seeded(7))
    )
    ratio = filling.std(dim=(2, 3)) / kept_sd.unsqueeze(1)
    assert ((ratio - 0.01).abs() < 0.0012).all()  # 5 standard errors of 1,024 values
    assert ratio.mean().item() == pytest.approx(0.01, rel=0.01)
    assert (filling.mean(dim=(2, 3)).abs() < 5 * 0.01 * kept_sd.unsqueeze(1) / 32).all()
    assert filling.abs().max() > 3 * filling.std()  # longer tails than uniform noise has


def test_the_two_dropped_channels_are_filled_independently() -> None:
    patches = of_different_contrast(30, 32)
    filling, _ = dropped_channels(patches, treated_by(Drop(noise="gaussian"), patches, seeded(7)))
    first, second = (filling / filling.std(dim=(2, 3), keepdim=True)).unbind(1)
    assert (first * second).mean().abs() < 4 / first.numel() ** 0.5


def test_uniform_filling_lies_within_half_a_gray_level_of_the_mean_whatever_the_contrast() -> None:
    patches = of_different_contrast(30, 32)
    filling, _ = dropped_channels(patches, treated_by(Drop(noise="uniform"), patches, seeded(8)))
    assert filling.abs().max().item() == pytest.approx(0.5, abs=0.001)
    deviations = filling.std(dim=(2, 3))
    assert ((deviations - 12**-0.5).abs() < 0.04).all()
    assert filling.mean().abs() < 0.002


@pytest.mark.parametrize("noise_kind", ["gaussian", "uniform"])
def test_the_noise_ratio_scales_the_filling(noise_kind: str) -> None:
    patches = of_different_contrast(4, 16)
    one, three = (
        dropped_channels(
            patches, treated_by(Drop(noise=noise_kind, noise_ratio=ratio), patches, seeded(9))
        )[0]  # type: ignore[arg-type]
        for ratio in (0.01, 0.03)
    )
    torch.testing.assert_close(three, 3 * one, rtol=0, atol=1e-3)


def test_a_flat_patch_is_filled_with_the_mean() -> None:
    treated = treated_by(Drop(noise="gaussian"), torch.full((5, 9, 3, 4, 4), 7.0), seeded(10))
    mean = torch.tensor(IMAGENET_MEAN_PX).view(3, 1, 1).expand_as(treated)
    assert ((treated == 7) | (treated == mean)).all()


def test_projection_is_the_papers_matrix_around_the_mean_color() -> None:
    a = torch.tensor([[-1.0, 2.0, -1.0]], dtype=torch.float64)
    matrix = torch.eye(3, dtype=torch.float64) - a.T @ a / (a @ a.T)
    mean = torch.tensor(IMAGENET_MEAN_PX, dtype=torch.float64)
    patches = noise(3, 9, 3, 8, 8).double()
    pixels = patches.movedim(2, -1)
    expected = ((pixels - mean) @ matrix + mean).movedim(-1, 2)
    torch.testing.assert_close(treated_by(Project(), patches, seeded(0)), expected)


def test_nothing_is_left_along_green_magenta_and_projecting_again_changes_nothing() -> None:
    patches = noise(3, 9, 3, 8, 8).double()
    once = treated_by(Project(), patches, seeded(0))
    red, green, blue = (
        once.movedim(2, -1) - torch.tensor(IMAGENET_MEAN_PX, dtype=torch.float64)
    ).unbind(-1)
    assert (2 * green - red - blue).abs().max() < 1e-9
    torch.testing.assert_close(treated_by(Project(), once, seeded(0)), once)
    assert (once - patches).abs().max() > 50  # it did something


def test_projection_keeps_the_mean_color_and_what_lies_across_green_magenta() -> None:
    mean = torch.tensor(IMAGENET_MEAN_PX).view(1, 1, 3, 1, 1)
    for across in ([0.0, 0, 0], [30, 30, 30], [20, 0, -20]):
        patches = mean + torch.tensor(across).view(3, 1, 1)
        torch.testing.assert_close(treated_by(Project(), patches, seeded(0)), patches)
