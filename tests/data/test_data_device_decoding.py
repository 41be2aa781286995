"""Images that are decoded on a device, here the CPU, against those that worker processes decode."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from relloc.data import device_decoding
from relloc.data.crops import Crops
from relloc.data.device_decoding import load_to_device
from relloc.data.folder import FolderImages, folder
from relloc.data.images import Jpeg, as_jpeg, read_rgb, read_undecoded
from relloc.data.loader import ImageBatch, load
from relloc.data.packing import pack, packing_of
from relloc.data.processes import without_progress
from relloc.data.shards import shards
from relloc.data.subsets import Subset
from relloc.data.undecoded import UndecodedSamples
from relloc.data.views import Center, CutView, RandomResized, Squash, Views
from relloc.errors import UsageError
from relloc.geometry import Area, PatchGrid, ShortSide
from relloc.seeds import Use

CPU = torch.device("cpu")
VIEWS = [
    Center(short_px=48, crop_px=40),
    RandomResized(crop_px=40),
    Squash(short_px=48, side_px=40),
]
GRID = PatchGrid(patch_px=12, gap_px=2, jitter_px=2, resize=ShortSide(px=60))


def picture(number: int, height: int = 90, width: int = 70) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return jpeg(picture(orientation), exif=exif)


def other_files() -> dict[str, bytes]:
    """Files that are decoded in worker processes, each with a reason of its own."""
    png = io.BytesIO()
    picture(1, 80, 120).save(png, "PNG")
    mpo = io.BytesIO()
    picture(2).save(mpo, "MPO", save_all=True, append_images=[picture(3)])
    return {
        "png": png.getvalue(),
        "several pictures": mpo.getvalue(),
        "gray": jpeg(picture(4).convert("L")),
        "cmyk": jpeg(picture(5).convert("CMYK")),
        "rgb": jpeg(picture(6), keep_rgb=True),
        "4:1:1": jpeg(picture(7), subsampling=0).replace(
            b"\x01\x11\x00\x02\x11\x01", b"\x01\x41\x00\x02\x11\x01"
        ),
        "more behind": jpeg(picture(8)) + b"camera",
        "truncated": jpeg(picture(9))[:-200],
        "truncated but ending": jpeg(picture(10))[:-200] + b"\xff\xd9",
        "text": b"no image",
        "empty": b"",
    }


def jpegs() -> dict[str, bytes]:
    """Files that are left to the device: all orientations, subsamplings, and progressive ones."""
    files = {f"turned {orientation}": turned(orientation) for orientation in range(1, 9)}
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        files[subsampling] = jpeg(picture(20, 61, 133), subsampling=subsampling)
    files["progressive"] = jpeg(picture(21, 40, 40), progressive=True)
    return files


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    """All kinds of files, in mixed order."""
    root = tmp_path_factory.mktemp("mixed")
    files = jpegs() | other_files()
    for number, name in enumerate(sorted(files, key=lambda name: name[::-1])):
        (root / f"{number:02} {name}").write_bytes(files[name])
    paths = sorted(map(str, root.iterdir()))
    labels = list(range(len(paths)))
    return FolderImages(name="mixed", split="train", paths=paths, labels=labels)


def check_equal(found: Sequence[ImageBatch], expected: Sequence[ImageBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.unreadable == other.unreadable
        assert torch.equal(one.pixels, other.pixels)
        assert (one.drawn is None) == (other.drawn is None)
        if one.drawn is not None and other.drawn is not None:
            assert torch.equal(one.drawn, other.drawn)
        if len(one.pixels):
            assert one.pixels.stride() == other.pixels.stride()


def keys_of(n: int, size: int) -> list[list[tuple[int, int]]]:
    keys = [(index, 100 + index) for index in range(n)]
    return [keys[start : start + size] for start in range(0, n, size)]


def both(samples: Any, batches: list[Any], *, workers: int = 0) -> None:
    """Checks that both ways give the same batches."""
    found = list(load_to_device(samples, batches, workers=workers, device=CPU))
    check_equal(found, list(load(samples, batches, workers=0, pin=False)))


@pytest.mark.parametrize("name", jpegs())
def test_usual_jpegs_are_left_to_the_device(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(jpegs()[name])
    found = read_undecoded(path)
    assert isinstance(found, Jpeg)
    upright = read_rgb(path)
    assert found.size == (upright.height, upright.width)


@pytest.mark.parametrize("name", other_files())
def test_other_files_are_not(name: str) -> None:
    left = isinstance(as_jpeg(other_files()[name]), Jpeg)
    # That a file lacks data before its end, only a decoder finds.
    assert left == (name == "truncated but ending")


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_those_that_workers_would_decode(images: FolderImages, view: CutView) -> None:
    both(Views(images, view), keys_of(len(images), 7))


def test_random_numbers_stay_with_their_images(images: FolderImages) -> None:
    """Also those of images that can't be read, which are left out."""
    samples = Views(images, VIEWS[0], lambda seed: [seed, 2 * seed])
    batches = [[(*key, 10 * key[0]) for key in keys] for keys in keys_of(len(images), 30)]
    both(samples, batches)
    for batch in load_to_device(samples, batches, workers=0, device=CPU):
        assert batch.drawn is not None
        assert len(batch.drawn) == len(batch.indices) < len(images)
        assert batch.drawn.tolist() == [[10 * n, 20 * n] for n in batch.indices.tolist()]


