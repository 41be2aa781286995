"""Each audit finds out a network that is known to use the shortcut, and no other."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from contexts import context
from PIL import Image
from torch import Tensor, nn

from relloc.data.image_set import Splits
from relloc.data.photos import photos
from relloc.data.views import Center
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import PretextModel
from relloc.features.source import EncodeConfig
from relloc.geometry import CENTER, NEIGHBORS, OFFSETS, PatchGrid, ShortSide
from relloc.models.backbone import Backbone
from relloc.patches.color import Drop, Gray, Keep, Project
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.results import Score
from relloc.studies.shortcuts import study as study_module
from relloc.studies.shortcuts import verdicts
from relloc.studies.shortcuts.study import Shortcuts

PATCH_PX, PITCH_PX = 24, 29
GRID = PatchGrid(
    patch_px=PATCH_PX, gap_px=PITCH_PX - PATCH_PX, jitter_px=0, resize=ShortSide(px=96)
)
COLORS = {
    "none": Keep(),
    "drop": Drop(noise="gaussian"),
    "projection": Project(),
    "gray": Gray(p=1.0, weights="luma"),
}
GUILTY = {"uses it", "reacts to it, wrongly"}
ABOUT_ANSWERS = {
    *("lens", "channel_shift", "black_border", "mirrored_border", "jpeg_grid"),
    *("continuity", "continuity_noise"),
}


@pytest.fixture
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about numbers: drawing takes as long as measuring, and others draw the same."""
    leave_picture_out(monkeypatch)


def leave_picture_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "draw_findings", lambda *_, **__: None)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return photos(tiles=[0.4], stride=0.8)


def study(**changes: object) -> Shortcuts:
    settings = {
        "layers": ["feature1", "feature5"],
        "view": Center(short_px=128, crop_px=128),
        "batch": 16,
        "n_images": 24,
        "train_images": 24,
        "noise_images": 96,
        "patch_px": 32,
        "short_px": 64,
        "patches_per_image": 2,
        "network_epochs": 0,
        "colors": COLORS,
        "lens": [0.01, 0.03],
        "shift_px": 1,
        "border_px": 8,
        "jpeg_quality": 50,
        "jpeg_shift_px": 4,
        "smooth_px": 3.0,
        "negligible": 3.0,
    }
    return Shortcuts(**{**settings, **changes})  # pyright: ignore


def asked(network: nn.Module, grid: PatchGrid = GRID) -> PretextModel:
    patches = PatchPipeline(grid=grid, color=Keep(), normalize=ByDataset())
    return PretextModel(network=network.eval(), patches=patches, digest="made")


def measured(
    evaluation: Shortcuts, splits: Splits, folder: Path, **changes: object
) -> dict[tuple[str, str], Score]:
    given = context(splits=splits, folder=folder, **changes)
    return {(score.metric, score.layer): score for score in evaluation.run(given)}


def words(scores: dict[tuple[str, str], Score], shortcut: str) -> str:
    [score] = [each for (metric, _), each in scores.items() if metric == f"effect_{shortcut}"]
    return score.details[0].removeprefix("verdict: ")


def guilty_of(scores: dict[tuple[str, str], Score]) -> set[str]:
    return {shortcut for shortcut in ABOUT_ANSWERS if words(scores, shortcut) in GUILTY}


class Answers(nn.Module):
    """A network that answers by the row and column that it believes each patch to have."""

    def believed(self, patches: Tensor) -> Tensor:
        """The place (row, column) of each patch (n 3 p p), of which only differences count."""
        raise NotImplementedError

    def forward(self, patches: Tensor) -> Tensor:
        believed = self.believed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        offsets = believed[:, list(NEIGHBORS)] - believed[:, CENTER : CENTER + 1]
        possible = torch.tensor(OFFSETS, dtype=torch.float32)
        return -(offsets.unsqueeze(2) - possible).square().sum(dim=-1)


