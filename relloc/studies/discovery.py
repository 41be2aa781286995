"""Visual data mining: which arrangements of patches are found again in many images.

Constellations of four adjacent patches are drawn in the images of a collection. In every image the
best match of each of the four is searched, and the images in which the four match best together are
kept. Where the matches lie as the constellation does, the image is verified. Constellations with
many verified images are the clusters that were discovered, without any label (docs/protocols.md
3.12).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ROLES, ImageSet, Role, Splits
from relloc.data.views import check_view
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.bank import format_gib, free_gib
from relloc.results import Score
from relloc.seeds import Use, seed_for
from relloc.studies.best_images import BestImages, best_images, check_finite
from relloc.studies.constellations import PATCHES, SeedChoice, draw_constellations, patch_boxes
from relloc.studies.discovery_clusters import (
    Cluster,
    EncodedSeeds,
    ranked_clusters,
    select_sets,
)
from relloc.studies.discovery_files import (
    draw_curve,
    save_cluster_sheets,
    write_cluster_images,
    write_clusters,
    write_curve,
)
from relloc.studies.discovery_images import (
    SearchedImages,
    main_classes,
    searched_images,
    source_numbers,
)
from relloc.studies.patch_encoding import (
    EMBEDDING,
    PATCH_LAYERS,
    PatchEncoder,
    check_patch_settings,
    encode_patches,
)
from relloc.studies.patch_sets import DenseGrid, GivenBoxes, RandomPatch
from relloc.studies.patch_vectors import collect_patches
from relloc.studies.purity_coverage import ImagesOfSets, PurityCoverage, Shows, purity_coverage
from relloc.studies.square_fit import Verification

_SETTING = "study.discovery"
_TABLE = "Visual data mining"
_HALF = 0.5  # the coverage up to which the paper gives a second area
# Bytes that a constellation takes on the device for each of its best images, and for all images
# that wait to be compared with them, with what it takes to compare them (see `best_images`).
_BYTES_PER_IMAGE = 3 * 76
_BYTES_OF_WAITING = 3 * 5_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discovery(Evaluation):
    """How many images constellations of patches are found in, and how pure such sets of images are.

    Sizes are in pixels of the stored images. All checkpoints that are evaluated with the same seed
    and images search the same constellations.

    Attributes:
        split: the images to search: "held_out" or "train".
        classes: only images that show one of these classes are searched, and only these classes
            count for purity; None for all images and classes.
        n_images: the largest number of images, which are evenly spaced; None for all.
        n_seeds: number of constellations.
        seed_places: "gradient" draws places of constellations in proportion to the squared gradient
            of the luminance in them, "uniform" all alike.
        seed_overlap: intersection over union that two constellations of an image may have.
        sides_px: sides of patches, of constellations and of what they are matched with.
        stride: largest step between patches of an image, as a share of their side.
        patch_px: side of the patches that the network sees.
        layer: what is compared: one of `relloc.studies.patch_encoding.PATCH_LAYERS`.
        top_images: the number of best images of each constellation that are verified.
        verification: when an image is verified.
        set_size: the verified images of a constellation that are its set. Constellations with fewer
            have none.
        n_sets: the largest number of sets that are selected.
        purest_first: whether the purity-coverage curve walks through sets from the purest to the
            least pure, or in the order in which they were selected, without a look at labels.
        shuffles: the number of random orders of the labels that chance is the mean of.
        view: the patches that batch norm is recalibrated on.
        batch: the number of patches that are encoded at once.
        pictured: the number of clusters of which pictures are drawn.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "study"
    labels = "own"
    version = 2
    layers = ()

    split: Role
    classes: Sequence[str] | None
    n_images: int | None
    n_seeds: int
    seed_places: str
    seed_overlap: float
    sides_px: Sequence[int]
    stride: float
    patch_px: int
    layer: str
    top_images: int
    verification: Verification
    set_size: int
    n_sets: int
    purest_first: bool
    shuffles: int
    view: RandomPatch
    batch: int = dataclasses.field(repr=False)  # decides no number
    pictured: int = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        check_patch_settings(
            _SETTING, layers=[self.layer], patch_px=self.patch_px, batch=self.batch
        )
        check_view(f"{_SETTING}.view", self.view)
        checks.one_of(f"{_SETTING}.layer", self.layer, PATCH_LAYERS)
        checks.one_of(f"{_SETTING}.split", self.split, ROLES)
        # A string would be taken for a list of its letters.
        is_list = isinstance(self.classes, list | tuple)
        if self.classes is not None and not (is_list and self.classes):
            raise UsageError(
                f"{_SETTING}.classes is {self.classes}: give a list of names of classes, such as "
                "[bus,train], or null for all"
            )
        if self.n_images is not None:
            checks.whole(f"{_SETTING}.n_images", self.n_images, at_least=2)
        checks.one_of(f"{_SETTING}.seed_places", self.seed_places, ("gradient", "uniform"))
        checks.number(f"{_SETTING}.seed_overlap", self.seed_overlap, at_least=0, at_most=1)
        checks.wholes(f"{_SETTING}.sides_px", self.sides_px)
        checks.number(f"{_SETTING}.stride", self.stride, above=0, at_most=1)
        for name in ("n_seeds", "top_images", "set_size", "n_sets", "shuffles"):
            checks.whole(f"{_SETTING}.{name}", getattr(self, name))
        checks.whole(f"{_SETTING}.pictured", self.pictured, at_least=0)
        checks.true_or_false(f"{_SETTING}.purest_first", self.purest_first)
        if self.set_size > self.top_images:
            raise UsageError(
                f"{_SETTING}.set_size is {self.set_size}, but only the "
                f"{_SETTING}.top_images={self.top_images} best images are verified: give at most "
                "as many"
            )

    def check(self, splits: Splits) -> None:
        """Checks that there are images of the classes that were asked for.

        Raises:
            UsageError: a class is not one of the data set, or images have no labels to choose by.
            DataError: a list of classes is missing or damaged, or there are fewer than two images.
        """
        self._searched_images(splits.of(self.split))

    def run(self, context: Context) -> Iterator[Score]:
        """Yields areas under the purity-coverage curve first, where images have labels.

        Without any set there is no curve: areas are left out, and so is a headline, since 0 would
        be taken for a measurement.

        Tables, contact sheets of the best clusters and the curve are written into the context's
        folder.

        Raises:
            UsageError: features are not finite, or the memory is too small.
            DataError: no image is large enough for a constellation.
        """
        images = context.splits.of(self.split)
        searched = self._searched_images(images)
        sources = source_numbers(images, searched.indices)
        seeds = self._seeds(context, images, searched.indices)
        best = self._best_images(context, images, searched.indices, sources, seeds)
        verified = self.verification.verified(best.boxes) & (best.images >= 0)
        clusters = ranked_clusters(seeds, best, verified.cpu(), self.set_size)
        selected, sets = select_sets(
            clusters, searched.indices, set_size=self.set_size, most=self.n_sets
        )
        n_images = len(searched.indices)
        curve = None
        shuffled: list[PurityCoverage] = []
        if sets and searched.shows is not None:
            curve = purity_coverage(sets, searched.shows, purest_first=self.purest_first)
            shuffled = self._shuffled_curves(sets, searched.shows, context.seed)
        self._write(context, images, clusters, selected, sets, searched, curve, shuffled)
        is_labeled = searched.shows is not None
        yield from self._scores(clusters, sets, n_images, curve, shuffled, is_labeled=is_labeled)

    def _searched_images(self, images: ImageSet) -> SearchedImages:
        return searched_images(images, self.classes, self.n_images, setting=_SETTING)

    def _encoder(self, context: Context) -> PatchEncoder:
        return PatchEncoder(
            backbone=context.backbone,
            layers=(self.layer,),
            patch_px=self.patch_px,
            batch=self.batch,
            config=context.encode_config,
        )

    def _seeds(self, context: Context, images: ImageSet, indices: Sequence[int]) -> EncodedSeeds:
        """Draws the constellations, which depend on images and seed alone, and encodes them."""
        choice = SeedChoice(
            sides_px=self.sides_px,
            by_gradient=self.seed_places == "gradient",
            most_overlap=self.seed_overlap,
        )
        drawn = draw_constellations(
            images,
            indices,
            self.n_seeds,
            choice,
            config=context.encode_config,
            seed=context.seed,
        )
        if not drawn:
            smallest = min(self.sides_px)
            raise DataError(
                f"none of {len(indices)} images of {images.name} {images.split} has room for a "
                f"constellation of {2 * smallest} x {2 * smallest} px: give smaller "
                f"{_SETTING}.sides_px"
            )
        boxes = []
        for squares in drawn.values():
            boxes.append(patch_boxes(squares).reshape(-1, 4))
        keys = [(index, number) for number, index in enumerate(drawn)]
        patches = collect_patches(
            self._encoder(context),
            images,
            keys,
            GivenBoxes(lists=boxes),
            what="patches of constellations",
            dtype=torch.float32,
        )
        vectors = patches.vectors[self.layer]
        n_bad = int((~vectors.isfinite().all(dim=1)).sum())
        check_finite(n_bad, len(vectors), self.layer)
        return EncodedSeeds(
            vectors=vectors.to(context.device),
            images=patches.images[::PATCHES],
            boxes=patches.boxes.unflatten(0, (-1, PATCHES)),
        )

    def _best_images(
        self,
        context: Context,
        images: ImageSet,
        indices: Sequence[int],
        sources: Int64[Tensor, "n"],
        seeds: EncodedSeeds,
    ) -> BestImages:
        top = min(self.top_images, len(indices) - 1)
        n_seeds = len(seeds.images)
        needed_gib = n_seeds * (top * _BYTES_PER_IMAGE + _BYTES_OF_WAITING) / 2**30
        available_gib = free_gib(context.device)
        if needed_gib > available_gib:
            raise UsageError(
                f"the {top} best images of {n_seeds:,} constellations take "
                f"{format_gib(needed_gib)}, but the memory of {context.device} has only "
                f"{format_gib(available_gib)} free: give a smaller {_SETTING}.n_seeds or "
                f"{_SETTING}.top_images"
            )
        encoded = encode_patches(
            self._encoder(context),
            images,
            [(index, 0) for index in indices],
            DenseGrid(sides_px=self.sides_px, stride=self.stride),
            what=f"matches of {n_seeds:,} constellations",
        )
        return best_images(
            seeds.vectors,
            seeds.images,
            encoded,
            sources=sources,
            layer=self.layer,
            top=top,
        )

    def _shuffled_curves(self, sets: ImagesOfSets, shows: Shows, seed: int) -> list[PurityCoverage]:
        """Returns curves of the same sets, with the labels of all images in random order."""
        curves = []
        for number in range(self.shuffles):
            rng = np.random.default_rng(seed_for(Use.DISCOVERY_LABELS, seed, number))
            order = rng.permutation(len(shows))
            curves.append(purity_coverage(sets, shows[order], purest_first=self.purest_first))
        return curves

    def _write(
        self,
        context: Context,
        images: ImageSet,
        clusters: Sequence[Cluster],
        selected: Sequence[Cluster],
        sets: ImagesOfSets,
        searched: SearchedImages,
        curve: PurityCoverage | None,
        shuffled: Sequence[PurityCoverage],
    ) -> None:
        """Writes tables and pictures."""
        folder = context.folder
        title = f"{images.name} {images.split}, {self.layer}: {context.weights}"
        selected_classes = main_classes(sets, searched)
        write_clusters(clusters, selected, selected_classes, images, folder)
        # Where few constellations have a set, the next best ones are still worth a look.
        numbers = {cluster.number for cluster in selected}
        others = [each for each in clusters if len(each.images) and each.number not in numbers]
        shown = [*selected, *others][: self.pictured]
        shown_classes = [*selected_classes, *[""] * len(others)][: self.pictured]
        write_cluster_images(selected, images, folder)
        save_cluster_sheets(
            shown,
            shown_classes,
            images,
            folder,
            n_selected=len(selected),
            n_images=self.set_size,
            title=title,
            config=context.encode_config,
        )
        if curve is not None:
            write_curve(curve, shuffled, folder)
            draw_curve(curve, shuffled, folder, title=title)
        best = clusters[0]
        context.print_line(
            f"discovery: the best of {len(clusters):,} constellations is verified in "
            f"{len(best.images)} of {best.n_searched} images; {len(selected)} clusters of "
            f"{self.set_size} images: see {folder}"
        )
        if not sets and searched.shows is not None:
            context.print_line(
                "discovery: no area under the purity-coverage curve, since no constellation has "
                f"the {_SETTING}.set_size={self.set_size} verified images of a set"
            )

    def _scores(
        self,
        clusters: Sequence[Cluster],
        sets: ImagesOfSets,
        n_images: int,
        curve: PurityCoverage | None,
        shuffled: Sequence[PurityCoverage],
        *,
        is_labeled: bool,
    ) -> Iterator[Score]:
        n_verified = sum(len(cluster.images) for cluster in clusters)
        n_searched = sum(cluster.n_searched for cluster in clusters)
        first = Score(
            table=_TABLE,
            column="verified",
            variant=self.layer,
            layer="" if self.layer == EMBEDDING else self.layer,
            metric="verified_images",
            value=100 * n_verified / max(1, n_searched),
            n=n_images,
            # Beside areas of other weights it would be a number of something else.
            headline=not is_labeled,
            higher_is_better=None,
            protocol="3.12",
            details=tuple(self._details(len(clusters))),
            on_train=self.split == "train",
        )
        covered = set()
        for positions in sets:
            covered.update(positions.tolist())
        others = [
            first,
            dataclasses.replace(
                first,
                column="coverage",
                metric="coverage",
                value=100 * len(covered) / n_images,
                headline=False,
                details=(*first.details, f"share of images in at least one of {len(sets)} sets"),
            ),
        ]
        if curve is not None:
            yield from self._areas(first, len(sets), curve, shuffled)
        yield from others

    def _areas(
        self,
        first: Score,
        n_sets: int,
        curve: PurityCoverage,
        shuffled: Sequence[PurityCoverage],
    ) -> Iterator[Score]:
        """Yields areas under the purity-coverage curve, and by chance."""
        order = "from the purest set on" if self.purest_first else "in the order of selection"
        details = (
            *first.details,
            f"{n_sets} sets of {self.set_size} images; mean purity of the sets so far, {order}, "
            "over their coverage; 100 is a purity of 1 up to a coverage of 1",
        )
        chance_detail = f"the same sets, mean of {self.shuffles} shuffles of the labels"
        for limit, column, suffix in ((1.0, "area", ""), (_HALF, "area to 0.5", "_to_half")):
            area = dataclasses.replace(
                first,
                column=column,
                metric=f"purity_coverage_area{suffix}",
                value=100 * curve.area(limit),
                headline=limit == 1.0,
                higher_is_better=True,
                details=details,
            )
            yield area
            yield dataclasses.replace(
                area,
                variant=f"{self.layer}, chance",
                metric=f"purity_coverage_area{suffix}_chance",
                value=100 * float(np.mean([each.area(limit) for each in shuffled])),
                headline=False,
                higher_is_better=None,
                details=(*details, chance_detail),
            )

    def _details(self, n_seeds: int) -> Iterator[str]:
        """Yields the constants, those of the paper and those that are our choice."""
        sides = ", ".join(map(str, self.sides_px))
        yield (
            f"{n_seeds:,} constellations of 2 x 2 patches of {sides} px of the stored image, seen "
            f"at {self.patch_px} px"
        )
        if n_seeds < self.n_seeds:
            yield (
                f"{self.n_seeds:,} were asked for, but small and flat images have no room, or none "
                "without overlap"
            )
        places = "in proportion to gradient energy"
        if self.seed_places == "uniform":
            places = "uniformly"
        yield f"places drawn {places}, overlap at most {self.seed_overlap:g} (our choice)"
        yield (
            f"best matches by normalized correlation of {self.layer} among patches at most "
            f"{self.stride:g} sides apart; {self.top_images} best images, without those of a "
            "constellation's own source"
        )
        check = self.verification
        yield (
            f"verified: best square of {check.least_side:.3g} to {check.most_side:.3g} mean patch "
            f"sides ({check.side_limits}), squared error below {check.most_error:g} squared sides"
        )
        if self.classes is not None:
            yield f"images and purity of {', '.join(self.classes)} alone"
