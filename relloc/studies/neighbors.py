"""Nearest patches: what a network takes for similar, as contact sheets, a table and numbers.

The paper shows such patches beside those of other weights (docs/protocols.md 3.12). The number of
patches, their sizes and which images they come from are relloc's choice.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ROLES, ImageSet, Role
from relloc.data.subsets import evenly_spaced
from relloc.data.views import check_view
from relloc.errors import DataError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.source import SeededIndex
from relloc.results import Score
from relloc.studies.neighbor_classes import chances_of_class, mean_interval, shares_of_class
from relloc.studies.neighbor_files import LayerNeighbors, save_neighbor_sheets, write_neighbors
from relloc.studies.neighbor_queries import (
    Queries,
    check_chosen,
    chosen_queries,
    images_of_chosen,
    random_queries,
)
from relloc.studies.patch_encoding import EMBEDDING, PatchEncoder, check_patch_settings
from relloc.studies.patch_search import NONE, mean_correlations, nearest_patches, source_groups
from relloc.studies.patch_sets import GivenBoxes, MakeBoxes, RandomPatch, RandomSquares, patch_keys
from relloc.studies.patch_vectors import CollectedPatches, collect_patches
from relloc.terminal import quantity

_SETTING = "study.neighbors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbors(Evaluation):
    """Nearest patches of query patches, by normalized correlation at each layer.

    The collection is `patches_per_image` random squares of each of `n_images` images, evenly spaced
    over the split. Random queries are patches of the collection, each of another image, and the
    same for all weights that have the run's seed; so sheets of several checkpoints can be laid side
    by side, row by row. The search is exact (`relloc.studies.patch_search`) on vectors of float16.

    Similarity is normalized correlation: the cosine of two feature vectors from each of which the
    mean of its own components has been subtracted (`relloc.studies.patch_vectors`).

    Attributes:
        layers: some of `relloc.studies.patch_encoding.PATCH_LAYERS`.
        split: the images that patches are cut from, "train" or "held_out".
        n_images: most images that are taken.
        patches_per_image: patches that are cut from each of them.
        sides_px: sides of patches in the stored image; each is as likely, of those that fit.
        patch_px: side to which patches are resized for the network.
        queries: number of random queries.
        chosen: queries in their place, each with `image` (its file name, the end of its path or its
            number in the split) and `box` (x1 y1 x2 y2, in pixels of the image).
        k: number of neighbors.
        one_per_image: whether each image gives its nearest patch alone.
        own_image: whether the query's own image gives neighbors; the query itself is none. Images
            of one source, such as tiles of a photograph, count as one image for both settings.
        drawn: number of queries on contact sheets, from the first on.
        view: the patches that batch norm is recalibrated on, if it is.
        batch: number of patches that are encoded at once.

    Raises:
        UsageError: a setting is out of range.
    """

    kind = "study"
    labels = "none"
    version = 2

    layers: Sequence[str]
    split: Role
    n_images: int
    patches_per_image: int
    sides_px: Sequence[int]
    patch_px: int
    queries: int
    chosen: Sequence[Mapping[str, Any]]
    k: int
    one_per_image: bool
    own_image: bool
    drawn: int
    view: RandomPatch
    batch: int = dataclasses.field(repr=False)  # decides no number

    def __post_init__(self) -> None:
        check_patch_settings(_SETTING, layers=self.layers, patch_px=self.patch_px, batch=self.batch)
        check_view(f"{_SETTING}.view", self.view)
        checks.one_of(f"{_SETTING}.split", self.split, ROLES)
        for name in ("n_images", "patches_per_image", "queries", "k"):
            checks.whole(f"{_SETTING}.{name}", getattr(self, name))
        checks.wholes(f"{_SETTING}.sides_px", self.sides_px)
        checks.whole(f"{_SETTING}.drawn", self.drawn, at_least=0)
        for name in ("one_per_image", "own_image"):
            checks.true_or_false(f"{_SETTING}.{name}", getattr(self, name))
        check_chosen(f"{_SETTING}.chosen", self.chosen)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields numbers of each layer, and writes its contact sheets; then the table of all.

        Raises:
            DataError: too many images can't be read, or too few have patches.
            UsageError: a chosen query is not there, or features are not finite.
        """
        images = context.splits.of(self.split)
        # Wrong ones are told before the collection is encoded.
        chosen_indices = images_of_chosen(f"{_SETTING}.chosen", self.chosen, images)
        collection = self._collection(images, context)
        groups = source_groups(images, collection.images)
        n_sources = len(groups.unique())
        if n_sources < 2 and not self.own_image:
            raise DataError(
                f"all patches of {images.name} {images.split} are of one image, and a query takes "
                f"no neighbor of its own: give more images, or {_SETTING}.own_image=true"
            )
        if self.chosen:
            patches = self._chosen_patches(images, chosen_indices, context)
            queries = chosen_queries(patches, images, collection, groups)
        else:
            queries = random_queries(collection, groups, self.queries, context.seed)
        excluded = queries.groups
        if self.own_image:
            # A group that no patch has excludes none.
            excluded = torch.full_like(queries.groups, NONE)
        chances = self._chances(images, queries, excluded, collection, groups)

        of_layers = []
        for layer in self.layers:
            vectors = collection.vectors[layer]
            query_vectors = queries.patches.vectors[layer].to(context.device).float()
            found = nearest_patches(
                query_vectors,
                vectors,
                groups,
                self.k,
                own_groups=excluded,
                own_rows=queries.rows,
                one_per_group=self.one_per_image,
                name=f"{_SETTING} at {layer}",
            )
            neighbors = LayerNeighbors(
                layer=layer,
                images=images,
                queries=queries.patches,
                collection=collection,
                found=found,
            )
            of_layers.append(neighbors)
            sheets = save_neighbor_sheets(
                neighbors,
                context.folder,
                n_queries=self.drawn,
                weights=context.weights,
                config=context.encode_config,
            )
            for path in sheets:
                context.print_line(f"contact sheet: {path}")
            means = mean_correlations(query_vectors, vectors)
            scores = list(self._scores(neighbors, means, chances))
            context.print_line(_finding(layer, scores))
            yield from scores
        write_neighbors(of_layers, context.folder)

    def _collection(self, images: ImageSet, context: Context) -> CollectedPatches:
        indices = evenly_spaced(len(images), self.n_images)
        return self._collected(
            images,
            patch_keys(indices, context.seed),
            RandomSquares(n=self.patches_per_image, sides_px=tuple(self.sides_px)),
            context,
            what=f"patches of {images.name} {images.split}",
        )

    def _chosen_patches(
        self, images: ImageSet, indices: Sequence[int], context: Context
    ) -> CollectedPatches:
        boxes = [np.array([query["box"]], dtype=np.int64) for query in self.chosen]
        # The number of a query takes the seed's place, and says which of the boxes is meant.
        keys = [(index, number) for number, index in enumerate(indices)]
        return self._collected(
            images, keys, GivenBoxes(lists=boxes), context, what="chosen patches"
        )

    def _collected(
        self,
        images: ImageSet,
        keys: Sequence[SeededIndex],
        make_boxes: MakeBoxes,
        context: Context,
        *,
        what: str,
    ) -> CollectedPatches:
        encoder = PatchEncoder(
            backbone=context.backbone,
            layers=self.layers,
            patch_px=self.patch_px,
            batch=self.batch,
            config=context.encode_config,
        )
        return collect_patches(encoder, images, keys, make_boxes, what=what)

    def _chances(
        self,
        images: ImageSet,
        queries: Queries,
        excluded: Int64[Tensor, "q"],
        collection: CollectedPatches,
        groups: Int64[Tensor, "n"],
    ) -> Float64[Tensor, "q"] | None:
        """Returns the shares of the queries' classes among what may be found.

        None where images have no class, or where each source is a class of its own, so that no
        neighbor can be of the query's.
        """
        if not images.labels:
            return None
        labels = torch.as_tensor(images.labels)
        chances = chances_of_class(
            labels[queries.patches.images],
            excluded,
            queries.rows,
            labels[collection.images],
            groups,
        )
        return chances if chances.any() else None

    def _scores(
        self,
        neighbors: LayerNeighbors,
        means: Float64[Tensor, "q"],
        chances: Float64[Tensor, "q"] | None,
    ) -> Iterator[Score]:
        """Yields correlations and, where images have a class, how many neighbors share it.

        `means` are the correlations of queries with all patches, `chances` the shares of their
        classes; None where images have none, or no other patch can share it.
        """
        layer = neighbors.layer
        images = neighbors.images
        queries = neighbors.queries
        found = neighbors.found
        correlation = Score(
            table="Nearest patches, correlation",
            column=layer,
            variant="with the nearest patch",
            # Rows name layers of the backbone; the embedding may lie behind them.
            layer="" if layer == EMBEDDING else layer,
            metric="nearest_correlation",
            unit="correlation",
            # Correlations of different networks or layers have different scales.
            higher_is_better=None,
            headline=chances is None,
            value=float(found.similarities[:, 0].mean()),
            n=len(queries),
            on_train=self.split == "train",
            details=tuple(self._details(neighbors)),
        )
        yield correlation
        yield dataclasses.replace(
            correlation,
            variant="with all patches",
            metric="mean_correlation",
            headline=False,
            value=float(means.mean()),
        )
        if chances is None:
            return
        labels = torch.as_tensor(images.labels)
        shares = shares_of_class(
            found.rows,
            found.rows != NONE,
            labels[queries.images],
            labels[neighbors.collection.images],
        )
        low, high = (None, None) if self.chosen else mean_interval(shares)
        same_class = dataclasses.replace(
            correlation,
            table=f"Nearest patches, {self.k} neighbors of the query's class",
            variant="found",
            metric=f"same_class_k{self.k}",
            series="same_class",
            k=self.k,
            unit="%",
            higher_is_better=True,
            headline=True,
            value=100 * float(shares.mean()),
            low=low,
            high=high,
        )
        yield same_class
        yield dataclasses.replace(
            same_class,
            variant="by chance",
            metric="same_class_chance",
            series="",
            k=None,
            higher_is_better=None,
            headline=False,
            value=100 * float(chances.mean()),
            low=None,
            high=None,
        )

    def _details(self, neighbors: LayerNeighbors) -> Iterator[str]:
        """Yields what the numbers are of, as results have it."""
        layer = neighbors.layer
        collection = neighbors.collection
        indices = collection.images.unique().tolist()
        n_sources = len({neighbors.images.source(index) for index in indices})
        of_sources = f" from {n_sources} sources" if n_sources < len(indices) else ""
        yield f"{len(collection)} patches of {quantity(len(indices), 'image')}{of_sources}"
        if layer == EMBEDDING:
            yield "embedding of each patch, as the pretext head gets it"
        else:
            yield f"average of each patch's {layer} map"
        yield "cosine of vectors less the mean of their own components"
        yield "chosen queries" if self.chosen else "random queries, of one image each"
        yield "the nearest patch of each image" if self.one_per_image else "any patches"
        yield "the query's image included" if self.own_image else "the query's image left out"


def _finding(layer: str, scores: Sequence[Score]) -> str:
    """Returns the numbers of a layer as a sentence."""
    values = {score.series or score.metric: score.value for score in scores}
    text = (
        f"neighbors at {layer}: mean correlation {values['nearest_correlation']:.3f} with the "
        f"nearest patch, {values['mean_correlation']:.3f} with all"
    )
    if "same_class" in values:
        text += (
            f"; {values['same_class']:.1f} % of neighbors are of the query's class, "
            f"{values['same_class_chance']:.1f} % by chance"
        )
    return text
