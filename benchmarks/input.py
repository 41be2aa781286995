"""Images/s from files on disk to uint8 batches on the device, by the path of training.

Original files beside shards of the same images, packed as JPEGs and as pixels, decoded by worker
processes and on the device, by the number of workers; and decoding alone. "a core" is by the
processor seconds used, which other work on the same cores changes little. Files are read several
times, so that they come from the page cache: the disk is not measured.
"""

import argparse
import contextlib
import io
import itertools
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from relloc.data.crops import Crops
from relloc.data.device_decoding import load_to_device
from relloc.data.folder import FolderImages, folder
from relloc.data.image_set import ImageSet, Splits
from relloc.data.loader import Unreadable
from relloc.data.manifest import JPEG, PIXELS
from relloc.data.packing import Packing, pack, packing_of
from relloc.data.shards import shards
from relloc.data.slots import load_in_slots
from relloc.geometry import PatchGrid, ShortSide
from relloc.pretext.feed import HELD_FORWARDS, Feed
from relloc.runs.run_settings import DECODES
from relloc.seeds import Use

GRID = PatchGrid(
    patch_px=64, gap_px=21, jitter_px=(0, 21), resize=ShortSide(px=292)
)  # conf/grid/mmselfsup.yaml
# As conf/prepare.yaml packs by default, and with format=pixels
PACKINGS = {
    f"{name} shards": packing_of(format=format, short_px=292)
    for name, format in (("JPEG", JPEG), ("pixel", PIXELS))
}
BATCH = 64
DECODED = 512  # JPEGs that decoding alone goes through
Row = dict[str, Any]


def main() -> None:
    """Time the three kinds of files, then decoding alone."""
    asked = _asked()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = _some(folder(name="files", root=asked.root, held_out_share=0.05), asked.files)
    with contextlib.ExitStack() as until_timed:
        sides: dict[str, ImageSet] = {"original files": files.train}
        folders: dict[str, Path] = {}
        for name, given in (("JPEG shards", asked.shards), ("pixel shards", asked.pixels)):
            packing = PACKINGS[name]
            folders[name] = until_timed.enter_context(_packed(files, given, packing))
            sides[name] = shards(root=str(folders[name])).train
        rows = [row for workers in asked.workers for row in _loading(sides, workers, device, asked)]
        jpegs = {
            "original files": _file_jpegs(files.train),
            "JPEG shards": _shard_jpegs(folders["JPEG shards"]),
        }
        rows += [
            row
            for source, content in jpegs.items()
            for row in _decoding(source, content, device, asked)
        ]
    report.tell(
        "files to uint8 batches", rows, _ratios(rows, asked), asked.json, settings=vars(asked)
    )