class AtRandom(Answers):
    def believed(self, patches: Tensor) -> Tensor:
        mixed = patches.double().flatten(1)[:, ::7].sum(dim=1, keepdim=True) * 1e3
        return torch.cat([torch.sin(mixed), torch.sin(1.7 * mixed)], dim=1).float()


class ByColorShift(Answers):
    """Reads how far green lies from red, by least squares on the gradient of red."""

    def believed(self, patches: Tensor) -> Tensor:
        red, green = patches[:, 0], patches[:, 1]
        # Both on one scale, whatever the normalization is
        red = red * 0.229 + 0.485
        green = green * 0.224 + 0.456
        along_rows, along_columns = torch.gradient(red, dim=(1, 2))
        gradient = torch.stack([along_rows, along_columns], dim=-1).flatten(1, 2)
        difference = (green - red).flatten(1).unsqueeze(-1)
        squared = gradient.mT @ gradient + 1e-6 * torch.eye(2)
        # Green shows what red shows further out: (green - red) is shift times gradient.
        return 5.0 * torch.linalg.solve(squared, gradient.mT @ difference).squeeze(-1)


class ByJpegPhase(Answers):
    """Reads at which pixel of a patch blocks of 8 begin, where there are blocks."""

    # Patches begin at 0, 29 and 58 px: at these phases of the blocks
    phases = tuple(start * PITCH_PX % 8 for start in range(3))

    def believed(self, patches: Tensor) -> Tensor:
        places = []
        for axis in (2, 3):
            steps = patches.diff(dim=axis).square().mean(dim=(1, 5 - axis))
            # A block begins after the step that is larger than others.
            by_phase = torch.stack([steps[:, start::8].mean(dim=1) for start in range(8)], dim=1)
            begins = (by_phase.argmax(dim=1) + 1) % 8
            phase = (8 - begins) % 8
            place = torch.ones(len(patches))
            for cell, known in enumerate(self.phases):
                place = torch.where(phase == known, torch.tensor(float(cell)), place)
            places.append(place)
        return torch.stack(places, dim=1)


class ByBlackBorder(Answers):
    def believed(self, patches: Tensor) -> Tensor:
        black = patches.amax(dim=1) < -1.7  # as black is after the normalization
        rows, columns = black.float().mean(dim=2), black.float().mean(dim=1)
        places = [lines[:, -4:].mean(dim=1) - lines[:, :4].mean(dim=1) for lines in (rows, columns)]
        return torch.stack(places, dim=1)


class ByMirror(Answers):
    def believed(self, patches: Tensor) -> Tensor:
        places = []
        for axis in (2, 3):
            is_seam = (patches.diff(dim=axis) == 0).all(dim=1).all(dim=4 - axis)
            half = PATCH_PX // 2
            places.append(is_seam[:, half:].float().sum(1) - is_seam[:, :half].float().sum(1))
        return torch.stack(places, dim=1)


class ByContinuity(nn.Module):
    """Compares the pixels on both sides of each border that two patches may share."""

    def forward(self, patches: Tensor) -> Tensor:
        neighbors, center = patches[:, list(NEIGHBORS)], patches[:, CENTER : CENTER + 1]
        logits = []
        for row, column in OFFSETS:
            touching = neighbors[..., _edge(-row), :][..., _edge(-column)]
            own = center[..., _edge(row), :][..., _edge(column)]
            logits.append(-(touching - own).square().mean(dim=(2, 3, 4)))
        return torch.stack(logits, dim=2)


def _edge(side: int) -> slice:
    return {-1: slice(0, 1), 0: slice(None), 1: slice(-1, None)}[side]


