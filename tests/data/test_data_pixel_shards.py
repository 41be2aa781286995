"""Packed images that are stored as pixels: what is stored, how it is read, and what is refused."""

import contextlib
import json
import mmap
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mixed_folder import BROKEN, jpeg, picture, write_many, write_mixed
from PIL import Image
from safetensors.numpy import load_file, save_file

from relloc.data.crops import Crops
from relloc.data.folder import folder
from relloc.data.image_set import ImageSet, Splits
from relloc.data.images import read_rgb
from relloc.data.loader import load
from relloc.data.manifest import check_hashes
from relloc.data.packing import Packing, pack, packing_of
from relloc.data.parts import divide_into_parts
from relloc.data.pixels import estimated_bytes
from relloc.data.shards import ShardImages, decoded, shards
from relloc.data.subsets import Subset
from relloc.data.views import Center, RandomResized, Squash, Views
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.geometry import PatchGrid, ShortSide
from relloc.seeds import Use

PX = 100
GRID = PatchGrid(patch_px=24, gap_px=4, jitter_px=(0, 4), resize=ShortSide(px=PX))


@contextlib.contextmanager
def unseen(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda now, text: None


def packed(data: Splits, out: Path, **settings: object) -> Path:
    packing = packing_of(**({"format": "pixels", "short_px": PX, "images_per_shard": 4} | settings))
    pack(data, out, packing, workers=1, progress=unseen)
    return out


def of(root: Path) -> Splits:
    return folder(name="mine", root=str(root), held_out_share=0.5)


def resized(image: Image.Image, px: int = PX) -> Image.Image:
    """The image with another short side, written out apart from the package."""
    size = [int(px * side / min(image.size)) for side in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


class Whole(Subset):
    """Images of files, each resized as a whole."""

    def read(self, index: int) -> Image.Image:
        return resized(super().read(index))


def whole(root: Path) -> Whole:
    images = of(root).train
    return Whole(images=images, indices=range(len(images)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("originals"), 10, 3, height=70, width=97)


@pytest.fixture(scope="module")
def out(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(of(originals), tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """The packed folder, to be damaged."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


@pytest.mark.parametrize("enlarge", [True, False])
def test_pixels_are_those_of_the_resized_original(tmp_path: Path, enlarge: bool) -> None:
    root = write_mixed(tmp_path / "originals")
    folder = packed(of(root), tmp_path / "out", short_px=96, enlarge=enlarge)
    images = shards(root=str(folder)).train
    n_enlarged = 0
    for index in range(len(images)):
        name = f"train/{images.source(index)}"
        if name in BROKEN:
            with pytest.raises(UnreadableImage) as before:
                read_rgb(root / name)
            with pytest.raises(UnreadableImage) as caught:
                images.read(index)
            assert str(caught.value) == str(before.value)
            continue
        original = read_rgb(root / name)
        is_small = min(original.size) < 96
        n_enlarged += is_small
        expected = original if is_small and not enlarge else resized(original, 96)
        assert np.array_equal(np.asarray(images.read(index)), np.asarray(expected))
    stored = json.loads((folder / "manifest.json").read_bytes())["train"]["stored"]
    assert stored == {
        "unreadable": len(BROKEN),
        "reduced": 3,
        "enlarged": n_enlarged if enlarge else 0,
        "encoded": 0,
        "kept": 1 if enlarge else 1 + n_enlarged,
    }
    assert n_enlarged == 4


def test_others_can_read_the_tars(out: Path) -> None:
    images = shards(root=str(out)).train
    with tarfile.open(out / "train-000001.tar", "r:") as tar:
        assert tar.getnames()[:2] == ["000000004.ppm", "000000004.cls"]
        member = tar.extractfile("000000004.ppm")
        assert member is not None
        with Image.open(member) as image:
            assert np.array_equal(np.asarray(image), np.asarray(images.read(4)))


def crops(
    images: ImageSet, grid: PatchGrid = GRID, *, centered: bool = False, flip: float = 0.5
) -> Crops:
    return Crops(images, grid, use=Use.CROP, seed=0, centered=centered, flip=flip)


@pytest.mark.parametrize("centered", [False, True])
def test_a_crop_is_to_the_bit_that_of_the_image_resized_as_a_whole(
    originals: Path, out: Path, centered: bool
) -> None:
    of_pixels = crops(shards(root=str(out)).train, centered=centered)
    of_whole = crops(whole(originals), centered=centered)
    differs_within_resize = False
    of_files = crops(of(originals).train, centered=centered)
    for key in ((0, 1), (3, 2), (9, 3), (5, 0)):
        found, expected, during_resize = (
            np.asarray(each[key].pixels, int) for each in (of_pixels, of_whole, of_files)
        )
        assert found.shape == (GRID.span_px, GRID.span_px, 3)
        assert np.array_equal(found, expected)
        # Where only the square is computed, it differs by rounding: once in each of two passes.
        difference = np.abs(found - during_resize)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.1
        differs_within_resize |= bool(difference.any())
    assert differs_within_resize


@pytest.mark.data
@pytest.mark.parametrize(("px", "side"), [(292, 255), (336, 255)])
def test_crops_of_photographs_differ_from_crops_during_resizing_by_two_gray_levels_at_most(
    real_images: Path, tmp_path: Path, px: int, side: int
) -> None:
    paths = sorted(real_images.rglob("*.jpg"))[::40]
    assert len(paths) > 20
    patch_px = side // 3
    grid = PatchGrid(patch_px=patch_px, gap_px=0, jitter_px=0, resize=ShortSide(px=px))
    root = tmp_path / "originals"
    for number, path in enumerate(paths):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "ab"[number % 2] / f"{number:05d}.jpg")
    data = of(root)
    of_pixels = crops(shards(root=str(packed(data, tmp_path / "out", short_px=px))).train, grid)
    of_files = crops(data.train, grid)
    for index in range(len(data.train)):
        found, during_resize = (
            np.asarray(each[index, 0].pixels, int) for each in (of_pixels, of_files)
        )
        difference = np.abs(found - during_resize)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.1


def test_reading_copies_nothing(out: Path) -> None:
    images = shards(root=str(out)).train
    assert isinstance(images, ShardImages)
    pixels = images.read_array(0)
    crop = crops(images, flip=0)[0, 0].pixels
    assert crop is not None
    assert np.shares_memory(pixels, crop)
    assert not crop.flags.writeable
    base = pixels
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_images_of_another_size_than_the_grids_are_resized_as_those_of_jpegs(out: Path) -> None:
    images = shards(root=str(out)).train
    larger = PatchGrid(patch_px=24, gap_px=4, jitter_px=(0, 4), resize=ShortSide(px=120))
    through_pillow = Subset(images=images, indices=range(len(images)))
    for key in ((0, 1), (7, 2)):
        found, expected = (crops(each, larger)[key].pixels for each in (images, through_pillow))
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "view",
    [
        Center(short_px=PX, crop_px=80),
        Center(short_px=64, crop_px=56),
        Squash(short_px=PX, side_px=64),
        RandomResized(crop_px=32),
    ],
    ids=str,
)
def test_evaluations_see_the_resized_images_in_any_process(
    originals: Path, out: Path, view: object
) -> None:
    images = shards(root=str(out)).train
    images.read(0)  # a file that is mapped before the workers are made
    batches = [[(index, 7) for index in some] for some in ([0, 5, 9], [1, 8, 2], [7, 3])]
    here, there = (
        list(load(Views(images, view), batches, workers=workers, pin=False)) for workers in (0, 2)
    )
    expected = list(load(Views(whole(originals), view), batches, workers=0, pin=False))
    for one, other, third in zip(here, there, expected, strict=True):
        assert one.pixels.equal(other.pixels)
        assert one.pixels.equal(third.pixels)


def test_training_crops_are_the_same_in_any_process(out: Path) -> None:
    images = shards(root=str(out)).train
    batches = [[(index, 1) for index in range(start, start + 5)] for start in (0, 5)]
    here, there = (
        list(load(crops(images), batches, workers=workers, pin=False)) for workers in (0, 3)
    )
    assert all(one.pixels.equal(other.pixels) for one, other in zip(here, there, strict=True))


def test_pickled_it_reads_the_same(out: Path) -> None:
    images = shards(root=str(out)).train
    first = np.asarray(images.read(0))
    frozen = pickle.dumps(images)
    assert len(frozen) < 1000
    assert np.array_equal(np.asarray(pickle.loads(frozen).read(0)), first)


def test_files_beyond_the_limit_are_not_kept_mapped(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relloc.data.mapped_files._MOST_MAPPED", 2)
    images = shards(root=str(packed(of(originals), tmp_path / "out", images_per_shard=1))).train
    held = len(os.listdir("/proc/self/fd"))
    for index in range(10):
        expected = resized(of(originals).train.read(index))
        assert np.array_equal(np.asarray(images.read(index)), np.asarray(expected))
    assert len(os.listdir("/proc/self/fd")) <= held + 2
    del images
    assert len(os.listdir("/proc/self/fd")) == held


def test_the_digest_is_of_pixels_and_their_shape(
    originals: Path, out: Path, copy: Path, tmp_path: Path
) -> None:
    data = of(originals)
    here = shards(root=str(out))
    longer = shards(root=str(packed(data, tmp_path / "longer", images_per_shard=7)))
    as_jpegs = shards(root=str(packed(data, tmp_path / "jpegs", format="jpeg")))
    smaller = shards(root=str(packed(data, tmp_path / "smaller", short_px=96)))
    for role in ("train", "held_out"):
        digest = here.of(role).digest()
        assert digest == longer.of(role).digest()
        others = (data, as_jpegs, smaller)
        assert digest not in [other.of(role).digest() for other in others]
    # The same bytes in rows of another length are other images.
    path = copy / "train-index.safetensors"
    columns = {key: values.copy() for key, values in load_file(path).items()}
    columns["height"][0] //= 2
    save_file(columns, path)
    changed = shards(root=str(copy)).train
    assert changed.read(0).size == (here.train.read(0).width * 2, PX // 2)
    assert changed.digest() != here.train.digest()
    with pytest.raises(DataError, match=r"train-index\.safetensors .*other bytes"):
        check_hashes(copy)


def test_jpegs_can_be_enlarged_at_packing_too(originals: Path, tmp_path: Path) -> None:
    folder = packed(of(originals), tmp_path / "out", format="jpeg", enlarge=True, quality=80)
    image = shards(root=str(folder)).train.read(0)
    original = resized(of(originals).train.read(0))
    assert image.size == original.size
    with tarfile.open(folder / "train-000000.tar", "r:") as tar:
        content = tar.extractfile("000000000.jpg").read()
    assert content == jpeg(original, quality=80, subsampling="4:2:0")
    assert np.array_equal(np.asarray(image), decoded(bytearray(content)))


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"quality": 80}, "quality", "80"),
        ({"subsampling": "4:4:4"}, "subsampling", "4:4:4"),
        ({"format": "png"}, "format", "png"),
        ({"format": ["pixels"]}, "format", "pixels"),
        ({"short_px": 0}, "short_px", "0"),
        ({"images_per_shard": 0}, "images_per_shard", "0"),
    ],
)
def test_settings_that_do_not_belong_to_pixels_are_refused(
    settings: dict, name: str, value: str
) -> None:
    with pytest.raises(UsageError, match=rf"^{name} is .*{value}"):
        packing_of(**({"format": "pixels", "short_px": PX} | settings))


def test_the_format_decides_what_is_not_given() -> None:
    nothing = {"enlarge": None, "quality": None, "subsampling": None, "images_per_shard": None}
    assert packing_of(format="jpeg", short_px=292, **nothing) == Packing(
        short_px=292, quality=90, subsampling="4:2:0", images_per_shard=5000
    )
    assert packing_of(format="pixels", short_px=292, **nothing) == Packing(
        short_px=292, format="pixels", enlarge=True, images_per_shard=500
    )
    assert not packing_of(format="pixels", short_px=292, enlarge=False).enlarge


def test_the_other_format_in_the_same_folder_is_refused(originals: Path, out: Path) -> None:
    with pytest.raises(DataError, match="format was pixels, now jpeg"):
        packed(of(originals), out, format="jpeg")
    with pytest.raises(DataError, match="enlarge was True, now False"):
        packed(of(originals), out, enlarge=False)


def test_an_image_that_enlarging_makes_too_large_is_unreadable(tmp_path: Path) -> None:
    root = write_many(tmp_path / "originals", 1, 1)
    Image.new("RGB", (60_000, 2)).save(root / "train/a/scroll.png")
    images = shards(root=str(packed(of(root), tmp_path / "out"))).train
    with pytest.raises(UnreadableImage, match=r"3000000 x 100 px"):
        images.read(1)


def test_the_space_is_told_and_is_what_is_written(originals: Path, tmp_path: Path) -> None:
    told: list[str] = []
    data = of(originals)
    packing = packing_of(format="pixels", short_px=400)
    out = tmp_path / "out"
    pack(data, out, packing, workers=1, progress=unseen, print_message=told.append)
    written = sum(path.stat().st_size for path in out.glob("*.tar"))
    parts = divide_into_parts(data, packing.images_per_shard)
    estimated = estimated_bytes(data, parts, short_px=400, enlarge=True)
    assert abs(estimated - written) < 0.02 * written
    assert f"{estimated / 1e6:.1f} MB" in " ".join(told)
    # What is finished needs no more.
    told.clear()
    pack(data, out, packing, workers=1, progress=unseen, print_message=told.append)
    assert not told


def test_the_space_of_many_images_is_estimated_from_some(
    originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = of(originals)
    parts = divide_into_parts(data, 4)
    exact = estimated_bytes(data, parts, short_px=PX, enlarge=True)
    monkeypatch.setattr("relloc.data.pixels._SAMPLED", 4)
    read: list[int] = []
    original_size = "relloc.data.pixels.original_size"
    monkeypatch.setattr(original_size, lambda images, index: read.append(index) or (70, 97))
    assert estimated_bytes(data, parts, short_px=PX, enlarge=True) == exact
    assert len(read) == 4  # of 13
    assert estimated_bytes(data, [], short_px=PX, enlarge=True) == 0


def test_a_disk_with_less_space_is_refused_before_anything_is_written(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def nearly_full(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=20_000_000)

    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", nearly_full)
        # 13 images of 800 x 1108 px take 34.6 MB.
        with pytest.raises(DataError, match=r"34\.6 MB.*20\.0 MB.*short_px.*800"):
            packed(of(originals), tmp_path / "new" / "out", short_px=800)
        assert asked == [tmp_path]
        assert not list(tmp_path.iterdir())
        # JPEGs take less, and how much is not known before.
        packed(of(originals), tmp_path / "jpegs", format="jpeg", short_px=800)
    packed(of(originals), tmp_path / "new" / "out", short_px=800)


def test_unreadable_images_need_no_space(tmp_path: Path) -> None:
    root = write_many(tmp_path / "originals", 4, 2)
    before = estimated_bytes(of(root), divide_into_parts(of(root), 4), short_px=96, enlarge=True)
    (root / "train/a/9.jpg").write_bytes(b"broken")
    (root / "train/a/empty.jpg").write_bytes(b"")
    # Enlarged it would be 2,880,000 px long, which packing does not store.
    Image.new("RGB", (30_000, 1)).save(root / "train/a/scroll.png")
    after = estimated_bytes(of(root), divide_into_parts(of(root), 4), short_px=96, enlarge=True)
    assert after == before


def test_a_missing_or_shortened_tar_is_told_at_once(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    with pytest.raises(DataError, match=rf"train-000001\.tar .*\b{size - 512} bytes.*\b{size}\b"):
        shards(root=str(copy))
    tar.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
        shards(root=str(copy))


def test_what_is_lost_while_a_run_goes_on_is_an_unreadable_image(copy: Path) -> None:
    images = shards(root=str(copy)).train
    images.read(0)
    os.truncate(copy / "train-000000.tar", 2000)
    with pytest.raises(UnreadableImage, match="ends before byte"):
        images.read(0)
    os.truncate(copy / "train-000001.tar", 0)
    with pytest.raises(UnreadableImage, match="is empty"):
        images.read(4)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        images.read(8)
    # Training takes the next image in its place, as of any that can't be read.
    sample = crops(images)[8, 0]
    assert set(sample.unreadable) == {
        images.source(8),
        images.source(9),
        *map(images.source, range(8)),
    }


def test_changed_pixels_are_found_when_hashes_are_asked_for(out: Path, copy: Path) -> None:
    check_hashes(out)
    content = bytearray((copy / "val-000000.tar").read_bytes())
    content[5000] ^= 1
    (copy / "val-000000.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"val-000000\.tar .*other bytes"):
        check_hashes(copy)


@pytest.mark.parametrize(("index", "value"), [(0, 0), (0, -1), (0, 7), (9, 2**62), (0, 2**31)])
def test_heights_that_cannot_be_are_one_message(copy: Path, index: int, value: int) -> None:
    path = copy / "train-index.safetensors"
    columns = {key: values.copy() for key, values in load_file(path).items()}
    columns["height"][index] = value
    save_file(columns, path)
    with pytest.raises(DataError, match=r"does not fit manifest\.json .*no rectangle"):
        shards(root=str(copy))


@pytest.mark.parametrize("change", ["gone", "float", "short"])
def test_heights_of_another_form_are_one_message(copy: Path, change: str) -> None:
    path = copy / "train-index.safetensors"
    columns = load_file(path)
    heights = columns.pop("height")
    others = {"float": heights.astype(np.float32), "short": heights[:-1].copy()}
    save_file(columns | ({} if change == "gone" else {"height": others[change]}), path)
    with pytest.raises(DataError, match=r"does not fit manifest\.json .*height"):
        shards(root=str(copy))


@pytest.mark.parametrize(("version", "format"), [(1, "pixels"), (2, "jpeg"), (2, None)])
def test_a_manifest_that_contradicts_itself_is_one_message(
    copy: Path, version: int, format: str | None
) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["version"] = version
    manifest["packed"]["format"] = format
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json .*packed\.format"):
        shards(root=str(copy))


def test_the_set_says_how_it_was_packed(originals: Path, out: Path, tmp_path: Path) -> None:
    found = shards(root=str(out))
    assert isinstance(found.train, ShardImages)
    assert found.train.packing == f"pixels, short side {PX} px"
    assert found.train.packing in " ".join(found.remarks)
    small = packed(of(originals), tmp_path / "small", enlarge=False)
    assert ShardImages(small, "train").packing == f"pixels, short side of at most {PX} px"
    jpegs = packed(of(originals), tmp_path / "jpegs", format="jpeg", quality=80)
    expected = f"JPEG of quality 80 4:2:0, short side of at most {PX} px"
    assert ShardImages(jpegs, "train").packing == expected


def test_images_of_any_sizes_are_found_where_they_are(tmp_path: Path) -> None:
    root = tmp_path / "originals"
    for number, (height, width) in enumerate([(1, 1), (1, 7), (300, 90), (101, 100), (64, 333)]):
        for split in ("train", "val"):
            path = root / split / "a" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(picture(height, width, seed=number)))
    for enlarge in (True, False):
        folder = packed(of(root), tmp_path / str(enlarge), enlarge=enlarge)
        images = shards(root=str(folder)).held_out
        for index in range(len(images)):
            original = of(root).held_out.read(index)
            small = min(original.size) < PX
            expected = original if small and not enlarge else resized(original)
            assert np.array_equal(np.asarray(images.read(index)), np.asarray(expected))