def training_rates(
    images: ImageSet, *, workers: int, n_images: int, device: torch.device, decode: str = "cpu"
) -> tuple[float, float]:
    """Images/s of one loader by the clock, and by the processor seconds it takes.

    `decode` is the setting of that name. The processor seconds are those of this process and its
    workers. By the clock, each worker's first batch, with its start, is not counted.
    """
    n_batches, started_after = n_images // BATCH, max(1, workers)
    places = range((n_batches + started_after) * BATCH)
    samples = [(place % len(images), place // len(images)) for place in places]
    batches = [samples[start : start + BATCH] for start in places[::BATCH]]
    crops = Crops(images, GRID, use=Use.CROP, seed=0, centered=False)
    cpu_before = cpu_s()
    if decode == "device":
        loaded = load_to_device(crops, batches, workers=workers, device=device)
    else:
        loaded = load_in_slots(
            crops,
            batches,
            workers=workers,
            pin=device.type == "cuda",
            images=BATCH,
            side_px=GRID.span_px,
            batches_held=HELD_FORWARDS,
            print_message=print,
        )
    unreadable = Unreadable(n_images=len(images), most_share=1)
    feed = iter(
        Feed(loaded, unreadable, images_per_batch=BATCH, batches_per_forward=1, device=device)
    )
    for _ in range(started_after):
        next(feed)
    started = time.perf_counter()
    given = sum(len(forward) for forward in feed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return given / (time.perf_counter() - started), len(places) / (cpu_s() - cpu_before)


def cpu_s() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _loading(
    sides: dict[str, ImageSet], workers: int, device: torch.device, asked: argparse.Namespace
) -> list[Row]:
    n_images = asked.images * max(1, workers)
    rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, (side, images), decode in itertools.product(range(asked.rounds), sides.items(), DECODES):
        found = training_rates(
            images, workers=workers, n_images=n_images, device=device, decode=decode
        )
        rates.setdefault((side, decode), []).append(found)
    rows = []
    for (side, decode), found in rates.items():
        by_clock, by_cpu = map(statistics.median, zip(*found, strict=True))
        what = f"loaded for training, to {device.type}, decode={decode}"
        rows.append(_row(side, what, by_clock, by_cpu, workers) | {"decode": decode})
    return rows


def _decoding(
    source: str, jpegs: list[bytes], device: torch.device, asked: argparse.Namespace
) -> list[Row]:
    tensors = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    ways: dict[str, Callable[[], object]] = {
        "decoded by Pillow": lambda: [
            Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in jpegs
        ],
        "decoded by torchvision": lambda: [
            decode_jpeg(jpeg, mode=ImageReadMode.RGB) for jpeg in tensors
        ],
    }
    rows = []
    for way, decode in ways.items():
        by_clock, by_cpu = zip(
            *(_decoding_rates(decode, len(jpegs)) for _ in range(asked.rounds)), strict=True
        )
        rows.append(_row(source, way, statistics.median(by_clock), statistics.median(by_cpu)))
    return rows + ([_gpu_decoding(source, tensors, device, asked)] if device.type == "cuda" else [])


def _decoding_rates(decode: Callable[[], object], n_images: int) -> tuple[float, float]:
    cpu_before = cpu_s()
    seconds = report.once_s(decode, torch.device("cpu"))
    return n_images / seconds, n_images / (cpu_s() - cpu_before)


def _gpu_decoding(
    source: str, jpegs: list[Tensor], device: torch.device, asked: argparse.Namespace
) -> Row:
    """nvJPEG in batches; and the device memory that it has not given back after many rounds."""

    def decode() -> None:
        for start in range(0, len(jpegs), BATCH):
            decode_jpeg(jpegs[start : start + BATCH], mode=ImageReadMode.RGB, device=device)

    seconds = report.median_s({"": decode}, device=device, rounds=asked.rounds)[""]
    before = _free_bytes(device)
    for _ in range(asked.leak_rounds):
        decode()
    lost_mb = (before - _free_bytes(device)) / 1e6
    row = _row(source, "decoded by torchvision on the GPU", len(jpegs) / seconds)
    return row | {"GPU MB lost": lost_mb, "after images": asked.leak_rounds * len(jpegs)}


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _row(
    source: str, what: str, rate: float, per_core: float | None = None, workers: int | None = None
) -> Row:
    return {
        "source": source,
        "what": what,
        "workers": workers,
        "images/s": rate,
        "a core": per_core,
    }


def _ratios(rows: list[Row], asked: argparse.Namespace) -> dict[str, float]:
    loaded = {
        (row["source"], row["workers"], row["decode"]): row
        for row in rows
        if row["workers"] is not None
    }
    pairs = (
        ("JPEG shards", "original files"),
        ("pixel shards", "original files"),
        ("pixel shards", "JPEG shards"),
    )
    ratios = {}
    for side, other in pairs:
        for workers in asked.workers:
            for by in ("images/s", "a core"):
                ratio = loaded[side, workers, "cpu"][by] / loaded[other, workers, "cpu"][by]
                ratios[f"{side} to {other}, {workers} workers, {by}"] = ratio
    for source, workers, decode in loaded:
        if decode == "device":
            ratio = (
                loaded[source, workers, "device"]["images/s"]
                / loaded[source, workers, "cpu"]["images/s"]
            )
            ratios[f"decode=device to cpu, {source}, {workers} workers, images/s"] = ratio
    return ratios


def _some(data: Splits, most: int) -> Splits:
    """At most `most` training images, evenly spread, and as few held out as packing takes."""

    def thinned(images: ImageSet, most: int) -> FolderImages:
        paths = [images.source(index) for index in range(0, len(images), -(-len(images) // most))]
        return FolderImages(name=images.name, split=images.split, paths=paths)

    return Splits(train=thinned(data.train, most), held_out=thinned(data.held_out, 1))


@contextlib.contextmanager
def _packed(files: Splits, given: Path | None, packing: Packing) -> Iterator[Path]:
    """The shards given; else a temporary folder with these files packed."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="relloc_shards_") as made:
        out = Path(made) / "packed"
        workers = len(os.sched_getaffinity(0))
        pack(files, out, packing, workers=workers, progress=lambda *_: _untold())
        yield out


@contextlib.contextmanager
def _untold() -> Iterator[Callable[[int, str], None]]:
    yield lambda done, text: None


def _file_jpegs(images: ImageSet) -> list[bytes]:
    contents = (Path(images.source(index)).read_bytes() for index in range(len(images)))
    return _filled(
        list(
            itertools.islice(
                (content for content in contents if content[:2] == b"\xff\xd8"), DECODED
            )
        )
    )


def _shard_jpegs(packed: Path) -> list[bytes]:
    with tarfile.open(packed / "train-000000.tar") as tar:
        members = itertools.islice(
            (member for member in tar if member.name.endswith(".jpg")), DECODED
        )
        return _filled([tar.extractfile(member).read() for member in members])  # pyright: ignore[reportOptionalMemberAccess]


def _filled(jpegs: list[bytes]) -> list[bytes]:
    return list(itertools.islice(itertools.cycle(jpegs), DECODED)) if jpegs else []


def _worker_counts() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return [0, *(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def _asked() -> argparse.Namespace:
    parser = report.arguments(__doc__)
    parser.add_argument(
        "--root", required=True, help="folder of JPEGs, or of train/CLASS/* and val/CLASS/*"
    )
    parser.add_argument(
        "--shards", type=Path, help="what relloc.prepare made of the same; else packed for this run"
    )
    parser.add_argument("--pixels", type=Path, help="the same with format=pixels")
    parser.add_argument(
        "--files", type=int, default=2000, help="files of the root to use at most, evenly spread"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2048,
        help="images to time, a worker; files repeat to fill them",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=_worker_counts(), help="numbers of workers"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument(
        "--leak-rounds", type=int, default=50, help=f"of decoding {DECODED} images on a GPU"
    )
    asked = parser.parse_args()
    if asked.images < BATCH:
        parser.error(f"--images must be {BATCH} or more")
    return asked


if __name__ == "__main__":
    main()