@pytest.mark.parametrize(
    ("network", "shortcuts"),
    [
        pytest.param(AtRandom, set(), id="at random"),
        pytest.param(ByColorShift, {"lens", "channel_shift"}, id="color shift"),
        pytest.param(ByJpegPhase, {"jpeg_grid"}, id="JPEG"),
        pytest.param(ByBlackBorder, {"black_border"}, id="black border"),
        pytest.param(ByMirror, {"mirrored_border"}, id="mirrored border"),
        pytest.param(ByContinuity, {"continuity_noise"}, id="continuity"),
    ],
)
def test_the_audits_find_out_what_a_network_answers_by(
    network: Callable[[], nn.Module],
    shortcuts: set[str],
    splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each of them knows one shortcut and nothing about photographs, so none would be judged.
    monkeypatch.setattr(verdicts, "knows_photographs", lambda _findings: True)
    if network is not ByColorShift:  # one picture of verdicts is enough
        leave_picture_out(monkeypatch)
    scores = measured(study(), splits, tmp_path, pretext=asked(network()))
    guilty = guilty_of(scores)
    if network is AtRandom:
        assert not guilty
    assert shortcuts <= guilty
    for score in scores.values():
        is_about_network = score.metric.startswith("top1") or score.unit == "points"
        assert score.batch_norm == ("as_trained" if is_about_network else "")
    for metric in ("top1_noise", "effect_lens", "effect_jpeg_grid", "effect_padding_noise"):
        assert (scores[metric, ""].dataset, scores[metric, ""].split) == ("noise", "generated")
    for metric in ("top1_photographs", "effect_channel_shift", "effect_position_none"):
        assert scores[metric, ""].dataset == ""
        assert "patches" in scores[metric, ""].view
    # White noise as it is tells nothing to anyone.
    assert is_at_chance(scores["top1_noise", ""])
    if network is ByColorShift:
        # The treatments that hide the shift do so.
        assert is_at_chance(scores["top1_noise_lens_0.03_drop", ""])
        assert scores["top1_noise_lens_0.03_none", ""].value > 90
    if network is ByContinuity:
        assert (scores["effect_continuity", ""].low or 0) > 0


def test_nothing_is_told_of_a_network_at_chance(splits: Splits, tmp_path: Path) -> None:
    scores = measured(study(), splits, tmp_path, pretext=asked(ByBlackBorder()))
    assert is_at_chance(scores["top1_photographs", ""])
    assert scores["top1_noise_black_border", ""].value > 30
    for shortcut in ABOUT_ANSWERS:
        assert words(scores, shortcut) == f"{verdicts.CANNOT_TELL}: {verdicts.AT_CHANCE}"
    assert verdicts.AT_CHANCE in (tmp_path / "verdicts.md").read_text()


def test_a_network_that_is_asked_elsewhere_is_not_asked_again(
    splits: Splits, tmp_path: Path
) -> None:
    evaluation = study(noise_images=8, n_images=4, train_images=4)
    pretext = asked(AtRandom())
    scores = measured(evaluation, splits, tmp_path, pretext=pretext, asks_pretext=False)
    assert {score.unit for score in scores.values() if score.headline} == {"%"}
    assert not any(metric.startswith("top1") for metric, _ in scores)


def test_a_network_is_asked_that_was_trained_on_patches_that_fill_the_image(
    splits: Splits, tmp_path: Path
) -> None:
    evaluation = study(noise_images=8, n_images=4, train_images=4)
    # Images are resized to just what the patches take up, side by side.
    grid = PatchGrid(patch_px=PATCH_PX, gap_px=0, jitter_px=0, resize=ShortSide(px=3 * PATCH_PX))
    scores = measured(evaluation, splits, tmp_path, pretext=asked(AtRandom(), grid))
    assert scores["top1_gap_0", ""].n == scores["top1_gap_3", ""].n == 4
    # Both are about the same patches, whose numbers are drawn from the same seeds.
    assert scores["top1_gap_0", ""].value == scores["top1_photographs", ""].value


@pytest.mark.usefixtures("without_picture")
def test_rows_of_effects_are_named_alike_for_all_networks(tmp_path: Path) -> None:
    evaluation = study(colors={"none": Keep()}, noise_images=8)
    rows = []
    for layer in ("feature1", "feature2"):
        scores = measured(
            dataclasses.replace(evaluation, layers=[layer]),
            made_splits(noise(60)),
            tmp_path,
            backbone=WithoutPadding().eval(),
        )
        for shortcut in ("position_none", "padding_photographs", "padding_noise"):
            score = scores[f"effect_{shortcut}", ""]
            assert score.choice.startswith(layer)
            rows.append((layer, score.metric, score.table, score.column, score.variant))
    half = len(rows) // 2
    assert [row[1:] for row in rows[:half]] == [row[1:] for row in rows[half:]]


def is_at_chance(score: Score) -> bool:
    assert score.low is not None
    assert score.high is not None
    # Twice the width of its interval, which one of twenty numbers leaves by chance
    return abs(score.value - 12.5) <= score.high - score.low


class Made:
    """Images in memory, each a source of its own."""

    name = "made"
    labels = None
    classes = ()

    def __init__(self, split: str, pixels: np.ndarray) -> None:
        self.split = split
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def source(self, index: int) -> str:
        return f"{index}.png"

    def digest(self) -> str:
        return "made"


def made_splits(pixels: np.ndarray) -> Splits:
    half = len(pixels) // 2
    return Splits(train=Made("train", pixels[:half]), held_out=Made("val", pixels[half:]))


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, 80, 96, 3), dtype=np.uint8)


