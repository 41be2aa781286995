"""Patches a second and memory of studies of patches, beside plain loops in the same run.

Five parts, each timed as a whole, with a loop that does the same one after the other:

* encoding, from JPEG files to unit vectors in float16 (`relloc.studies.patch_vectors`); the loop
  reads an image, cuts and resizes its patches by Pillow, and encodes those of one image together;
* cutting and resizing alone, on the device, of squares of many sizes (`cut_resized`); the loop
  calls torch's `interpolate` for each, as ours does too on a CPU;
* searching the nearest patch of each of k other images, exactly (`relloc.studies.patch_search`);
  the loop multiplies one query with all patches in float32, sorts, and takes what counts;
* the best images of constellations of four of these patches (`relloc.studies.best_images`), of
  which pairs of constellation and image are counted; the loop compares one constellation with one
  image after the other;
* fitting ridge regressions by sums over samples, for eight penalties (`relloc.studies.shortcuts`);
  the loop fits scikit-learn's for each penalty, on all samples in memory.

The loops are timed on a part. For a sample of queries the neighbors of both searches are compared
with a search in float64: with similarities, not with rows, as patches may be equally near.
Images are JPEGs of 375 x 500 px, 512 different ones, read again and again; --root takes others.
"""

import argparse
import gc
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import images_below
from hydra import compose, initialize_config_dir
from PIL import Image
from report import arguments, once_s, tell
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import interpolate

from relloc.data.folder import FolderImages
from relloc.data.image_set import ImageSet
from relloc.features.source import EncodeConfig
from relloc.models.backbone import Backbone
from relloc.patches.normalize import ByDataset
from relloc.runs import build, engine
from relloc.runs.command_settings import Evaluating
from relloc.runs.settings import conf_dir
from relloc.studies.best_images import BestImages, best_images
from relloc.studies.constellations import PATCHES
from relloc.studies.patch_cutting import cut_resized, flat_images
from relloc.studies.patch_encoding import EMBEDDING, EncodedPatches, PatchEncoder
from relloc.studies.patch_search import NONE, NearestPatches, nearest_patches
from relloc.studies.patch_sets import RandomSquares, patch_keys
from relloc.studies.patch_vectors import CollectedPatches, collect_patches, unit_vectors
from relloc.studies.shortcuts.ridge import PENALTIES, RidgeSums, fit, mean_squared_error

DIFFERENT_FILES = 512
HEIGHT, WIDTH = 375, 500
CUT_SIDES = range(64, 257, 16)  # of the squares that are only cut and resized
CUT_IMAGES = 16
TOP_IMAGES = 100  # of a constellation
# The search rounds similarities to 2^-40, and the sums of float64 products are off by less.
TOLERANCE = 2**-39
# Full size on a GPU, a small part of it on a CPU
DEFAULTS = {
    "cuda": {
        "images": 50_000,
        "patches": 20,
        "queries": 5_000,
        "constellations": 16_384,
        "model": "alexnet",
        "batch": 1024,
        "samples": 400_000,
        "features": 2048,
    },
    "cpu": {
        "images": 200,
        "patches": 8,
        "queries": 100,
        "constellations": 1_000,
        "model": "small",
        "batch": 128,
        "samples": 20_000,
        "features": 256,
    },
}
Row = dict[str, Any]


def main() -> None:
    options = _options()
    settings = _settings(options.overrides)
    how = engine.resolve_engine(settings.engine)
    for name, value in DEFAULTS[how.device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    config = settings.encode_config(how, shown=False)
    backbone = build.model_of_conf(options.model).backbone(0).eval()
    how.place(backbone)
    with tempfile.TemporaryDirectory() as folder:
        images = _images(options, Path(folder))
        encoding, patches = _encoding(backbone, images, config, options)
    cutting = _cutting(config.device, options)
    searching = _searching(patches, config.device, options)
    mining = _mining(patches, config.device, options)
    regressing = _regressing(config.device, options)
    rows = [*encoding, *cutting, *searching, *mining, *regressing]
    ratios = {}
    for part in (encoding, cutting, searching, mining, regressing):
        ours, loop = part
        ratios[f"{ours['part']}, ours over the loop"] = ours["a second"] / loop["a second"]
    title = (
        f"studies of patches: {options.model}, {len(patches):,} patches of {options.images:,} "
        f"images at {options.patch_px} px, {how}"
    )
    tell(title, rows, ratios, options.json, settings=vars(options))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="default: 50,000 on a GPU, 200 on a CPU")
    parser.add_argument("--patches", type=int, help="of each image; default: 20, or 8")
    parser.add_argument("--queries", type=int, help="default: 5,000, or 100")
    parser.add_argument("--constellations", type=int, help="default: 16,384, or 1,000")
    parser.add_argument("--model", help="a member of conf/model; default: alexnet, or small")
    parser.add_argument("--batch", type=int, help="patches encoded at once; default: 1,024, or 128")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 144], help="of the patches")
    parser.add_argument("--patch-px", type=int, default=96)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--plain-images", type=int, default=40, help="that the loop encodes")
    parser.add_argument("--plain-queries", type=int, default=20, help="that the loop searches")
    parser.add_argument("--plain-constellations", type=int, default=4, help="that the loop mines")
    parser.add_argument("--cut", type=int, default=2048, help="squares that are only cut")
    parser.add_argument("--samples", type=int, help="of a regression; default: 400,000, or 20,000")
    parser.add_argument("--features", type=int, help="of a sample; default: 2,048, or 256")
    parser.add_argument("--root", type=Path, help="a folder of images, in place of made ones")
    parser.add_argument(
        "overrides", nargs="*", help="settings of relloc.study, such as workers=8 precision=fp32"
    )
    return parser.parse_args()


