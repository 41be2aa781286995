"""Nearest patches: what a network takes for similar, as contact sheets, a table and numbers.

The paper shows such patches beside those of other weights (docs/protocols.md 3.12). The number of
patches, their sizes and which images they come from are relloc's choice.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.data.subsets import evenly_spaced
from relloc.data.views import check_view
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.features.nearest import chunks_on_device
from relloc.files import path_as_text
from relloc.results import Score
from relloc.seeds import Use, seed_for
from relloc.studies.contact_sheet import Tile, read_patches, save_contact_sheets
from relloc.studies.csv_tables import write_table
from relloc.studies.patch_encoding import EMBEDDING, check_patch_settings
from relloc.studies.patch_search import NONE, NearestPatches, nearest_patches, source_groups
from relloc.studies.patch_sets import Boxes, RandomPatch, RandomSquares, patch_keys
from relloc.studies.patch_vectors import CollectedPatches, collect_patches
from relloc.terminal import quantity

Box = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels of the stored image

_TABLE_FILE = "neighbors.csv"
# Vectors that are multiplied with the queries at once, for the mean correlation.
_CHUNK = 1 << 14
_TILE_PX = 112
# Half the width of a 95 % interval, in standard errors of a mean.
_Z_95 = 1.96


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
    setting: ClassVar[str] = "study.neighbors"

    layers: Sequence[str]
    split: str
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
    batch: int

    def __post_init__(self) -> None:
        check_patch_settings(
            self.setting,
            layers=self.layers,
            patch_px=self.patch_px,
            batch=self.batch,
        )
        check_view(f"{self.setting}.view", self.view)
        checks.one_of(f"{self.setting}.split", self.split, ("train", "held_out"))
        for name in ("n_images", "patches_per_image", "queries", "k"):
            checks.whole(f"{self.setting}.{name}", getattr(self, name))
        checks.wholes(f"{self.setting}.sides_px", self.sides_px)
        checks.whole(f"{self.setting}.drawn", self.drawn, at_least=0)
        for name in ("one_per_image", "own_image"):
            checks.true_or_false(f"{self.setting}.{name}", getattr(self, name))
        self._check_chosen()

    def _check_chosen(self) -> None:
        """Raises `UsageError` if a chosen query is not an image and a box."""
        if not isinstance(self.chosen, list | tuple):
            raise UsageError(
                f"{self.setting}.chosen is {self.chosen}: give a list of queries, such as "
                "[{image: a.jpg, box: [0, 0, 96, 96]}]"
            )
        for number, query in enumerate(self.chosen):
            setting = f"{self.setting}.chosen[{number}]"
            if not isinstance(query, Mapping) or set(query) != {"image", "box"}:
                raise UsageError(
                    f"{setting} is {query}: give image and box, such as "
                    "{image: a.jpg, box: [0, 0, 96, 96]}"
                )
            if not isinstance(query["image"], str):
                checks.whole(f"{setting}.image", query["image"], at_least=0)
            box = checks.wholes(f"{setting}.box", query["box"], at_least=0)
            is_box = len(box) == 4 and box[0] < box[2] and box[1] < box[3]
            if not is_box:
                raise UsageError(
                    f"{setting}.box is {box}: give x1, y1, x2, y2 with x1 below x2 and y1 below y2"
                )

    def run(self, context: Context) -> Iterator[Score]:
        """Yields numbers of each layer, and writes its contact sheets; then the table of all.

        Raises:
            DataError: too many images can't be read, or too few have patches.
            UsageError: a chosen query is not there, or features are not finite.
        """
        images = context.splits.train if self.split == "train" else context.splits.held_out
        # Wrong ones are told before the collection is encoded.
        chosen_indices = self._chosen_indices(images)
        collection = self._collection(images, context)
        groups = source_groups(images, collection.images)
        n_sources = len(groups.unique())
        if n_sources < 2 and not self.own_image:
            raise DataError(
                f"all patches of {images.name} {images.split} are of one image, and a query takes "
                f"no neighbor of its own: give more images, or {self.setting}.own_image=true"
            )
        if self.chosen:
            queries = self._chosen_queries(images, chosen_indices, context)
            own_groups = _groups_of_others(images, queries.images, collection.images, groups)
            own_rows = None
        else:
            own_rows = draw_queries(groups, self.queries, context.seed)
            queries = _patches_at(collection, own_rows)
            own_groups = groups[own_rows]
        # A group that no patch has excludes none.
        excluded = torch.full_like(own_groups, NONE) if self.own_image else own_groups

        lines: list[dict[str, object]] = []
        for layer in self.layers:
            vectors = collection.vectors[layer]
            query_vectors = queries.vectors[layer].to(context.device).float()
            found = nearest_patches(
                query_vectors,
                vectors,
                groups,
                self.k,
                own_groups=excluded,
                own_rows=own_rows,
                one_per_group=self.one_per_image,
                name=f"{self.setting} at {layer}",
            )
            lines += self._lines(layer, images, queries, collection, found)
            self._draw(layer, images, queries, collection, found, context)
            means = mean_correlations(query_vectors, vectors)
            chances = None
            if images.labels:
                labels = torch.as_tensor(images.labels)
                chances = chances_of_class(
                    labels[queries.images], excluded, own_rows, labels[collection.images], groups
                )
                # Where each source is a class of its own, no neighbor can be of the query's.
                if not chances.any():
                    chances = None
            scores = list(self._scores(layer, images, queries, collection, found, means, chances))
            context.print_line(_finding(layer, scores))
            yield from scores
        if lines:
            values = [tuple(line.values()) for line in lines]
            write_table(list(lines[0]), values, context.folder / _TABLE_FILE)

    def _collection(self, images: ImageSet, context: Context) -> CollectedPatches:
        indices = evenly_spaced(len(images), self.n_images)
        return collect_patches(
            context.backbone,
            images,
            patch_keys(indices, context.seed),
            RandomSquares(n=self.patches_per_image, sides_px=tuple(self.sides_px)),
            layers=self.layers,
            patch_px=self.patch_px,
            batch=self.batch,
            config=context.encode_config,
            what=f"patches of {images.name} {images.split}",
        )

    def _chosen_indices(self, images: ImageSet) -> list[int]:
        """Returns the index of the image of each chosen query, once its box is known to fit."""
        indices = []
        for number, query in enumerate(self.chosen):
            setting = f"{self.setting}.chosen[{number}]"
            index = find_image(images, query["image"], f"{setting}.image")
            try:
                image = images.read(index)
            except UnreadableImage as error:
                raise UsageError(
                    f"{setting}.image is {query['image']}, which can't be read ({error}): give "
                    "another image"
                ) from error
            _, _, x2, y2 = query["box"]
            if x2 > image.width or y2 > image.height:
                raise UsageError(
                    f"{setting}.box is {query['box']}, but the image has {image.width} x "
                    f"{image.height} px: give a box within it"
                )
            indices.append(index)
        return indices

    def _chosen_queries(
        self, images: ImageSet, indices: Sequence[int], context: Context
    ) -> CollectedPatches:
        boxes = tuple(tuple(query["box"]) for query in self.chosen)
        # The place of a query takes the seed's, and says which of the boxes is meant.
        keys = [(index, number) for number, index in enumerate(indices)]
        return collect_patches(
            context.backbone,
            images,
            keys,
            OneBoxEach(boxes=boxes),
            layers=self.layers,
            patch_px=self.patch_px,
            batch=self.batch,
            config=context.encode_config,
            what="chosen patches",
        )

    def _lines(
        self,
        layer: str,
        images: ImageSet,
        queries: CollectedPatches,
        collection: CollectedPatches,
        found: NearestPatches,
    ) -> Iterator[dict[str, object]]:
        """Yields a line of the table for each neighbor."""
        for query in range(len(queries)):
            of_query = _columns("query_", images, queries, query)
            for rank, row in enumerate(found.rows[query].tolist()):
                if row == NONE:
                    break
                yield {
                    "layer": layer,
                    "query": query + 1,
                    **of_query,
                    "rank": rank + 1,
                    **_columns("", images, collection, row),
                    "similarity": f"{found.similarities[query, rank]:.6f}",
                }

    def _draw(
        self,
        layer: str,
        images: ImageSet,
        queries: CollectedPatches,
        collection: CollectedPatches,
        found: NearestPatches,
        context: Context,
    ) -> None:
        """Saves contact sheets: each query, and its neighbors beside it."""
        n_drawn = min(self.drawn, len(queries))
        rows = found.rows[:n_drawn]
        # All patches of the sheets are read together, so that no image is read twice.
        neighbor_rows = rows[rows != NONE]
        indices = torch.cat([queries.images[:n_drawn], collection.images[neighbor_rows]])
        boxes = torch.cat([queries.boxes[:n_drawn], collection.boxes[neighbor_rows]])
        pixels = read_patches(images, indices, boxes, px=_TILE_PX, config=context.encode_config)
        query_pixels = pixels[:n_drawn]
        neighbor_pixels = iter(pixels[n_drawn:])
        tiles = []
        for query in range(n_drawn):
            caption = (f"query {query + 1}", *_names(images, queries, query))
            row_tiles = [Tile(pixels=query_pixels[query], caption=caption, framed=True)]
            for rank, row in enumerate(rows[query].tolist()):
                if row == NONE:
                    break
                similarity = f"{found.similarities[query, rank]:.3f}"
                caption = (similarity, *_names(images, collection, row))
                row_tiles.append(Tile(pixels=next(neighbor_pixels), caption=caption))
            tiles.append(row_tiles)
        title = (
            f"Nearest patches of {images.name} {images.split} by normalized correlation at "
            f"{layer}: {context.checkpoint}"
        )
        paths = save_contact_sheets(
            tiles, context.folder, f"neighbors_{layer}", title=title, tile_px=_TILE_PX
        )
        for path in paths:
            context.print_line(f"contact sheet: {path}")

    def _scores(
        self,
        layer: str,
        images: ImageSet,
        queries: CollectedPatches,
        collection: CollectedPatches,
        found: NearestPatches,
        means: Float64[Tensor, "q"],
        chances: Float64[Tensor, "q"] | None,
    ) -> Iterator[Score]:
        """Yields correlations and, where images have a class, how many neighbors share it.

        `means` are the correlations of queries with all patches, `chances` the shares of their
        classes; None where images have none, or no other patch can share it.
        """
        exists = found.rows != NONE
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
            details=tuple(self._details(layer, images, collection)),
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
            found.rows, exists, labels[queries.images], labels[collection.images]
        )
        low, high = _interval(shares, self.chosen)
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

    def _details(self, layer: str, images: ImageSet, collection: CollectedPatches) -> Iterator[str]:
        """Yields what the numbers are of, as results have it."""
        indices = collection.images.unique().tolist()
        n_sources = len({images.source(index) for index in indices})
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneBoxEach:
    """Boxes that were chosen (`relloc.studies.patch_sets.MakeBoxes`): the seed says which one."""

    boxes: Sequence[Box]

    @property
    def most(self) -> int:
        return 1

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        return np.array([self.boxes[seed]], dtype=np.int64)


def find_image(images: ImageSet, name: str | int, setting: str) -> int:
    """Returns the index of the image with this number, or with a path that ends in this name.

    Raises:
        UsageError: there is none, or there are several.
    """
    where = f"{images.name} {images.split}"
    if isinstance(name, int):
        if name >= len(images):
            raise UsageError(
                f"{setting} is {name}, but {where} has images 0 to {len(images) - 1}: give one of "
                "them, or a file name"
            )
        return name
    indices = []
    for index in range(len(images)):
        # The end of a path counts from the name of a folder on.
        if f"/{images.source(index)}".endswith(f"/{name}"):
            indices.append(index)
    if len(indices) != 1:
        raise UsageError(
            f"{setting} is {name}, which names {quantity(len(indices), 'image')} of {where}: give "
            f"the end of a path that one image has, or its number from 0 to {len(images) - 1}"
        )
    return indices[0]


def draw_queries(groups: Int64[Tensor, "n"], n: int, seed: int) -> Int64[Tensor, "q"]:
    """Returns the numbers of `n` random patches, each of another source, or one of each source.

    They depend on which images have patches and on the seed, but not on any network. `groups` are
    the sources of the patches, numbered from 0 without gaps.
    """
    generator = torch.Generator().manual_seed(seed_for(Use.STUDY_QUERIES, seed))
    counts = groups.bincount()
    order = groups.argsort(stable=True)
    first_of_group = counts.cumsum(dim=0) - counts
    chosen_groups = torch.randperm(len(counts), generator=generator)[:n]
    # A uniform number of each of its patches
    u = torch.rand(len(counts), generator=generator, dtype=torch.float64)[:n]
    numbers = (u * counts[chosen_groups]).long()
    return order[first_of_group[chosen_groups] + numbers]


def mean_correlations(
    queries: Float[Tensor, "q d"], vectors: Float[Tensor, "n d"]
) -> Float64[Tensor, "q"]:
    """Returns the mean correlation of each query with all patches, its own included."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=queries.device)
    for _, rows in chunks_on_device(vectors, _CHUNK, queries.device):
        total += rows.sum(dim=0, dtype=torch.float64)
    mean_vector = total / len(vectors)
    return (queries.double() @ mean_vector).cpu()