class WithoutPadding(Backbone):
    """Each cell of its maps sees its own pixels alone."""

    stage_channels = (6, 6, 6, 6, 6)
    pooled_sides = (2, 2, 2, 2, 2)
    embedding_dim = 6

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Tanh())]
        layers += [nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh()) for _ in range(4)]
        self.layers = nn.ModuleList(layers)

    def layers_of_stages(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.layers]

    def embed(self, patches: Tensor) -> Tensor:
        return self(patches)["feature5"].mean(dim=(2, 3))


def test_positions_are_read_off_features_where_there_are_some(tmp_path: Path) -> None:
    evaluation = study(n_images=60, train_images=60, colors={"none": Keep()}, patches_per_image=4)
    said = []
    backbone = WithoutPadding().eval()
    in_noise = measured(
        evaluation,
        made_splits(noise(120)),
        tmp_path / "noise",
        backbone=backbone,
        print_line=said.append,
    )
    # Brightness grows downward and redness to the right.
    pixels = noise(120) // 8
    pixels += np.linspace(0, 200, 80).astype(np.uint8)[None, :, None, None]
    pixels[..., 0] = np.linspace(0, 255, 96).astype(np.uint8)
    in_gradients = measured(
        evaluation, made_splits(pixels), tmp_path / "gradients", backbone=backbone
    )

    assert words(in_noise, "position_none") != "has it"
    assert words(in_noise, "padding_noise") != "has it"
    assert words(in_gradients, "position_none") == "has it"
    assert words(in_gradients, "padding_photographs") == "has it"
    layer = "feature5"
    found = in_gradients["position_rmse_none", layer].value
    center = in_gradients["position_rmse_of_center_none", layer].value
    assert found < 0.3 * center
    easiest = in_gradients["position_rmse_easiest_none", layer].value
    assert easiest < found
    # Without a network of the pretext task one line says so, and nothing is asked.
    assert sum("no network of the pretext task" in line for line in said) == 1
    assert not any(metric.startswith("top1") for metric, _ in in_noise)
    assert (tmp_path / "noise" / "shortcuts.png").stat().st_size > 10_000


@pytest.mark.usefixtures("without_picture")
def test_padding_tells_positions_in_noise(splits: Splits, tmp_path: Path) -> None:
    scores = measured(study(n_images=4, train_images=4), splits, tmp_path)
    assert words(scores, "padding_noise") == "has it"