def _settings(overrides: Sequence[str]) -> Evaluating:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = ["checkpoint=random", "study=neighbors", *overrides]
        return build.evaluating(compose("study", words))


def _images(options: argparse.Namespace, folder: Path) -> ImageSet:
    """As many images as are asked for; files are repeated where there are fewer."""
    if options.root:
        found = images_below(options.root)
        paths = [found.source(index) for index in range(len(found))]
    else:
        rng = np.random.default_rng(0)
        paths = []
        for number in range(min(DIFFERENT_FILES, options.images)):
            # Noise that is enlarged has edges and shades, and JPEGs of the size of photographs.
            coarse = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            paths.append(str(folder / f"{number}.jpg"))
            image.save(paths[-1], quality=85)
    repeated = [paths[number % len(paths)] for number in range(options.images)]
    return FolderImages(name="benchmark", split="all", paths=repeated)


def _encoding(
    backbone: Backbone, images: ImageSet, config: EncodeConfig, options: argparse.Namespace
) -> tuple[list[Row], CollectedPatches]:
    boxes = RandomSquares(n=options.patches, sides_px=tuple(options.sides))
    encoder = PatchEncoder(
        backbone=backbone,
        layers=(EMBEDDING,),
        patch_px=options.patch_px,
        batch=options.batch,
        config=config,
    )
    collected: list[CollectedPatches] = []

    def ours(n_images: int) -> None:
        patches = collect_patches(
            encoder, images, patch_keys(range(n_images), 0), boxes, what="patches"
        )
        collected[:] = [patches]

    plain = patch_keys(range(min(options.plain_images, len(images))), 0)
    vectors: list[Tensor] = []

    @torch.no_grad()
    def loop() -> None:
        for index, seed in plain:
            image = images.read(index)
            patches = []
            for box in boxes(image.height, image.width, seed):
                cut = image.crop(tuple(box.tolist()))
                size = (options.patch_px, options.patch_px)
                resized = np.array(cut.resize(size, Image.Resampling.BILINEAR))
                patches.append(torch.from_numpy(resized).permute(2, 0, 1).float())
            stacked = torch.stack(patches).to(config.device)
            with torch.autocast(config.device.type, torch.bfloat16, enabled=config.bf16):
                embedded = backbone.embed(ByDataset()(stacked))
            vectors.append(unit_vectors(embedded.float()).half())

    # What is made once is made now: kernels are chosen, files come into the page cache.
    ours(min(len(images), DIFFERENT_FILES))
    loop()
    vectors.clear()
    rows = [
        _timed("loop", "encoding", len(plain) * options.patches, loop, config.device),
        _timed(
            "ours",
            "encoding",
            len(images) * options.patches,
            lambda: ours(len(images)),
            config.device,
        ),
    ]
    (patches,) = collected
    # Pillow rounds resized pixels to whole gray levels, and the loop has other batches.
    first = patches.vectors[EMBEDDING][: len(plain) * options.patches].float().cpu()
    products = (first * torch.cat(vectors).float().cpu()).sum(dim=1)
    rows[1]["agreement"] = f"correlation {products.min():.4f} or more"
    return rows[::-1], patches


