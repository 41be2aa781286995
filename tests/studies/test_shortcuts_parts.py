"""The parts of the study of shortcuts, against their twins in libraries or written out."""

import dataclasses
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from relloc.data.photos import read_photo
from relloc.evaluation.contract import PretextModel
from relloc.geometry import PatchGrid, ShortSide
from relloc.patches.color import Keep
from relloc.patches.normalize import PerPatch
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.held_out import accuracy
from relloc.studies.shortcuts import distortions
from relloc.studies.shortcuts.estimates import Estimate, accuracy_estimate, difference_estimate
from relloc.studies.shortcuts.findings import Findings, Origin
from relloc.studies.shortcuts.position import errors_of, evenly_spaced_cells, held_back_sources
from relloc.studies.shortcuts.questions import Strengths, questions
from relloc.studies.shortcuts.reading import SinglePatches, cut_anywhere
from relloc.studies.shortcuts.ridge import RidgeSums, fit, fit_best, mean_squared_error
from relloc.studies.shortcuts.scores import make_scores
from relloc.studies.shortcuts.verdicts import (
    CANNOT_TELL,
    DOES_NOT,
    FIT_FAILED,
    HOLDS,
    HOLDS_NOT,
    NEGATIVE,
    USES,
    USES_WRONGLY,
    Verdict,
    judge,
    judge_features,
)

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 7, generator=generator(seed)) * torch.logspace(-2, 3, 7) + 50
    x[:, 3] = 4.0  # a feature that never changes, as of a dead unit
    y = x[:, :2] / x[:, :2].std(dim=0) + torch.randn(n, 2, generator=generator(seed + 1))
    return x, y


def sums_of(x: Tensor, y: Tensor) -> RidgeSums:
    sums = RidgeSums(x.shape[1], y.shape[1], CPU)
    # In batches, of which one is empty
    sizes = [100, 0, len(x) - 100]
    for rows, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        sums.add(rows, targets)
    return sums


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 10.0])
def test_ridge_regression_is_that_of_scikit_learn(penalty: float) -> None:
    x, y = samples(300, seed=0)
    scaler = StandardScaler().fit(x.double().numpy())
    oracle = SklearnRidge(alpha=penalty * 300).fit(
        scaler.transform(x.double().numpy()), y.double().numpy()
    )
    other_x, other_y = samples(150, seed=9)
    expected = oracle.predict(scaler.transform(other_x.double().numpy()))
    ridge = fit(sums_of(x, y), penalty)
    assert np.allclose(ridge(other_x).numpy(), expected, rtol=1e-4, atol=1e-4)
    error = ((expected - other_y.double().numpy()) ** 2).sum(axis=1).mean()
    assert mean_squared_error(ridge, sums_of(other_x, other_y)) == pytest.approx(error, rel=1e-6)


def test_the_penalty_is_chosen_on_samples_held_back() -> None:
    fitted, held_back = sums_of(*samples(120, seed=0)), sums_of(*samples(150, seed=9))
    penalties = (1e-6, 1e-2, 100.0)
    errors = [mean_squared_error(fit(fitted, penalty), held_back) for penalty in penalties]
    chosen = fit_best(fitted, held_back, penalties)
    assert chosen.error_when_chosen == min(errors)
    assert chosen.ridge.penalty == penalties[int(np.argmin(errors))]
    # Fitted on all samples in the end
    both = fit(fitted.together_with(held_back), chosen.ridge.penalty)
    assert torch.allclose(chosen.ridge.weights, both.weights)


@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("content", ["photograph", "noise"])
def test_compression_is_that_of_libjpeg(quality: int, content: str) -> None:
    photograph = np.asarray(read_photo("coffee").crop((100, 100, 180, 180)))
    noise = distortions.smooth_noise(1, 80, 2.0, generator())[0].permute(1, 2, 0).numpy()
    pixels = photograph if content == "photograph" else noise
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    expected = np.asarray(Image.open(file)).astype(int)
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)
    ours = distortions.jpeg(images, quality, 0, 80)[0].permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(ours - expected)
    # libjpeg computes in whole numbers: a coefficient on the edge may be rounded otherwise.
    assert difference.mean() < 1.0
    assert np.abs(ours - pixels.astype(int)).mean() > 2 * difference.mean()


def test_the_grid_of_blocks_moves() -> None:
    images = distortions.smooth_noise(20, 90, 4.0, generator())
    for offset in (0, 3, 7):
        compressed = distortions.jpeg(images, 20, offset, 84).float()
        assert compressed.shape == (20, 3, 84, 84)
        for axis in (2, 3):
            steps = compressed.diff(dim=axis).square().mean(dim=(0, 1, 5 - axis))
            by_phase = torch.stack([steps[start::8].mean() for start in range(8)])
            # The step before the first pixel of a block is the largest.
            assert (int(by_phase.argmax()) + 1 + offset) % 8 == 0