def test_a_small_network_finds_positions_too(tmp_path: Path) -> None:
    pixels = noise(80) // 8
    pixels += np.linspace(0, 200, 80).astype(np.uint8)[None, :, None, None]
    evaluation = study(
        n_images=20,
        train_images=40,
        patch_px=16,
        network_epochs=20,
        patches_per_image=8,
        colors={"none": Keep()},
        noise_images=4,
    )
    scores = measured(evaluation, made_splits(pixels), tmp_path)
    found = scores["position_rmse_none_network", ""].value
    assert found < 0.95 * scores["position_rmse_of_center_none_network", ""].value


def test_the_batch_is_not_in_the_fingerprint() -> None:
    assert repr(study()) == repr(study(batch=5))
    assert repr(study()) != repr(study(n_images=5))


def test_batches_and_workers_change_nothing_and_files_hold_all(
    splits: Splits, tmp_path: Path
) -> None:
    jittered = PatchGrid(patch_px=24, gap_px=5, jitter_px=2, resize=ShortSide(px=100))
    pretext = asked(ByColorShift(), jittered)
    pretext = dataclasses.replace(
        pretext, patches=dataclasses.replace(pretext.patches, color=Drop(noise="gaussian"))
    )
    backbone = WithoutPadding().eval()
    scores = []
    for batch, workers in ((16, 0), (5, 2)):
        config = EncodeConfig(
            batch=16,
            workers=workers,
            device=torch.device("cpu"),
            precision="fp32",
            unreadable_share=0.0,
        )
        evaluation = study(batch=batch, noise_images=8)
        scores.append(
            measured(
                evaluation,
                splits,
                tmp_path,
                pretext=pretext,
                encode_config=config,
                backbone=backbone,
            )
        )
    first, second = scores
    assert first.keys() == second.keys()
    for key, score in first.items():
        # Batches change the rounding of features alone. Answers are counted. What positions
        # explain, far below zero where nothing is learned, was seen to move by a thousandth.
        tolerance = 1e-3
        if key[0].startswith("top1"):
            tolerance = 1e-9
        elif key[0].startswith("position_explained"):
            tolerance = 2e-2
        assert score.value == pytest.approx(second[key].value, rel=tolerance, abs=tolerance), key

    with (tmp_path / "shortcuts.csv").open() as file:
        rows = {(row["metric"], row["layer"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows == {key: score.value for key, score in second.items()}
    lines = (tmp_path / "verdicts.md").read_text().splitlines()
    headlines = [score for score in second.values() if score.headline]
    assert len(lines) == 2 + len(headlines) == 2 + 4 + 2 + len(ABOUT_ANSWERS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", ["avgpool"]),
        ("n_images", 1),
        ("train_images", 0),
        ("noise_images", 3),
        ("patch_px", 0),
        ("short_px", 31),
        ("patches_per_image", 3),
        ("network_epochs", -1),
        ("colors", {}),
        ("lens", []),
        ("lens", [0.01, 0.005]),
        ("lens", [0.5]),
        ("shift_px", 0),
        ("border_px", 0),
        ("jpeg_quality", 101),
        ("jpeg_shift_px", 8),
        ("smooth_px", 0),
        ("negligible", 0),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"study.shortcuts.{name}"):
        study(**{name: value})


def test_what_cannot_be_measured_is_refused(splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="border_px is 21.* 20,"):
        measured(study(border_px=21), splits, tmp_path, pretext=asked(AtRandom()))
    # A map of a single cell
    too_small = study(view=Center(short_px=64, crop_px=64))
    with pytest.raises(UsageError, match="feature5"):
        measured(too_small, splits, tmp_path)
    # Which is known before anything is computed
    backbone = context(splits=splits, folder=tmp_path).backbone
    with pytest.raises(UsageError, match="feature5"):
        too_small.check_network(backbone)
    dataclasses.replace(too_small, layers=["feature1"]).check_network(backbone)
    with pytest.raises(DataError, match="made val has 1"):
        study().check(Splits(train=splits.train, held_out=Made("val", noise(1))))
