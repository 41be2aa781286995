"""Contact sheets and the table of nearest patches.

Files that are there already are replaced as a whole.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from relloc.data.image_set import ImageSet
from relloc.features.source import EncodeConfig
from relloc.files import path_as_text
from relloc.studies.contact_sheet import Tile, read_patches, save_contact_sheets
from relloc.studies.csv_tables import write_table
from relloc.studies.patch_search import NONE, NearestPatches
from relloc.studies.patch_vectors import CollectedPatches

_TABLE_FILE = "neighbors.csv"
_TILE_PX = 112


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerNeighbors:
    """The nearest patches of queries at a layer: rows of a collection, as `found` has them."""

    layer: str
    images: ImageSet
    queries: CollectedPatches
    collection: CollectedPatches
    found: NearestPatches


def write_neighbors(layers: Sequence[LayerNeighbors], folder: Path) -> None:
    """Writes a line for each neighbor of each query at each layer."""
    lines: list[dict[str, object]] = []
    for of_layer in layers:
        lines += _lines(of_layer)
    if lines:
        values = [tuple(line.values()) for line in lines]
        write_table(list(lines[0]), values, folder / _TABLE_FILE)


def _lines(neighbors: LayerNeighbors) -> Iterator[dict[str, object]]:
    images = neighbors.images
    found = neighbors.found
    for query in range(len(neighbors.queries)):
        of_query = _columns("query_", images, neighbors.queries, query)
        for rank, row in enumerate(found.rows[query].tolist()):
            if row == NONE:
                break
            yield {
                "layer": neighbors.layer,
                "query": query + 1,
                **of_query,
                "rank": rank + 1,
                **_columns("", images, neighbors.collection, row),
                "similarity": f"{found.similarities[query, rank]:.6f}",
            }


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


def save_neighbor_sheets(
    neighbors: LayerNeighbors,
    folder: Path,
    *,
    n_queries: int,
    weights: str,
    config: EncodeConfig,
) -> list[Path]:
    """Draws the first `n_queries` queries, each with its neighbors beside it; returns the files."""
    images = neighbors.images
    queries = neighbors.queries
    collection = neighbors.collection
    n_drawn = min(n_queries, len(queries))
    rows = neighbors.found.rows[:n_drawn]
    # All patches of the sheets are read together, so that no image is read twice.
    neighbor_rows = rows[rows != NONE]
    indices = torch.cat([queries.images[:n_drawn], collection.images[neighbor_rows]])
    boxes = torch.cat([queries.boxes[:n_drawn], collection.boxes[neighbor_rows]])
    pixels = read_patches(images, indices, boxes, px=_TILE_PX, config=config)
    query_pixels = pixels[:n_drawn]
    neighbor_pixels = iter(pixels[n_drawn:])
    tiles = []
    for query in range(n_drawn):
        caption = (f"query {query + 1}", *_names(images, queries, query))
        row_tiles = [Tile(pixels=query_pixels[query], caption=caption, framed=True)]
        for rank, row in enumerate(rows[query].tolist()):
            if row == NONE:
                break
            similarity = f"{neighbors.found.similarities[query, rank]:.3f}"
            caption = (similarity, *_names(images, collection, row))
            row_tiles.append(Tile(pixels=next(neighbor_pixels), caption=caption))
        tiles.append(row_tiles)
    title = (
        f"Nearest patches of {images.name} {images.split} by normalized correlation at "
        f"{neighbors.layer}: {weights}"
    )
    return save_contact_sheets(
        tiles, folder, f"neighbors_{neighbors.layer}", title=title, tile_px=_TILE_PX
    )


def _names(images: ImageSet, patches: CollectedPatches, number: int) -> list[str]:
    """Returns the file name of a patch's image, and its class where it has one."""
    index = int(patches.images[number])
    _, _, name = images.source(index).rpartition("/")
    names = [name]
    if images.labels:
        names.append(images.classes[images.labels[index]])
    return names
