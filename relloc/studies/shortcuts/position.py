"""Reads positions off frozen features: of single patches in their image, and of cells in maps.

Positions are (row, column) in parts of the height and width of the image, from -1/2 to 1/2; 0 is
the center. Each class learns from the training images (`learn`), is then fitted (`finish`), and
measures its squared errors on other images (`test`). Nothing but sums is kept of an image.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relloc.errors import UsageError
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import Color, Normalize
from relloc.seeds import Use, seed_for
from relloc.studies.shortcuts.reading import StudiedImage
from relloc.studies.shortcuts.ridge import ChosenRidge, RidgeSums, fit_best

# Cells of a map that are looked at, a side: evenly spaced, with both borders among them.
_CELLS_A_SIDE = 8
_COORDINATES = 2
# One in so many sources of images is held back, to choose penalties and the layer of a verdict.
_HELD_BACK_EVERY = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared errors of a regressor, and of answering always the center, on the same patches.

    Each is the mean over an image's patches, added over both coordinates, in squared parts of the
    image's sides. `chosen_*` are of the patches by which the easiest images are chosen, `other_*`
    of the others, `all_*` of both. `when_chosen` is the error on training images held back, in
    parts of that of the center.
    """

    when_chosen: float
    all_error: Float[np.ndarray, "n"]
    all_center: Float[np.ndarray, "n"]
    chosen_error: Float[np.ndarray, "n"]
    other_error: Float[np.ndarray, "n"]
    other_center: Float[np.ndarray, "n"]

    def easiest(self) -> Int[np.ndarray, "m"]:
        """Returns the tenth of the images with the smallest errors, at least one image.

        They are chosen by one half of their patches and measured on the other half. A regressor
        that knows nothing would otherwise seem to, on images where it was lucky.
        """
        count = -(-len(self.chosen_error) // 10)
        return np.argsort(self.chosen_error, kind="stable")[:count]

    def easiest_of(self, sources: Sequence[str]) -> list[str]:
        """Returns the sources of the easiest images; `sources` are those of all images."""
        chosen = []
        for index in self.easiest():
            chosen.append(sources[int(index)])
        return chosen


def held_back_sources(sources: Iterable[str]) -> set[str]:
    """Returns a tenth of the sources of images, at least one of several, and none of one."""
    names = sorted(set(sources))
    if len(names) < 2:
        return set()
    return set(names[::_HELD_BACK_EVERY])


def treated_patches(
    images: Sequence[StudiedImage],
    color: Color,
    normalize: Normalize,
    *,
    seeds: Sequence[int],
    device: torch.device,
) -> Float[Tensor, "b k 3 p p"]:
    """Returns the single patches of images as a network takes them; the colors have seeds."""
    pixels = torch.from_numpy(np.stack([image.patches for image in images]))
    pixels = pixels.to(device).permute(0, 1, 4, 2, 3).float()
    _, count, _, side, _ = pixels.shape
    generator = torch.Generator(device)
    of_images = []
    for seed in seeds:
        generator.manual_seed(seed)
        of_images.append(color.draw(1, count, side, generator))
    drawn = [torch.cat(parts) for parts in zip(*of_images, strict=True)]
    return normalize(color(pixels.contiguous(), *drawn))


def color_seeds(images: Sequence[StudiedImage], *, seed: int, split: int) -> list[int]:
    """Returns the seeds of the random colors of images; `split`: 0 for training, 1 for held out."""
    return [seed_for(Use.SHORTCUT_COLORS, seed, split, image.index) for image in images]


@torch.no_grad()
def feature_maps(
    backbone: Backbone, pixels: Float[Tensor, "n 3 h w"], layers: Sequence[str], *, bf16: bool
) -> dict[str, Float[Tensor, "n _c _h _w"]]:
    """Returns the maps of some layers, in float32."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        maps = backbone(pixels)
    return {layer: maps[layer].float() for layer in layers}


class _SplitSums:
    """The sums of one layer, of images that are fitted and of those held back."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._fitted = RidgeSums(features, _COORDINATES, device)
        self._held_back = RidgeSums(features, _COORDINATES, device)

    def add(
        self,
        x: Float[Tensor, "b m d"],
        y: Float[Tensor, "b m 2"],
        is_held_back: Bool[np.ndarray, "b"],
    ) -> None:
        """Adds `m` samples of each of `b` images."""
        for chosen, sums in ((~is_held_back, self._fitted), (is_held_back, self._held_back)):
            indices = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
            sums.add(x[indices].flatten(0, 1), y[indices].flatten(0, 1))

    def fit(self) -> ChosenRidge:
        # Where nothing could be held back, the penalty is chosen on the images that are fitted.
        held_back = self._held_back if self._held_back.n else self._fitted
        return fit_best(self._fitted, held_back)


class PatchPositions:
    """Ridge regressions of the place of a patch, one for each layer and color treatment.

    A patch's features are the means of the maps of a layer over their rows and columns.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[str],
        colors: Mapping[str, Color],
        normalize: Normalize,
        *,
        bf16: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._backbone = backbone
        self._layers = layers
        self._colors = colors
        self._normalize = normalize
        self._bf16 = bf16
        self._seed = seed
        self._device = device
        self._sums: dict[tuple[str, str], _SplitSums] = {}
        self._fitted: dict[tuple[str, str], ChosenRidge] = {}
        self._errors: dict[tuple[str, str], list[Tensor]] = collections.defaultdict(list)
        self._centers: list[Tensor] = []

    def learn(self, images: Sequence[StudiedImage], is_held_back: Bool[np.ndarray, "b"]) -> None:
        """Adds training images."""
        positions = positions_of(images, self._device)
        for color in self._colors:
            for layer, x in self._features(images, color, split=0).items():
                key = (color, layer)
                if key not in self._sums:
                    self._sums[key] = _SplitSums(x.shape[-1], self._device)
                self._sums[key].add(x, positions, is_held_back)

    def finish(self) -> None:
        """Fits the regressions."""
        for key, sums in self._sums.items():
            self._fitted[key] = sums.fit()

    def test(self, images: Sequence[StudiedImage]) -> None:
        """Measures the errors on images that were not learned."""
        positions = positions_of(images, self._device)
        self._centers.append(positions.square().sum(dim=-1).cpu())
        for color in self._colors:
            for layer, x in self._features(images, color, split=1).items():
                key = (color, layer)
                predicted = self._fitted[key].ridge(x.flatten(0, 1)).view_as(positions)
                error = (predicted - positions).square().sum(dim=-1)
                self._errors[key].append(error.cpu())

    def errors(self) -> dict[tuple[str, str], Errors]:
        """Returns the errors by color treatment and layer."""
        centers = torch.cat(self._centers)
        found = {}
        for key, parts in self._errors.items():
            when_chosen = self._fitted[key].error_when_chosen
            found[key] = errors_of(torch.cat(parts), centers, when_chosen)
        return found

    def _features(
        self, images: Sequence[StudiedImage], color: str, *, split: int
    ) -> dict[str, Float[Tensor, "b k _d"]]:
        seeds = color_seeds(images, seed=self._seed, split=split)
        patches = treated_patches(
            images, self._colors[color], self._normalize, seeds=seeds, device=self._device
        )
        b, k = patches.shape[:2]
        maps = feature_maps(self._backbone, patches.flatten(0, 1), self._layers, bf16=self._bf16)
        features = {}
        for layer, each in maps.items():
            features[layer] = each.mean(dim=(2, 3)).unflatten(0, (b, k))
        return features


class MapPositions:
    """Ridge regressions of the place of a cell in the map of a whole image, one for each layer."""

    def __init__(
        self, backbone: Backbone, layers: Sequence[str], *, bf16: bool, device: torch.device
    ) -> None:
        self._backbone = backbone
        self._layers = layers
        self._bf16 = bf16
        self._device = device
        self._sums: dict[str, _SplitSums] = {}
        self._fitted: dict[str, ChosenRidge] = {}
        self._errors: dict[str, list[Tensor]] = collections.defaultdict(list)
        self._centers: dict[str, list[Tensor]] = collections.defaultdict(list)

    def learn(self, pixels: Float[Tensor, "b 3 s s"], is_held_back: Bool[np.ndarray, "b"]) -> None:
        """Adds training images, normalized."""
        for layer, (x, positions) in self._cells(pixels).items():
            if layer not in self._sums:
                self._sums[layer] = _SplitSums(x.shape[-1], self._device)
            self._sums[layer].add(x, positions, is_held_back)

    def finish(self) -> None:
        """Fits the regressions."""
        for layer, sums in self._sums.items():
            self._fitted[layer] = sums.fit()

    def test(self, pixels: Float[Tensor, "b 3 s s"]) -> None:
        """Measures the errors on images that were not learned."""
        for layer, (x, positions) in self._cells(pixels).items():
            predicted = self._fitted[layer].ridge(x.flatten(0, 1)).view_as(positions)
            error = (predicted - positions).square().sum(dim=-1)
            self._errors[layer].append(error.cpu())
            self._centers[layer].append(positions.square().sum(dim=-1).cpu())

    def errors(self) -> dict[str, Errors]:
        """Returns the errors by layer."""
        found = {}
        for layer, parts in self._errors.items():
            centers = torch.cat(self._centers[layer])
            when_chosen = self._fitted[layer].error_when_chosen
            found[layer] = errors_of(torch.cat(parts), centers, when_chosen)
        return found

    def _cells(
        self, pixels: Float[Tensor, "b 3 s s"]
    ) -> dict[str, tuple[Float[Tensor, "b m _d"], Float[Tensor, "b m 2"]]]:
        """Returns the features of evenly spaced cells, and the positions of their centers.

        Raises:
            UsageError: a map has a single cell, whose place is no question.
        """
        cells = {}
        for layer, maps in feature_maps(
            self._backbone, pixels, self._layers, bf16=self._bf16
        ).items():
            refuse_single_cell(layer, maps, side_px=pixels.shape[-1])
            rows = evenly_spaced_cells(maps.shape[2], maps.device)
            columns = evenly_spaced_cells(maps.shape[3], maps.device)
            chosen = maps[:, :, rows][..., columns]
            x = chosen.flatten(2).transpose(1, 2)
            of_rows = (rows + 0.5) / maps.shape[2] - 0.5
            of_columns = (columns + 0.5) / maps.shape[3] - 0.5
            positions = torch.cartesian_prod(of_rows, of_columns)
            cells[layer] = x, positions.expand(len(maps), -1, -1)
        return cells


def refuse_single_cell(layer: str, maps: Float[Tensor, "b _d h w"], *, side_px: int) -> None:
    """Raises `UsageError` if maps of a layer, of images of `side_px`, have one cell each."""
    if maps.shape[2] * maps.shape[3] == 1:
        raise UsageError(
            f"study.shortcuts.layers has {layer}, whose map of an image of {side_px} px is a "
            "single cell: give a larger study.shortcuts.view.crop_px, or leave the layer out"
        )


def evenly_spaced_cells(count: int, device: torch.device) -> Int[Tensor, "m"]:
    """Returns up to 8 of the rows or columns of a map, the first and the last among them."""
    chosen = min(count, _CELLS_A_SIDE)
    return torch.linspace(0, count - 1, chosen, device=device).round().long()


def positions_of(images: Sequence[StudiedImage], device: torch.device) -> Float[Tensor, "b k 2"]:
    """Returns the positions of the images' single patches."""
    return torch.from_numpy(np.stack([image.positions for image in images])).to(device)


def errors_of(
    errors: Float[Tensor, "n k"], centers: Float[Tensor, "n k"], when_chosen: float
) -> Errors:
    """Returns errors and those of the center, averaged over the patches of each image."""

    def mean(rows: Float[Tensor, "n _k"]) -> Float[np.ndarray, "n"]:
        return rows.double().mean(dim=1).numpy()

    return Errors(
        when_chosen=when_chosen / float(centers.mean()),
        all_error=mean(errors),
        all_center=mean(centers),
        chosen_error=mean(errors[:, ::2]),
        other_error=mean(errors[:, 1::2]),
        other_center=mean(centers[:, 1::2]),
    )