def _cutting(device: torch.device, options: argparse.Namespace) -> list[Row]:
    rng = np.random.default_rng(1)
    shape = (HEIGHT, WIDTH, 3)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(CUT_IMAGES)]
    draw = RandomSquares(n=options.cut // CUT_IMAGES, sides_px=tuple(CUT_SIDES))
    boxes = np.concatenate([draw(HEIGHT, WIDTH, seed) for seed in range(CUT_IMAGES)])
    numbers = np.arange(CUT_IMAGES).repeat(draw.n)
    flat = flat_images(arrays, device)
    pixels = [torch.from_numpy(array).to(device).permute(2, 0, 1) for array in arrays]
    found: dict[str, Tensor] = {}

    def ours() -> None:
        parts = []
        # In batches, as they are encoded
        for start in range(0, len(boxes), options.batch):
            part = slice(start, start + options.batch)
            parts.append(cut_resized(flat, numbers[part], boxes[part], options.patch_px))
        found["ours"] = torch.cat(parts)

    def loop() -> None:
        patches = []
        size = (options.patch_px, options.patch_px)
        for number, (x1, y1, x2, y2) in zip(numbers, boxes.tolist(), strict=True):
            cut = pixels[number][None, :, y1:y2, x1:x2].float()
            patches.append(interpolate(cut, size, mode="bilinear", antialias=True))
        found["loop"] = torch.cat(patches)

    ours()
    loop()
    rows = [
        _timed("ours", "cutting", len(boxes), ours, device),
        _timed("loop", "cutting", len(boxes), loop, device),
    ]
    difference = (found["ours"] - found["loop"]).abs().max()
    rows[0]["agreement"] = f"within {difference:.3f} gray levels"
    return rows


def _searching(
    patches: CollectedPatches, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    vectors = patches.vectors[EMBEDDING]
    groups = patches.images
    n_queries = min(options.queries, len(patches))
    query_rows = torch.linspace(0, len(patches) - 1, n_queries).long()
    queries = vectors[query_rows.to(vectors.device)].to(device).float()
    own = groups[query_rows]
    found: list[NearestPatches] = []
    n_plain = min(options.plain_queries, n_queries)
    by_loop: list[list[int]] = []

    def ours(n: int) -> None:
        nearest = nearest_patches(
            queries[:n],
            vectors,
            groups,
            options.k,
            own_groups=own[:n],
            own_rows=query_rows[:n],
            one_per_group=True,
            name="vectors",
        )
        found[:] = [nearest]

    def loop() -> None:
        for query in range(n_plain):
            order = _similarities(queries[query], vectors).argsort(descending=True).tolist()
            by_loop.append(_taken(order, groups, int(own[query]), options.k))

    ours(min(n_queries, 50))
    rows = [
        _timed("ours", "searching", n_queries, lambda: ours(n_queries), device),
        _timed("loop", "searching", n_plain, loop, device),
    ]
    [by_ours] = found
    sides = {"ours": by_ours.rows.tolist(), "loop": by_loop}
    errors: dict[str, list[float]] = {side: [] for side in sides}
    for query in range(n_plain):
        exact = _similarities(queries[query].double(), vectors).cpu()
        for side, neighbors in sides.items():
            error = _search_error(neighbors[query], exact, groups, int(own[query]), options.k)
            errors[side].append(error)
    for row in rows:
        of_side = errors[row["side"]]
        n_exact = sum(error <= TOLERANCE for error in of_side)
        row["agreement"] = (
            f"as near as float64's: {n_exact} of {n_plain} queries, within {max(of_side):.1e}"
        )
    return rows


def _mining(
    patches: CollectedPatches, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    vectors = patches.vectors[EMBEDDING]
    n_images = int(patches.images.max()) + 1
    top = min(TOP_IMAGES, n_images - 1)
    sources = torch.arange(n_images)
    # Four patches in a row, nearly always of one image
    firsts = torch.linspace(0, len(patches) - PATCHES, options.constellations).long()
    seed_rows = (firsts.unsqueeze(1) + torch.arange(PATCHES)).flatten()
    seeds = vectors[seed_rows.to(vectors.device)].to(device).float()
    seed_images = patches.images[firsts]
    found: list[BestImages] = []
    by_loop: list[list[int]] = []

    def encoded() -> Iterator[EncodedPatches]:
        for start in range(0, len(patches), options.batch):
            part = slice(start, start + options.batch)
            yield EncodedPatches(
                features={EMBEDDING: vectors[part].to(device).float()},
                images=patches.images[part].numpy(),
                boxes=patches.boxes[part].numpy(),
            )

    def ours() -> None:
        best = best_images(seeds, seed_images, encoded(), sources=sources, layer=EMBEDDING, top=top)
        found[:] = [best]

    n_plain = min(options.plain_constellations, len(seed_images))
    counts = patches.images.bincount(minlength=n_images)
    ends = counts.cumsum(dim=0).tolist()

    def loop() -> None:
        for number in range(n_plain):
            four = seeds[PATCHES * number : PATCHES * (number + 1)]
            scores = torch.full((n_images,), -torch.inf)
            start = 0
            for image, end in enumerate(ends):
                if end > start and image != int(seed_images[number]):
                    of_image = unit_vectors(vectors[start:end].to(device).float())
                    scores[image] = (four @ of_image.T).amax(dim=1).sum()
                start = end
            by_loop.append(scores.topk(top).values.tolist())

    rows = [
        _timed("ours", "mining", len(seed_images) * n_images, ours, device),
        _timed("loop", "mining", n_plain * n_images, loop, device),
    ]
    wanted = torch.tensor(by_loop)
    difference = (found[0].scores[:n_plain].cpu() - wanted).abs().max()
    rows[0]["agreement"] = f"scores within {difference:.1g}"
    return rows


def _similarities(query: Tensor, vectors: Tensor) -> Tensor:
    """Cosines of one query with all vectors, in the query's precision and on its device."""
    parts = []
    for rows in vectors.split(1 << 16):
        converted = rows.to(query.device, query.dtype)
        parts.append(converted @ query / converted.norm(dim=1).clamp(min=1e-12))
    return torch.cat(parts)


def _taken(order: Sequence[int], groups: Tensor, own: int, k: int) -> list[int]:
    taken: list[int] = []
    seen = {own}
    for row in order:
        group = int(groups[row])
        if group not in seen:
            seen.add(group)
            taken.append(row)
        if len(taken) == k:
            break
    return taken


def _search_error(
    neighbors: Sequence[int], exact: Tensor, groups: Tensor, own: int, k: int
) -> float:
    """Returns how far a query's similarities are from those of its nearest patches, at most.

    `exact` are its similarities to all patches. The nearest ones are searched by them; those that
    are equally near may stand in any order, or for each other. Neighbors that do not count, or too
    few, are off by infinity.
    """
    rows = [row for row in neighbors if row != NONE]
    found_groups = groups[rows].tolist()
    nearest = _taken(exact.argsort(descending=True).tolist(), groups, own, k)
    has_repeated = len(set(found_groups)) < len(rows)
    if own in found_groups or has_repeated or len(rows) != len(nearest):
        return float("inf")
    # All searches read the same vectors, so that their storage in float16 adds no difference.
    return float((exact[rows] - exact[nearest]).abs().max())


def _regressing(device: torch.device, options: argparse.Namespace) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.samples, options.features)
    x = torch.randn(shape, generator=generator, device=device)
    noise = torch.randn(options.samples, 2, generator=generator, device=device)
    y = x[:, :2] + noise
    # One sample in ten is held back, to choose the penalty.
    n_held_back = options.samples // 10
    errors: dict[str, list[float]] = {}

    def ours() -> None:
        sums = [RidgeSums(options.features, 2, device) for _ in range(2)]
        for part, rows, targets in (
            (0, x[n_held_back:], y[n_held_back:]),
            (1, x[:n_held_back], y[:n_held_back]),
        ):
            # In batches, as features come
            for some, of_some in zip(
                rows.split(options.batch), targets.split(options.batch), strict=True
            ):
                sums[part].add(some, of_some)
        fitted, held_back = sums
        errors["ours"] = []
        for penalty in PENALTIES:
            errors["ours"].append(mean_squared_error(fit(fitted, penalty), held_back))

    def loop() -> None:
        rows = x.cpu().double().numpy()
        targets = y.cpu().double().numpy()
        scaler = StandardScaler().fit(rows[n_held_back:])
        scaled = scaler.transform(rows)
        errors["loop"] = []
        for penalty in PENALTIES:
            alpha = penalty * (options.samples - n_held_back)
            ridge = SklearnRidge(alpha=alpha).fit(scaled[n_held_back:], targets[n_held_back:])
            difference = ridge.predict(scaled[:n_held_back]) - targets[:n_held_back]
            errors["loop"].append(float((difference**2).sum(axis=1).mean()))

    ours()
    rows = [
        _timed("ours", "regressing", options.samples, ours, device),
        _timed("loop", "regressing", options.samples, loop, device),
    ]
    difference = np.abs(np.array(errors["ours"]) - np.array(errors["loop"])).max()
    rows[0]["agreement"] = f"errors within {difference:.1e}"
    return rows


def _timed(
    side: str, part: str, count: int, work: Callable[[], object], device: torch.device
) -> Row:
    """Seconds, and the most memory that was held meanwhile, with all that was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = once_s(work, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of the process so far
    return {
        "part": part,
        "side": side,
        "count": count,
        "s": seconds,
        "a second": count / seconds,
        "peak GB": peak,
    }


if __name__ == "__main__":
    main()