def shares_of_class(
    rows: Int64[Tensor, "q k"],
    exists: Bool[Tensor, "q k"],
    query_labels: Int64[Tensor, "q"],
    patch_labels: Int64[Tensor, "n"],
) -> Float64[Tensor, "q"]:
    """Returns the share of each query's neighbors whose image has the class of the query's."""
    is_same = patch_labels[rows] == query_labels.unsqueeze(1)
    n_same = (is_same & exists).sum(dim=1)
    return n_same.double() / exists.sum(dim=1)


def chances_of_class(
    query_labels: Int64[Tensor, "q"],
    excluded: Int64[Tensor, "q"],
    own_rows: Int64[Tensor, "q"] | None,
    patch_labels: Int64[Tensor, "n"],
    groups: Int64[Tensor, "n"],
) -> Float64[Tensor, "q"]:
    """Returns the share of the query's class among all patches that may be its neighbors.

    `excluded` is the group that gives none, and `own_rows` the queries' own rows, if they have any.
    """
    chances = []
    for query, label in enumerate(query_labels.tolist()):
        is_eligible = groups != excluded[query]
        if own_rows is not None:
            is_eligible[own_rows[query]] = False
        is_same = is_eligible & (patch_labels == label)
        chances.append(int(is_same.sum()) / int(is_eligible.sum()))
    return torch.tensor(chances, dtype=torch.float64)


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