def test_a_lens_moves_green_to_the_center_in_proportion_to_the_distance() -> None:
    ramp = torch.arange(101, dtype=torch.uint8)
    images = ramp.expand(1, 3, 101, 101).contiguous()
    red, green, blue = distortions.through_lens(images, 0.1)[0].float()
    assert torch.equal(red, images[0, 0].float())
    assert torch.equal(blue, red)
    # Column 50 is the center; column 80 shows what was 10 % further out.
    assert green[40, 50] == 50
    assert green[40, 80] == 83
    assert green[40, 20] == 17
    rows = distortions.through_lens(images.mT.contiguous(), 0.1)[0, 1].float()
    assert (rows - green.T).abs().max() <= 1  # a half may be rounded up or down

    shifted = distortions.shifted_to_the_right(images, 2)[0].float()
    assert torch.equal(shifted[1, :, 2:], images[0, 1, :, :-2].float())
    assert torch.equal(shifted[0], images[0, 0].float())


def test_noise_through_a_lens_is_gray_without_one() -> None:
    field = distortions.gray_field(30, 60, generator())
    red, green, blue = distortions.field_through_lens(field, 0.0).unbind(dim=1)
    assert red.equal(green)
    assert red.equal(blue)
    # Its contrast does not tell the place.
    images = distortions.field_through_lens(field, 0.02).float()
    contrast = images[:, 1].std(dim=(0, 2))
    assert contrast.std() < 0.1 * contrast.mean()
    shifted = images[:, 1] - images[:, 0]
    assert shifted[:, 28:32, 28:32].abs().mean() < 0.3 * shifted[:, :4, :4].abs().mean()


def test_borders_are_black_or_mirror_what_is_inside() -> None:
    images = distortions.white_noise(2, 20, generator())
    center = images[..., 4:16, 4:16]
    black = distortions.with_black_border(images, 3, 12)
    assert black[..., 3:9, 3:9].equal(center[..., 3:9, 3:9])
    assert not black[..., :3, :].any()
    assert not black[..., 9:].any()
    mirrored = distortions.with_mirrored_border(images, 3, 12)
    inside = center[..., 3:9, 3:9]
    assert mirrored[..., 3:9, 3:9].equal(inside)
    assert mirrored[..., :3, 3:9].equal(inside[..., :3, :].flip(-2))
    assert mirrored[..., 3:9, 9:].equal(inside[..., -3:].flip(-1))


def test_single_patches_lie_where_they_are_said_to() -> None:
    # Red is the row and green the column of each pixel.
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[..., 0] = np.arange(100)[:, None]
    pixels[..., 1] = np.arange(140)
    single = SinglePatches(patch_px=20, short_px=100, count=50)
    patches, positions = cut_anywhere(Image.fromarray(pixels), single, random.Random(0))
    rows = patches[..., 0].mean(axis=(1, 2)) + 0.5
    columns = patches[..., 1].mean(axis=(1, 2)) + 0.5
    assert np.allclose(positions[:, 0], rows / 100 - 0.5, atol=1e-6)
    assert np.allclose(positions[:, 1], columns / 140 - 0.5, atol=1e-6)
    # Anywhere: both ends of the range are nearly reached.
    assert positions[:, 0].min() < -0.35
    assert positions[:, 0].max() > 0.35


def test_the_easiest_images_are_chosen_by_other_patches_than_they_are_measured_on() -> None:
    errors = torch.tensor([[0.0, 9.0, 0.0, 9.0], [5.0, 1.0, 5.0, 1.0]])
    found = errors_of(errors, torch.ones(2, 4), 0.5)
    assert found.easiest().tolist() == [0]
    assert found.other_error[found.easiest()].tolist() == [9.0]
    assert found.easiest_of(["a", "b"]) == ["a"]
    assert found.when_chosen == 0.5


def test_cells_of_maps_include_both_borders() -> None:
    assert evenly_spaced_cells(7, CPU).tolist() == list(range(7))
    many = evenly_spaced_cells(56, CPU).tolist()
    assert (len(many), many[0], many[-1]) == (8, 0, 55)


def test_a_tenth_of_the_sources_is_held_back() -> None:
    assert len(held_back_sources(str(n % 30) for n in range(90))) == 3
    assert held_back_sources(["a", "b", "a"]) == {"a"}
    assert held_back_sources(["a", "a"]) == set()