def test_worker_processes_send_what_the_process_itself_would_read(images: FolderImages) -> None:
    samples = Views(images, RandomResized(crop_px=40))
    # Batches of no image that can be read, and of no key, too
    texts = [index for index in range(len(images)) if images.source(index).endswith("text")]
    both(samples, [*keys_of(len(images), 5), [(texts[0], 0)], []], workers=2)


@pytest.mark.parametrize("resize", [None, ShortSide(px=60), Area(low_px2=3000, high_px2=9000)])
@pytest.mark.parametrize("centered", [False, True])
def test_crops_are_those_that_workers_would_decode(
    images: FolderImages, resize: Any, *, centered: bool
) -> None:
    """Images that can't be read are replaced by the same ones."""
    grid = dataclasses.replace(GRID, resize=resize)
    crops = Crops(images, grid, use=Use.CROP, seed=3, centered=centered, flip=0.5)
    both(crops, keys_of(len(images), 6))


@pytest.mark.parametrize("format", ["jpeg", "pixels"])
def test_packed_images_and_subsets_too(format: str, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    for number in range(12):
        (root / f"{number}.jpg").write_bytes(jpeg(picture(number, 60 + 9 * number, 100)))
    originals = folder(name="files", root=str(root), held_out_share=0.4)
    packing = packing_of(format=format, short_px=64)
    pack(originals, tmp_path / "packed", packing, workers=1, progress=without_progress)
    packed = shards(root=str(tmp_path / "packed")).train
    both(Views(packed, VIEWS[1]), keys_of(len(packed), 4))
    both(
        Crops(packed, GRID, use=Use.CROP, seed=0, centered=False, flip=0.5),
        keys_of(len(packed), 4),
    )
    some = Subset(images=packed, indices=[3, 1])
    both(Views(some, VIEWS[0]), [[(0, 0), (1, 0)]])


def test_what_a_device_fails_at_is_decoded_on_the_cpu(
    images: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that raises for a batch because of some, or returns another size for one."""
    samples = Views(images, Center(short_px=48, crop_px=40), lambda seed: [seed])
    asked = []

    def fails_at_turned(jpegs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        asked.append(len(jpegs))
        for each in jpegs:
            found = as_jpeg(each.numpy().tobytes())
            if isinstance(found, Jpeg) and found.transposition is not None:
                raise RuntimeError("nvjpegDecode failed")
        decoded = [decode(each, **options) for each in jpegs]
        return [each[:, :30] if each.shape[1] == 40 else each for each in decoded]

    decode: Any = device_decoding.decode_jpeg
    monkeypatch.setattr(device_decoding, "decode_jpeg", fails_at_turned)
    keys = [[(*key, key[0]) for key in batch] for batch in keys_of(len(images), 30)]
    with pytest.warns(UserWarning, match="CPU"):
        both(samples, keys)
    # All at once, then one by one. After each failure, and at first, a whole JPEG is decoded.
    n_jpegs = len(jpegs()) + 1
    assert asked[:3] == [1, n_jpegs, 1]
    n_turned = sum(name.startswith("turned") for name in jpegs()) - 1
    assert asked[3:] == [1] * (n_jpegs + n_turned)


def test_a_device_that_fails_at_too_many_is_refused(
    images: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misunderstands(jpegs: list[torch.Tensor], **_: object) -> list[torch.Tensor]:
        return [torch.zeros(3, 1, 1, dtype=torch.uint8) for _ in jpegs]

    monkeypatch.setattr(device_decoding, "decode_jpeg", misunderstands)
    monkeypatch.setattr(device_decoding, "_FEW_FAILED", 5)
    # A JPEG that can't be read at all is not among those that fail.
    keys = keys_of(len(images), 1)
    of_jpegs = [key for key in keys if Path(images.paths[key[0][0]]).name[3:] in jpegs()]
    loaded = load_to_device(Views(images, VIEWS[0]), of_jpegs, workers=0, device=CPU)
    with (
        pytest.raises(UsageError, match=r"decode=device.* 6 of 6 "),
        pytest.warns(UserWarning, match="CPU"),
    ):
        list(loaded)


OUT_OF_MEMORY = "Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2.00 MiB"


@pytest.mark.parametrize("n_before", [0, 1], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError(), torch.OutOfMemoryError),
        (RuntimeError(OUT_OF_MEMORY), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), torch.AcceleratorError),
        (RuntimeError("torchvision not compiled with nvJPEG support"), UsageError),
    ],
    ids=str,
)
def test_a_device_that_fails_is_not_taken_for_a_broken_image(
    images: FolderImages,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[Exception],
    n_before: int,
) -> None:
    n_asked = 0

    def fails(jpegs: list[torch.Tensor], **options: Any) -> Any:
        nonlocal n_asked
        n_asked += 1
        if n_asked > n_before:
            raise error
        return decode(jpegs, **options)

    decode = device_decoding.decode_jpeg
    monkeypatch.setattr(device_decoding, "decode_jpeg", fails)
    with pytest.raises(raised):
        list(
            load_to_device(Views(images, VIEWS[0]), keys_of(len(images), 30), workers=0, device=CPU)
        )
    assert n_asked <= n_before + 2


def test_all_loaders_share_the_streams_of_a_device(
    images: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            made.append(device)

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(device_decoding, "decode_jpeg", lambda *_, **__: [])
    gpu = torch.device("cuda", 7)
    device_decoding._streams_of.cache_clear()
    for _ in range(3):
        device_decoding.BatchDecoder(Views(images, VIEWS[0]), gpu)
    assert made == [gpu, gpu]
    assert device_decoding._streams_of(gpu).qsize() == 2
    device_decoding._streams_of.cache_clear()


@pytest.mark.gpu
def test_further_loaders_reserve_hardly_any_memory(images: FolderImages) -> None:
    samples = Views(images, RandomResized(crop_px=40))
    device = torch.device("cuda", 0)

    def go_through() -> int:
        for batch in load_to_device(samples, keys_of(len(images), 8), workers=0, device=device):
            del batch
        torch.cuda.synchronize(device)
        return torch.cuda.memory_reserved(device)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    reserved = [go_through() for _ in range(40)]
    # With streams of their own, 36 loaders would reserve several times what four do.
    assert reserved[-1] - reserved[3] < reserved[3] - before


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same_views(images: FolderImages) -> None:
    """nvJPEG differs from libjpeg by rounding, and by how it enlarges subsampled colors."""
    samples: UndecodedSamples = Views(images, RandomResized(crop_px=40))
    batches = keys_of(len(images), 8)
    found = load_to_device(samples, batches, workers=2, device=torch.device("cuda", 0))
    expected = load_to_device(samples, batches, workers=0, device=CPU)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.unreadable == other.unreadable
        difference = (one.pixels.cpu().int() - other.pixels.int()).abs().float()
        # Most of it is in colors that were stored at half of the size.
        assert difference.mean() < 3