def _interval(
    shares: Float[Tensor, "q"], chosen: Sequence[object]
) -> tuple[float | None, float | None]:
    """Returns a 95 % interval of the mean share of random queries, in percent.

    Chosen queries, and a single one, have none.
    """
    n = len(shares)
    if chosen or n < 2:
        return None, None
    mean = float(shares.mean())
    # Queries are of different images, and count as independent.
    half_width = _Z_95 * float(shares.std()) / math.sqrt(n)
    return 100 * max(0.0, mean - half_width), 100 * min(1.0, mean + half_width)


def _patches_at(patches: CollectedPatches, rows: Int64[Tensor, "q"]) -> CollectedPatches:
    vectors = {}
    for layer, of_layer in patches.vectors.items():
        vectors[layer] = of_layer[rows.to(of_layer.device)]
    return CollectedPatches(vectors=vectors, images=patches.images[rows], boxes=patches.boxes[rows])


def _groups_of_others(
    images: ImageSet,
    query_images: Int64[Tensor, "q"],
    collected_images: Int64[Tensor, "n"],
    groups: Int64[Tensor, "n"],
) -> Int64[Tensor, "q"]:
    """Returns the group of each query's source, `NONE` where no patch of it was collected."""
    group_of_source = {}
    for index, group in zip(collected_images.tolist(), groups.tolist(), strict=True):
        group_of_source[images.source(index)] = group
    found = []
    for index in query_images.tolist():
        found.append(group_of_source.get(images.source(index), NONE))
    return torch.tensor(found, dtype=torch.int64)


def _names(images: ImageSet, patches: CollectedPatches, number: int) -> list[str]:
    """Returns the file name of a patch's image, and its class where it has one."""
    index = int(patches.images[number])
    _, _, name = images.source(index).rpartition("/")
    names = [name]
    if images.labels:
        names.append(images.classes[images.labels[index]])
    return names


def _columns(
    prefix: str, images: ImageSet, patches: CollectedPatches, number: int
) -> dict[str, object]:
    """Returns the columns of the table that say where a patch lies."""
    index = int(patches.images[number])
    columns: dict[str, object] = {f"{prefix}image": path_as_text(images.source(index))}
    for name, value in zip(("x1", "y1", "x2", "y2"), patches.boxes[number].tolist(), strict=True):
        columns[f"{prefix}{name}"] = value
    if images.labels:
        columns[f"{prefix}class"] = images.classes[images.labels[index]]
    return columns
