"""Tables and pictures of discovered clusters, and of their purity-coverage curve.

Files that are there already are replaced as a whole.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from relloc.data.image_set import ImageSet
from relloc.features.source import EncodeConfig, SeededIndex
from relloc.figures.style import category_looks, save_png, style
from relloc.files import path_as_text
from relloc.studies.contact_sheet import Tile, save_contact_sheets
from relloc.studies.csv_tables import write_table
from relloc.studies.discovery_clusters import Cluster, PatchBoxes
from relloc.studies.image_reading import read_each
from relloc.studies.purity_coverage import PurityCoverage

CLUSTERS = "clusters.csv"
CLUSTER_IMAGES = "cluster_images.csv"
CURVE = "purity_coverage.csv"
CURVE_PICTURE = "purity_coverage.png"
SHEET = "clusters"

_TILE_PX = 176
_CLUSTERS_PER_SHEET = 10
# Of the patches in the order of `CORNERS`: upper left, upper right, lower left, lower right
_COLORS = ((228, 26, 28), (77, 175, 74), (55, 126, 255), (255, 200, 0))
_BACKGROUND = (255, 255, 255)


def write_clusters(
    clusters: Sequence[Cluster],
    selected: Sequence[Cluster],
    selected_classes: Sequence[str],
    images: ImageSet,
    folder: Path,
) -> None:
    """Writes a line for each constellation, in the order of their ranking.

    `selected` are those that are not redundant; `selected_classes` say what these mostly show.
    """
    index_in_selected = {}
    for index, cluster in enumerate(selected):
        index_in_selected[cluster.number] = index

    def lines() -> Iterator[Sequence[object]]:
        for rank, cluster in enumerate(clusters, start=1):
            index = index_in_selected.get(cluster.number)
            left, top, right, _ = cluster.seed_boxes[0].tolist()
            mean_score = cluster.scores.mean() if len(cluster.scores) else np.nan
            yield (
                rank,
                cluster.number,
                path_as_text(images.source(cluster.seed_image)),
                cluster.seed_image,
                left,
                top,
                right - left,
                len(cluster.images),
                cluster.n_searched,
                "" if np.isnan(mean_score) else f"{mean_score:.4f}",
                "" if index is None else index + 1,
                "" if index is None else selected_classes[index],
            )

    header = (
        *("rank", "constellation", "source", "image", "left", "top", "side_px"),
        *("verified", "searched", "mean_score", "selected", "most_frequent_class"),
    )
    write_table(header, lines(), folder / CLUSTERS)


def write_cluster_images(selected: Sequence[Cluster], images: ImageSet, folder: Path) -> None:
    """Writes a line for each verified image of each selected constellation, best match first."""

    def lines() -> Iterator[Sequence[object]]:
        for number, cluster in enumerate(selected, start=1):
            found = zip(cluster.images.tolist(), cluster.scores, cluster.boxes, strict=True)
            for rank, (index, score, boxes) in enumerate(found, start=1):
                source = path_as_text(images.source(index))
                corners = boxes.ravel().tolist()
                yield number, rank, source, index, f"{score:.4f}", *corners

    header = ["selected", "place", "source", "image", "score"]
    for patch in ("upper_left", "upper_right", "lower_left", "lower_right"):
        header += [f"{patch}_{corner}" for corner in ("x1", "y1", "x2", "y2")]
    write_table(header, lines(), folder / CLUSTER_IMAGES)


def write_curve(curve: PurityCoverage, shuffled: Sequence[PurityCoverage], folder: Path) -> None:
    """Writes a line for each point of the curve, and then of those with shuffled labels."""

    def lines() -> Iterator[Sequence[object]]:
        names = ["true", *(f"shuffled {number}" for number in range(1, len(shuffled) + 1))]
        for name, each in zip(names, [curve, *shuffled], strict=True):
            points = zip(each.order, each.of_set, each.coverage, each.purity, strict=True)
            for count, (number, of_set, coverage, purity) in enumerate(points, start=1):
                yield name, count, number + 1, f"{of_set:.4f}", f"{coverage:.6f}", f"{purity:.6f}"

    header = ("labels", "sets", "selected", "purity_of_set", "coverage", "mean_purity")
    write_table(header, lines(), folder / CURVE)


def draw_curve(
    curve: PurityCoverage, shuffled: Sequence[PurityCoverage], folder: Path, *, title: str
) -> None:
    """Draws the curve, and those with shuffled labels behind it."""
    with style():
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axis = figure.add_subplot()
        for number, each in enumerate(shuffled):
            label = "labels shuffled" if number == 0 else None
            _draw_steps(axis, each, color="0.7", linewidth=0.6, label=label)
        areas = f"area {100 * curve.area():.1f} %, up to coverage 0.5 {100 * curve.area(0.5):.1f} %"
        color = category_looks(1)[0]["color"]
        _draw_steps(axis, curve, color=color, linewidth=1.6, label=areas)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("coverage: share of images in at least one set")
        axis.set_ylabel("mean purity of the sets so far")
        axis.set_title(title)
        if len(curve.order):
            axis.legend(loc="lower left")
        save_png(figure, folder / CURVE_PICTURE)


def _draw_steps(axis: Axes, curve: PurityCoverage, **look: Any) -> None:
    """Draws a curve as its area is computed: coverage that a set adds has the purity after it."""
    if not len(curve.order):
        return  # without any set, the area is 0
    coverage = np.concatenate([[0.0], curve.coverage])
    purity = np.concatenate([curve.purity[:1], curve.purity])
    axis.step(coverage, purity, where="pre", **look)


def save_cluster_sheets(
    clusters: Sequence[Cluster],
    classes: Sequence[str],
    images: ImageSet,
    folder: Path,
    *,
    n_selected: int,
    n_images: int,
    title: str,
    config: EncodeConfig,
) -> list[Path]:
    """Draws a row for each cluster: the image that it was drawn in, and its first `n_images`.

    The four patches, and what they match, are framed in four colors. Clusters after the first
    `n_selected` have no set, or a redundant one, and no number. Returns the files.
    """
    keys: list[SeededIndex] = []
    boxes: list[PatchBoxes] = []
    for cluster in clusters:
        shown = [(cluster.seed_image, cluster.seed_boxes)]
        shown += zip(cluster.images[:n_images].tolist(), cluster.boxes[:n_images], strict=True)
        for index, patches in shown:
            keys.append((index, len(boxes)))
            boxes.append(patches)
    drawn = _images_with_boxes(images, keys, boxes, config)

    rows = []
    first = 0
    for number, (cluster, class_name) in enumerate(zip(clusters, classes, strict=True), start=1):
        verified = f"{len(cluster.images)} of {cluster.n_searched} verified"
        name = path_as_text(images.source(cluster.seed_image))
        heading = f"cluster {number}" if number <= n_selected else "not selected"
        caption = (f"{heading}: {verified}", class_name, Path(name).name)
        row = [
            Tile(
                pixels=drawn[first],
                caption=tuple(line for line in caption if line),
                framed=True,
            )
        ]
        first += 1
        for index, score in zip(cluster.images[:n_images], cluster.scores, strict=False):
            name = path_as_text(images.source(int(index)))
            row.append(Tile(pixels=drawn[first], caption=(f"{score:.2f}", Path(name).name)))
            first += 1
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    return save_contact_sheets(
        rows,
        folder,
        SHEET,
        title=title,
        tile_px=_TILE_PX,
        rows_per_sheet=_CLUSTERS_PER_SHEET,
    )


def _images_with_boxes(
    images: ImageSet,
    keys: Sequence[SeededIndex],
    boxes: Sequence[PatchBoxes],
    config: EncodeConfig,
) -> list[UInt8[np.ndarray, "p p 3"] | None]:
    """Returns squares with an image and its boxes for each key; None where it can't be read."""
    drawn: list[UInt8[np.ndarray, "p p 3"] | None] = [None] * len(keys)
    for batch in read_each(images, _DrawBoxes(images=images, boxes=boxes), keys, config=config):
        for place, pixels in zip(batch.places, batch.samples, strict=True):
            drawn[place] = pixels
    return drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DrawBoxes:
    """Reads an image in a worker process, and draws boxes into it, given by their number."""

    images: ImageSet
    boxes: Sequence[PatchBoxes]

    def __call__(self, index: int, seed: int) -> UInt8[np.ndarray, "p p 3"]:
        image = self.images.read(index)
        scale = _TILE_PX / max(image.size)
        width = max(1, round(scale * image.width))
        height = max(1, round(scale * image.height))
        # On a square, since tiles are squares.
        square = Image.new("RGB", (_TILE_PX, _TILE_PX), _BACKGROUND)
        left = (_TILE_PX - width) // 2
        top = (_TILE_PX - height) // 2
        square.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        pen = ImageDraw.Draw(square)
        for box, color in zip(self.boxes[seed], _COLORS, strict=True):
            x1, y1, x2, y2 = (scale * box).tolist()
            corners = (left + x1, top + y1, left + x2 - 1, top + y2 - 1)
            pen.rectangle(corners, outline=color, width=2)
        return np.array(square)