@pytest.mark.parametrize("gap_px", [0, 8, 48])
@pytest.mark.parametrize("jitter_px", [0, 7])
@pytest.mark.parametrize("is_resized", [False, True])
def test_crops_hold_the_patches_of_every_question(
    gap_px: int, jitter_px: int, is_resized: bool
) -> None:
    grid = PatchGrid(patch_px=64, gap_px=gap_px, jitter_px=jitter_px, resize=None)
    if is_resized:
        # To the grid's own size, which leaves no room around it
        grid = dataclasses.replace(grid, resize=ShortSide(px=grid.span_px))
    patches = PatchPipeline(grid=grid, color=Keep(), normalize=PerPatch())
    strengths = Strengths(
        lens=(0.01,), shift_px=3, border_px=16, jpeg_quality=50, jpeg_shift_px=4, smooth_px=4.0
    )
    side = grid.span_px + 2 * strengths.margin_px(grid)
    pretext = PretextModel(network=nn.Identity(), patches=patches, digest="")
    asked = questions(pretext, {}, strengths)
    # A network that was trained on patches side by side is asked about some that lie 8 px apart.
    assert "gap_8" in [question.name for question in asked]
    for question in asked:
        assert question.patches.grid.span_px <= side


def test_accuracies_have_the_intervals_of_the_pretext_task() -> None:
    right = torch.randint(0, 9, (40,), generator=generator())
    sources = [str(n // 2) for n in range(40)]
    expected = accuracy(right, sources)
    ours = accuracy_estimate(right, sources)
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (expected.percent, expected.low, expected.high)
    )
    assert (ours.n, ours.sources) == (40, 20)
    # Answers that are the same in both have no difference, and it is certain.
    none = difference_estimate(right, right, sources)
    assert (none.value, none.half_width) == (0, 0)


def effect(value: float, half_width: float) -> Estimate:
    return Estimate(value=value, half_width=half_width, n=1000, sources=1000)


@pytest.mark.parametrize("sources", [["a", "a"], ["a", "b"]])
def test_only_numbers_of_several_sources_have_an_interval(sources: list[str]) -> None:
    accuracy_of_two = accuracy_estimate(torch.tensor([1, 5]), sources)
    verdict = Verdict(
        shortcut="a", title="b", effect=accuracy_of_two, unit="%", meaning="", origin=Origin()
    )
    findings = Findings(
        asked=(),
        right={},
        patch_errors={},
        map_errors={},
        sources=sources,
        single=SinglePatches(patch_px=8, short_px=16, count=1),
    )
    (score,) = make_scores(findings, [verdict])
    n_sources = len(set(sources))
    assert (score.low is not None, score.high is not None) == (n_sources > 1, n_sources > 1)
    assert ("interval, clustered" in score.details[-1]) == (n_sources > 1)


@pytest.mark.parametrize(
    ("half_width", "is_told"), [(2.0, True), (0.0, False), (float("inf"), False)]
)
def test_a_sentence_has_an_interval_that_tells_something(half_width: float, is_told: bool) -> None:
    verdict = Verdict(
        shortcut="a",
        title="b",
        effect=effect(67.0, half_width),
        unit="points",
        meaning="",
        origin=Origin(),
    )
    assert "+67.0 points" in verdict.sentence
    assert ("65.0 to +69.0" in verdict.sentence) == ("interval" in verdict.sentence) == is_told


def test_verdicts_follow_from_intervals() -> None:
    assert judge(effect(2.0, 0.5), 1.0, verdicts=7) == (USES, "")
    assert judge(effect(-2.0, 0.5), 1.0, verdicts=7) == (USES_WRONGLY, "")
    assert judge(effect(0.3, 0.5), 1.0, verdicts=7) == (DOES_NOT, "")
    assert judge(effect(0.3, 0.8), 1.0, verdicts=7) == (CANNOT_TELL, "")
    # Of one verdict an interval just above 0 is enough; of many it is not.
    assert judge(effect(1.1, 1.0), 1.0, verdicts=1) == (USES, "")
    assert judge(effect(1.1, 1.0), 1.0, verdicts=7) == (CANNOT_TELL, "")
    assert judge(effect(9.0, float("inf")), 1.0, verdicts=7) == (CANNOT_TELL, "")
    assert judge_features(effect(30.0, 5.0), 1.0, verdicts=7) == (HOLDS, "")
    assert judge_features(effect(-0.3, 0.5), 1.0, verdicts=7) == (HOLDS_NOT, "")


def test_effects_below_zero_do_not_clear_where_only_those_above_tell() -> None:
    below = effect(-2.0, 0.5)
    assert judge(below, 1.0, verdicts=7, only_above=True) == (CANNOT_TELL, NEGATIVE)
    assert judge_features(below, 1.0, verdicts=7) == (CANNOT_TELL, FIT_FAILED)
    # More images may tell where the interval reaches what is negligible.
    assert judge(effect(-2.0, 1.5), 1.0, verdicts=7, only_above=True) == (CANNOT_TELL, "")
    assert judge_features(effect(-2.0, 1.5), 1.0, verdicts=7) == (CANNOT_TELL, "")
