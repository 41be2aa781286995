"""Measures the features of each layer without labels, from one reading of the images.

The measures are RankMe, the stable rank, alpha-ReQ, LiDAR and DSE.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from relloc import checks
from relloc.data.loader import ImageBatch
from relloc.data.subsets import evenly_spaced
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evals.label_free_files import draw_measures, write_measures
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.dense_structure import dense_structure, unit_places
from relloc.features.lidar import ViewScatter
from relloc.features.source import FeatureSource, LiveFeatures
from relloc.features.spectrum import Spectrum
from relloc.patches.cut import cut
from relloc.results import Score
from relloc.seeds import Use, seed_for
from relloc.terminal import quantity

# Layers with maps of places that dense tasks read. The first stage's are close to pixels.
_DENSE_LAYERS = ("feature2", "feature3", "feature4", "feature5")
_DIMENSIONLESS = "dimensionless"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lidar:
    """What LiDAR compares: patches within an image with other images (docs/protocols.md 3.17).

    `n_images`: the images, which are its surrogate classes. `patches`: the square patches that are
    cut out of the view of each image, at random places. `patch_share`: their side, as a share of
    that of the view.

    Raises:
        UsageError: one of these is wrong.
    """

    n_images: int
    patches: int
    patch_share: float

    def __post_init__(self) -> None:
        setting = "eval.label_free.lidar"
        checks.whole(f"{setting}.n_images", self.n_images, at_least=2)
        checks.whole(f"{setting}.patches", self.patches, at_least=2)
        checks.number(f"{setting}.patch_share", self.patch_share, above=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dse:
    """The images whose maps DSE compares (docs/protocols.md 3.17).

    Raises:
        UsageError: `n_images` is below 8, the size of a group.
    """

    n_images: int

    def __post_init__(self) -> None:
        checks.whole("eval.label_free.dse.n_images", self.n_images, at_least=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFree(Evaluation):
    """Measures of the features of `n_images` held-out images, evenly spaced, without labels.

    Where there are fewer images, all are taken. RankMe, the stable rank and alpha-ReQ are of pooled
    features (`relloc.features.spectrum`), LiDAR of means over the maps of patches
    (`relloc.features.lidar`), DSE of the maps of feature2 to feature5
    (`relloc.features.dense_structure`). LiDAR and DSE take some of the same images.

    The authors of RankMe take 25,600 images. RankMe grows with their number until that is several
    times the dimensions, so only numbers for the same n can be compared. The default of 4,096
    images is twice the 2,048 dimensions of a ResNet-50's avgpool, is no more than most evaluation
    splits have, and takes a tenth of the time for the decomposition in float64 that 25,600 images
    of 9,216 dimensions take.

    Memory that grows with the number of images: on the host 4 bytes for each pooled feature, and 4
    for each channel of each place of an image of DSE, of at most 14 x 14 places; on the device 8
    for each channel of an image of LiDAR. By default that is 0.8, 0.9 and 0.05 GB for a ResNet-50.
    On the device, LiDAR takes 8 d² bytes for each layer of d channels, DSE about a gigabyte, and
    the spectra about 40 m² bytes with m the smaller of images and dimensions, 0.7 GB by default.

    `layers`: the layers to measure. `view`: how images are cropped and resized.
    `batch`: the number of images that are read at once.
    `lidar`, `dse`: constants of these measures; None for not to measure them.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "frozen"
    labels = "none"
    may_decode_on_device = True
    version = 1

    layers: Sequence[str]
    n_images: int
    view: View
    batch: int
    lidar: Lidar | None
    dse: Dse | None

    def __post_init__(self) -> None:
        self.check_inputs("eval.label_free")
        # The features of a single image, minus their mean, have no spectrum.
        checks.whole("eval.label_free.n_images", self.n_images, at_least=2)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields the measures of each layer, `rankme` first, and then writes a table and a picture.

        Places of patches, groups of images and first clusters are drawn by the run's seed; RankMe,
        the stable rank and alpha-ReQ are not random. A measure that features do not define is left
        out, such as alpha-ReQ where they span fewer than 5 directions; the details of RankMe then
        say so.

        Raises:
            UsageError: features are not finite, or all zero.
        """
        read = self._read(context)
        scores = []
        for layer in self.layers:
            for score in self._scores(layer, read, context):
                scores.append(score)
                yield score
        if not scores:
            return
        title = f"measures without labels of {context.weights or 'these weights'}"
        write_measures(scores, context.folder)
        draw_measures(scores, context.folder, title=title)
        layers = quantity(len({score.layer for score in scores}), "layer")
        context.print_line(f"label_free: measures of {layers}: see {context.folder}")

    def _scores(self, layer: str, read: "_Read", context: Context) -> Iterator[Score]:
        rows = torch.cat(read.features[layer])
        details = [f"singular values of {len(rows)} images, evenly spaced over the split"]
        if layer != "avgpool":
            details.append(f"features of {layer} pooled as in 3.1")
        try:
            spectrum = Spectrum(rows, device=context.device)
            rankme = spectrum.rankme()
        except ValueError as error:
            raise UsageError(
                f"eval.label_free at {layer}: {error}. The network may have diverged or be "
                "dead there, or half precision overflowed: give precision=fp32, "
                "batch_norm=recalibrated, other weights, or leave the layer out"
            ) from error
        rank = Score(
            table="Label-free measures",
            column=layer,
            variant="RankMe",
            layer=layer,
            metric="rankme",
            unit="directions",
            # A higher rank is not better in itself: it has to be seen beside accuracies.
            higher_is_better=None,
            headline=True,
            value=rankme,
            n=len(rows),
            details=tuple(details),
        )
        others = [
            dataclasses.replace(
                rank,
                variant="stable rank",
                metric="stable_rank",
                headline=False,
                value=spectrum.stable_rank(),
            )
        ]
        # Features may use too few directions for a power law, or be the same everywhere, which is
        # a finding and no error.
        missing = []
        try:
            others.append(
                dataclasses.replace(
                    others[0],
                    variant="alpha-ReQ",
                    metric="alpha_req",
                    unit="exponent",
                    value=spectrum.alpha_req(),
                )
            )
        except ValueError as error:
            missing.append(f"no alpha-ReQ: {error}")
        if self.lidar is not None:
            try:
                others.append(_lidar_score(others[0], read, layer))
            except ValueError as error:
                missing.append(f"no LiDAR: {error}")
        if layer in read.places:
            try:
                others += _dense_scores(others[0], read, layer, context)
            except ValueError as error:
                missing.append(f"no DSE: {error}")
        yield dataclasses.replace(rank, details=(*details, *missing))
        yield from others

    def _read(self, context: Context) -> "_Read":
        """Reads the images once, and computes from them all that the measures need."""
        source = context.held_out
        positions = evenly_spaced(source.n, self.n_images)
        indices = torch.tensor(positions, dtype=torch.int64)
        read = _Read(layers=self.layers, lidar=self.lidar, has_dse=self.dse is not None)
        if self.lidar is None and self.dse is None:
            for features, _ in source.batches(indices, self.batch, self.layers):
                read.add_features(features)
            return read
        of_lidar = _some_of(positions, self.lidar.n_images if self.lidar else 0)
        of_dse = _some_of(positions, self.dse.n_images if self.dse else 0)
        for features, views in _live(source).batches_with_views(indices, self.batch, self.layers):
            read.add_features(features)
            chosen = _chosen(views, of_dse)
            if len(chosen.pixels):
                read.add_places(chosen, context)
            chosen = _chosen(views, of_lidar)
            if len(chosen.pixels):
                read.add_patches(chosen, context, self.batch)
        return read


def _some_of(positions: Sequence[int], most: int) -> Collection[int]:
    """Returns at most `most` of the positions, evenly spaced."""
    if not most:
        return ()
    return {positions[step] for step in evenly_spaced(len(positions), most)}


def _live(source: FeatureSource) -> LiveFeatures:
    """Returns the source, which is live where an evaluation does not keep features."""
    if not isinstance(source, LiveFeatures):
        raise TypeError(f"LiDAR and DSE need images, and {type(source).__name__} has none")
    return source


def _chosen(views: ImageBatch, indices: Collection[int]) -> ImageBatch:
    """Returns the views of those images that are among `indices`."""
    is_chosen = torch.tensor([index in indices for index in views.indices.tolist()])
    return ImageBatch(
        pixels=views.pixels[is_chosen],
        indices=views.indices[is_chosen],
        unreadable={},
    )


class _Read:
    """What was computed from the images that were read.

    Attributes:
        features: For each layer, the pooled features of each batch (b d), on the CPU.
        scatters: For each layer, what LiDAR needs; empty without LiDAR.
        places: For each layer of DSE, features of places of each batch (b places d), on the CPU.
        images: The indices of the images of `places`.
        patch_px: The side of LiDAR's patches.
    """

    def __init__(self, *, layers: Sequence[str], lidar: Lidar | None, has_dse: bool) -> None:
        self.lidar = lidar
        self.features: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        self.scatters: dict[str, ViewScatter] = {}
        if lidar is not None:
            self.scatters = {layer: ViewScatter() for layer in layers}
        self.places: dict[str, list[Tensor]] = {}
        if has_dse:
            self.places = {layer: [] for layer in layers if layer in _DENSE_LAYERS}
        self.images: list[int] = []
        self.patch_px = 0

    def add_features(self, features: dict[str, Tensor]) -> None:
        """Adds the pooled features of a batch."""
        for layer, batches in self.features.items():
            batches.append(features[layer].cpu())

    def add_places(self, views: ImageBatch, context: Context) -> None:
        """Adds the features of the places of a batch."""
        pixels = views.pixels.to(context.device, non_blocking=True)
        maps = _maps(pixels, context)
        for layer, batches in self.places.items():
            batches.append(unit_places(maps[layer]).cpu())
        self.images += views.indices.tolist()

    def add_patches(self, views: ImageBatch, context: Context, batch: int) -> None:
        """Adds patches of a batch, encoded as many at once as have the pixels of `batch` views."""
        lidar = self.lidar
        if lidar is None:
            return
        side_px = views.pixels.shape[-1]
        self.patch_px = max(1, round(lidar.patch_share * side_px))
        pixels = views.pixels.to(context.device, non_blocking=True)
        corners = _random_corners(views.indices, lidar.patches, side_px - self.patch_px, context)
        share_of_pixels = (self.patch_px / side_px) ** 2
        n_images = max(1, int(batch / share_of_pixels) // lidar.patches)
        for some_pixels, some_corners in zip(
            pixels.split(n_images), corners.split(n_images), strict=True
        ):
            patches = cut(some_pixels, some_corners.to(context.device), self.patch_px)
            maps = _maps(patches.flatten(0, 1), context)
            for layer, scatter in self.scatters.items():
                # avgpool is the mean over the map of feature5.
                stage = "feature5" if layer == "avgpool" else layer
                means = maps[stage].float().mean(dim=(2, 3))
                scatter.add(means.unflatten(0, (-1, lidar.patches)))


def _random_corners(
    indices: Int[Tensor, "b"], n_patches: int, most: int, context: Context
) -> Int[Tensor, "b n 2"]:
    """Returns for each image the corners (row, column) of patches, each from 0 to `most`."""
    corners = []
    for index in indices.tolist():
        seed = seed_for(Use.LIDAR_PATCHES, context.seed, index)
        generator = torch.Generator().manual_seed(seed)
        corners.append(torch.randint(most + 1, (n_patches, 2), generator=generator))
    return torch.stack(corners)


@torch.no_grad()
def _maps(pixels: UInt8[Tensor, "b 3 h w"], context: Context) -> dict[str, Tensor]:
    """Returns the map (b d rows columns) of each stage."""
    config = context.encode_config
    images = config.to_device(pixels)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
        return context.backbone(images)


def _lidar_score(rank: Score, read: _Read, layer: str) -> Score:
    """Returns LiDAR of a layer; `rank` has the fields that all measures share.

    Raises:
        ValueError: the features do not define it.
    """
    scatter = read.scatters[layer]
    features = f"features are means over the map of {layer}"
    if layer == "avgpool":
        features = "features are means over the map of feature5, so that this is LiDAR of feature5"
    n_patches = read.lidar.patches if read.lidar else 0
    return dataclasses.replace(
        rank,
        variant="LiDAR",
        metric="lidar",
        value=scatter.lidar(),
        n=scatter.n,
        protocol="3.17",
        details=(
            f"surrogate classes are {quantity(scatter.n, 'image')}, each with {n_patches} patches "
            f"of {read.patch_px} px at random places of its view",
            features,
        ),
    )


def _dense_scores(rank: Score, read: _Read, layer: str, context: Context) -> list[Score]:
    """Returns DSE of a layer and its terms; `rank` has the fields that all measures share.

    Raises:
        ValueError: the features do not define it.
    """
    batches = read.places[layer]
    if not batches:
        raise ValueError("none of its images can be read")
    places = torch.cat(batches)
    structure = dense_structure(
        places,
        read.images,
        seed=context.seed,
        device=context.device,
    )
    dse = dataclasses.replace(
        rank,
        variant="DSE",
        metric="dse",
        unit=_DIMENSIONLESS,
        value=structure.dse,
        n=structure.n,
        protocol="3.17",
        details=(
            f"{places.shape[1]} places of the map of {layer} of each of {structure.n} images, in "
            "random groups of 8",
        ),
    )
    # The authors scale terms before they compare checkpoints, so each is kept. They have columns of
    # their own, and a line for each layer.
    terms = {
        "between": structure.between,
        "dimension": structure.dimension,
        "within_group": structure.within_group,
        "within_image": structure.within_image,
    }
    scores = [dse]
    for name, value in terms.items():
        term = dataclasses.replace(
            dse,
            metric=f"dse_{name}",
            value=value,
            table="Terms of DSE",
            column=name.replace("_", " "),
            variant=layer,
        )
        scores.append(term)
    return scores
