import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mixed_folder import write_many
from PIL import Image
from safetensors.numpy import load_file, save_file

from relloc.data.crops import Crops
from relloc.data.folder import folder
from relloc.data.image_set import ImageSet, Splits
from relloc.data.images import read_rgb
from relloc.data.lists import VOC_CLASSES, MultiLabeled, voc
from relloc.data.loader import load
from relloc.data.manifest import check_hashes
from relloc.data.packing import Packing, pack
from relloc.data.shards import ShardImages, decoded, shards
from relloc.data.subsets import Subset
from relloc.data.views import Center, Views
from relloc.errors import DataError, UnreadableImage
from relloc.geometry import PatchGrid, ShortSide
from relloc.seeds import Use


@contextlib.contextmanager
def unseen(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda now, text: None


def packed(data: Splits, out: Path, images_per_shard: int = 4) -> Path:
    packing = Packing(
        short_px=96, quality=90, subsampling="4:2:0", images_per_shard=images_per_shard
    )
    pack(data, out, packing, workers=1, progress=unseen)
    return out


def of(root: Path) -> Splits:
    return folder(name="mine", root=str(root), held_out_share=0.5)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("originals"), 10, 3)


@pytest.fixture(scope="module")
def out(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(of(originals), tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """The packed folder, to be damaged."""
    return Path(shutil.copytree(out, tmp_path / "copy"))


def test_the_set_is_the_one_that_was_packed(originals: Path, out: Path) -> None:
    before, after = of(originals), shards(root=str(out))
    assert after.labeled
    for old, new in ((before.train, after.train), (before.held_out, after.held_out)):
        assert isinstance(new, ImageSet)
        assert (new.name, new.split, new.classes, len(new)) == (
            old.name,
            old.split,
            old.classes,
            len(old),
        )
        assert (out / f"{old.split}-000000.tar").is_file()
        assert list(new.labels or ()) == list(old.labels or ())
        assert type((new.labels or [0.0])[0]) is int
        for index in range(len(new)):
            assert old.source(index).endswith(f"/{old.split}/{new.source(index)}")
            assert np.array_equal(np.asarray(new.read(index)), np.asarray(old.read(index)))


def test_unlabeled_images_stay_so_and_hostile_names_come_back(tmp_path: Path) -> None:
    names = [
        "two words.jpg",
        "zürich ✓ 写真.jpg",
        "line\nbreak.jpg",
        "quote'\"$.jpg",
        os.fsdecode(b"latin-\xe9.jpg"),
    ]
    for number, name in enumerate([*names, *map("{}.jpg".format, range(12))]):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / name, "JPEG")
    data = of(tmp_path)
    found = shards(root=str(packed(data, tmp_path / "out")))
    assert not found.labeled
    assert found.train.labels is None
    for old, new in ((data.train, found.train), (data.held_out, found.held_out)):
        assert [f"{tmp_path}/{new.source(index)}" for index in range(len(new))] == [
            old.source(index) for index in range(len(old))
        ]


def test_a_packed_folder_may_have_any_name(out: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(out, tmp_path / os.fsdecode(b"caf\xe9"))
    found, usual = shards(root=str(odd)), shards(root=str(out))
    check_hashes(odd)
    for role in ("train", "held_out"):
        assert getattr(found, role).digest() == getattr(usual, role).digest()
        images = (getattr(found, role).read(0), getattr(usual, role).read(0))
        assert np.array_equal(*map(np.asarray, images))


def voc_of(root: Path) -> Splits:
    """Five training images and two others of random classes, in VOC's layout."""
    lists, rng = root / "VOC2007/ImageSets/Main", np.random.default_rng(0)
    (root / "VOC2007/JPEGImages").mkdir(parents=True)
    lists.mkdir(parents=True)
    for split, numbers in (("trainval", range(5)), ("test", range(5, 7))):
        for number in numbers:
            Image.new("RGB", (20, 30), (number, 0, 0)).save(
                root / f"VOC2007/JPEGImages/{number}.jpg"
            )
        (lists / f"{split}.txt").write_text("".join(f"{number}\n" for number in numbers))
        for name in VOC_CLASSES:
            lines = (f"{number} {rng.integers(-1, 2)}\n" for number in numbers)
            (lists / f"{name}_{split}.txt").write_text("".join(lines))
    return voc(name="voc2007", root=str(root), year=2007, train="trainval", held_out="test")


def test_what_images_of_voc_show_is_kept(tmp_path: Path) -> None:
    data = voc_of(tmp_path / "originals")
    found = shards(root=str(packed(data, tmp_path / "out")))
    for old, new in ((data.train, found.train), (data.held_out, found.held_out)):
        assert isinstance(old, MultiLabeled)
        assert isinstance(new, MultiLabeled)
        assert new.presence() == old.presence()
        assert {mark for row in new.presence() for mark in row} == {-1, 0, 1}
        assert new.classes == VOC_CLASSES
        assert str(new.presence()[0]) == str(old.presence()[0])  # of which fingerprints are made
        assert pickle.loads(pickle.dumps(new)).presence() == old.presence()


def test_voc_without_lists_of_classes_is_packed_with_a_warning_and_others_without(
    tmp_path: Path, out: Path
) -> None:
    data = voc_of(tmp_path / "originals")
    for path in (tmp_path / "originals/VOC2007/ImageSets/Main").glob("*_test.txt"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"Annotations/5\.xml is missing"):
        packed(data, tmp_path / "out")
    found = shards(root=str(tmp_path / "out"))
    assert isinstance(found.train, MultiLabeled)
    assert not isinstance(found.held_out, MultiLabeled)
    assert not isinstance(shards(root=str(out)).train, MultiLabeled)


def test_a_presence_that_is_not_of_these_images_and_classes_is_told(tmp_path: Path) -> None:
    folder = packed(voc_of(tmp_path / "originals"), tmp_path / "out")
    index = load_file(folder / "trainval-index.safetensors")
    for broken in ({"presence": index["presence"][:, :19].copy()}, {}):
        without = {name: values for name, values in index.items() if name != "presence"}
        save_file({**without, **broken}, folder / "trainval-index.safetensors")
        with pytest.raises(
            DataError, match="trainval-index.safetensors does not fit manifest.json"
        ):
            shards(root=str(folder))


def test_other_labels_are_other_originals(tmp_path: Path) -> None:
    packed(voc_of(tmp_path / "originals"), tmp_path / "out")
    lists = tmp_path / "originals/VOC2007/ImageSets/Main"
    (lists / "cat_test.txt").write_text("5 1\n6 1\n")
    (lists / "dog_test.txt").write_text("5 -1\n6 -1\n")
    changed = voc(
        name="voc2007",
        root=str(tmp_path / "originals"),
        year=2007,
        train="trainval",
        held_out="test",
    )
    with pytest.raises(DataError, match="images or their labels"):
        packed(changed, tmp_path / "out")


def test_the_digest_is_of_the_content_wherever_it_lies_and_however_it_is_cut(
    originals: Path, out: Path, tmp_path: Path
) -> None:
    here, original = shards(root=str(out)), of(originals)
    moved = shards(root=str(shutil.copytree(out, tmp_path / "moved")))
    longer = shards(root=str(packed(original, tmp_path / "longer", images_per_shard=7)))
    for role in ("train", "held_out"):
        one = getattr(here, role).digest()
        assert one == getattr(moved, role).digest() == getattr(longer, role).digest()
        assert one != getattr(original, role).digest()
    other = shutil.copytree(originals, tmp_path / "other")
    (other / "train/a/0000.jpg").write_bytes((other / "train/b/0001.jpg").read_bytes())
    changed = shards(root=str(packed(of(Path(other)), tmp_path / "changed")))
    assert changed.train.digest() != here.train.digest()
    assert changed.held_out.digest() == here.held_out.digest()
    (other / "val/a").rename(other / "val/c")
    (other / "train/a").rename(other / "train/c")
    renamed = shards(root=str(packed(of(Path(other)), tmp_path / "renamed")))
    assert renamed.held_out.digest() != here.held_out.digest()


def test_pickled_it_is_a_name_and_reads_the_same(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    images = ShardImages(Path(out.name), "train")
    first = np.asarray(images.read(0))  # with a file open
    frozen = pickle.dumps(images)
    assert len(frozen) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(frozen)
    assert np.array_equal(np.asarray(again.read(0)), first)
    assert list(again.labels) == list(images.labels or ())


def test_worker_processes_read_what_the_parent_reads(out: Path) -> None:
    images = shards(root=str(out)).train
    images.read(0)  # a file that is open before the workers are made
    views = Views(images, Center(short_px=64, crop_px=56))
    batches = [[(index, 0) for index in some] for some in ([0, 5, 9], [1, 8, 2], [7, 3])]
    here, there = (list(load(views, batches, workers=workers, pin=False)) for workers in (0, 2))
    assert len(here) == len(there) == 3
    assert all(one.pixels.equal(other.pixels) for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize("px", [96, 110])
def test_training_cuts_the_same_pixels_from_packed_images_with_and_without_pillow(
    out: Path, px: int
) -> None:
    """At 96 px as they are, at 110 px enlarged."""
    images = shards(root=str(out)).train
    through_pillow = Subset(images=images, indices=range(len(images)))
    grid = PatchGrid(patch_px=24, gap_px=4, jitter_px=(0, 4), resize=ShortSide(px=px))
    for index, seed in ((0, 1), (3, 2), (len(images) - 1, 3)):
        found = Crops(images, grid, use=Use.CROP, seed=0, centered=False)[index, seed].pixels
        expected = Crops(through_pillow, grid, use=Use.CROP, seed=0, centered=False)[
            index, seed
        ].pixels
        assert found is not None
        assert expected is not None
        assert np.array_equal(found, expected)


def test_with_more_tars_than_may_stay_open_all_are_read(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relloc.data.shards._MOST_OPEN", 2)
    images = shards(root=str(packed(of(originals), tmp_path / "out", images_per_shard=1))).train
    held = len(os.listdir("/proc/self/fd"))
    for index in range(10):
        assert np.array_equal(
            np.asarray(images.read(index)), np.asarray(of(originals).train.read(index))
        )
    assert len(os.listdir("/proc/self/fd")) <= held + 2


def test_files_are_closed_with_the_set(out: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    images = ShardImages(out, "train")
    images.read(0)
    images.source(0)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del images
    assert len(os.listdir("/proc/self/fd")) == before


def test_imagenet_costs_tens_of_megabytes(copy: Path) -> None:
    n = 1_281_167
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["train"]["images"] = n
    manifest["packed"]["images_per_shard"] = n
    manifest["held_out"]["shards"], manifest["train"]["shards"] = (
        manifest["held_out"]["shards"][:1],
        [{"file": "train-000000.tar", "bytes": 10 * n, "sha256": ""}],
    )
    os.truncate(copy / "train-000000.tar", 10 * n)
    os.truncate(copy / "train-names.jsonl", n)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    numbers = np.arange(n + 1, dtype=np.int64)
    columns = {"offset": numbers[:n] * 10, "size": np.full(n, 10), "label": numbers[:n] % 2}
    save_file({**columns, "name_offset": numbers}, copy / "train-index.safetensors")
    tracemalloc.start()
    images = ShardImages(copy, "train")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == n
    assert held < 60e6
    assert len(pickle.dumps(images)) < 1000


def test_a_folder_that_is_none_or_not_ours_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.shards={tmp_path}/missing .*relloc\.prepare"):
        shards(root=str(tmp_path / "missing"))
    with pytest.raises(DataError, match=rf"{tmp_path} .*manifest\.json.*relloc\.prepare"):
        shards(root=str(tmp_path))


@pytest.mark.parametrize(
    "content", ['{"format": "relloc shards", "version": 3}', '{"format": "mine"}', "[]", "{"]
)
def test_another_manifest_is_refused(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json .*(version 1|can't be read)"):
        shards(root=str(copy))


def test_a_missing_or_shortened_tar_is_told_at_once(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    with pytest.raises(
        DataError,
        match=rf"train-000001\.tar .*\b{size - 512} bytes.*\b{size}\b",
    ):
        shards(root=str(copy))
    tar.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
        shards(root=str(copy))


def test_an_index_that_is_damaged_or_of_another_set_is_told(copy: Path) -> None:
    shutil.copy(copy / "val-index.safetensors", copy / "train-index.safetensors")
    with pytest.raises(DataError, match=r"train-index.safetensors does not fit manifest.json"):
        shards(root=str(copy))
    os.truncate(copy / "train-index.safetensors", 50)
    with pytest.raises(DataError, match=r"train-index.safetensors can't be read"):
        shards(root=str(copy))


def test_what_is_lost_while_a_run_goes_on_is_an_unreadable_image(copy: Path) -> None:
    images = shards(root=str(copy)).train
    os.truncate(copy / "train-000000.tar", 2000)
    with pytest.raises(UnreadableImage, match="ends before byte"):
        images.read(0)
    (copy / "train-000001.tar").unlink()
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        images.read(4)
    with pytest.raises(UnreadableImage, match="can't be decoded"):
        decoded(bytearray(b"no JPEG at all"))


@pytest.mark.data
def test_real_photographs_decode_to_pillows_pixels(real_images: Path) -> None:
    paths = sorted(
        path for path in real_images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    assert len(paths) > 1000
    for path in paths[::4]:
        with Image.open(path) as image:
            upright = image.getexif().get(0x0112, 1) == 1 and image.mode in ("RGB", "L")
        if upright:
            assert np.array_equal(
                decoded(bytearray(path.read_bytes())), np.asarray(read_rgb(path))
            ), path


def test_a_tar_of_the_same_size_with_other_bytes_is_found_when_hashes_are_asked_for(
    out: Path, tmp_path: Path
) -> None:
    check_hashes(out)
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    content = bytearray((damaged / "val-000000.tar").read_bytes())
    content[700] ^= 1
    (damaged / "val-000000.tar").write_bytes(content)
    shards(root=str(damaged))  # as quick as before: sizes alone are looked at
    with pytest.raises(DataError, match=r"val-000000\.tar .*other bytes"):
        check_hashes(damaged)


def changed_manifest(copy: Path, where: str, value: object) -> None:
    """Put a value at a place such as train.shards.0.file."""
    manifest = json.loads((copy / "manifest.json").read_bytes())
    at = manifest
    *above, last = [int(part) if part.isdecimal() else part for part in where.split(".")]
    for part in above:
        at = at[part]
    at[last] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", None),
        ("packed", []),
        ("packed.images_per_shard", 0),
        ("packed.images_per_shard", "4"),
        ("packed.images_per_shard", 2**70),
        ("train", None),
        ("train.images", True),
        ("train.images", -1),
        ("train.images", 2**34),
        ("train.classes", "ab"),
        ("train.classes", [1]),
        ("train.split", "../train"),
        ("train.split", ""),
        ("train.shards", []),
        ("train.shards.0", 5),
        ("train.shards.0.file", "../../train-000000.tar"),
        ("train.shards.0.bytes", "many"),
        ("train.unreadable", []),
        ("train.stored", {"kept": 1}),
        ("train.digest", 5),
    ],
)
def test_a_manifest_that_relloc_did_not_write_is_one_message(
    copy: Path, where: str, value: object
) -> None:
    changed_manifest(copy, where, value)
    with pytest.raises(DataError, match=r"manifest\.json"):
        shards(root=str(copy))


def test_a_manifest_of_one_tar_with_a_number_beyond_64_bits_is_one_message(
    originals: Path, tmp_path: Path
) -> None:
    whole = packed(of(originals), tmp_path / "whole", images_per_shard=1000)
    changed_manifest(whole, "packed.images_per_shard", 2**63)
    with pytest.raises(DataError, match="images_per_shard"):
        shards(root=str(whole))


def test_a_digest_of_half_a_character_is_another_set(out: Path, copy: Path) -> None:
    changed_manifest(copy, "train.digest", "\ud800")
    assert shards(root=str(copy)).train.digest() != shards(root=str(out)).train.digest()


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b"null"])
def test_json_of_other_kinds_is_one_message(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        shards(root=str(copy))


@pytest.mark.parametrize("reason", ["larger than any image", "other names"])
def test_files_that_are_mostly_holes_ask_for_no_memory(copy: Path, reason: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    columns = {
        key: values.copy() for key, values in load_file(copy / "train-index.safetensors").items()
    }
    if reason == "other names":
        grown, columns["name_offset"][-1] = copy / "train-names.jsonl", 2**34
    else:
        last = manifest["train"]["shards"][-1]
        grown, last["bytes"], columns["size"][-1] = copy / last["file"], 2**34, 2**33
        (copy / "manifest.json").write_text(json.dumps(manifest))
    with open(grown, "r+b") as file:
        file.truncate(2**34)
    save_file(columns, copy / "train-index.safetensors")
    with pytest.raises(DataError, match=reason):
        shards(root=str(copy))


def test_tars_of_others_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes(bytes(1024))
    with pytest.raises(DataError, match=r"manifest\.json.*\bTars\b.*\bunpack\b"):
        shards(root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "index", "value", "reason"),
    [
        ("size", 0, 2**34, "outside of its tar"),
        ("size", 0, -1, "outside of its tar"),
        ("size", 0, 2**63 - 1, "outside of its tar"),
        ("offset", 0, 2**34, "outside of its tar"),
        ("offset", 0, -512, "outside of its tar"),
        ("offset", 0, 2**63 - 1, "outside of its tar"),
        ("offset", 1, 512, "overlap"),
        ("label", 0, 2, r"label .*\bclass"),
        ("label", 0, -1, r"label .*\bclass"),
        ("name_offset", 1, 2**34, "has other names"),
        ("name_offset", 0, 1, "has other names"),
        ("name_offset", -1, 5, "has other names"),
    ],
)
def test_an_index_that_leads_outside_is_one_message(
    copy: Path, name: str, index: int, value: int, reason: str
) -> None:
    path = copy / "train-index.safetensors"
    columns = {key: values.copy() for key, values in load_file(path).items()}
    columns[name][index] = value
    save_file(columns, path)
    with pytest.raises(
        DataError, match=f"train-index.safetensors does not fit manifest.json .*{reason}"
    ):
        shards(root=str(copy))


@pytest.mark.parametrize("change", ["float", "short", "deep", "scalar", "gone"])
@pytest.mark.parametrize("name", ["offset", "size", "name_offset"])
def test_an_index_of_another_form_is_one_message(copy: Path, name: str, change: str) -> None:
    path = copy / "train-index.safetensors"
    columns = load_file(path)
    values = columns.pop(name)
    other = {
        "float": values.astype(np.float32),
        "short": values[:-1].copy(),
        "deep": values[None].copy(),
    }
    other["scalar"] = np.array(5)
    save_file(columns | ({} if change == "gone" else {name: other[change]}), path)
    with pytest.raises(DataError, match="does not fit manifest.json"):
        shards(root=str(copy))


def test_names_that_are_missing_or_damaged_are_told(copy: Path) -> None:
    path = copy / "train-names.jsonl"
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match=r"train-names\.jsonl can't be read"):
        shards(root=str(copy)).train.source(0)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="has other names"):
        shards(root=str(copy))
    path.unlink()
    with pytest.raises(DataError, match=r"train-names\.jsonl is missing"):
        shards(root=str(copy))


@pytest.mark.parametrize("role", ["train", "held_out"])
def test_other_labels_in_the_index_are_another_set_and_told_by_their_hash(
    out: Path, copy: Path, role: str
) -> None:
    before, split = (
        getattr(shards(root=str(out)), role),
        {"train": "train", "held_out": "val"}[role],
    )
    path = copy / f"{split}-index.safetensors"
    columns = {key: values.copy() for key, values in load_file(path).items()}
    columns["label"][0] = 1 - columns["label"][0]
    save_file(columns, path)
    after = getattr(shards(root=str(copy)), role)
    assert after.digest() != before.digest()
    with pytest.raises(DataError, match=rf"{split}-index\.safetensors .*other bytes"):
        check_hashes(copy)


def test_other_names_are_another_set(out: Path, copy: Path) -> None:
    path = copy / "train-names.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0000", b"9999", 1))
    assert shards(root=str(copy)).train.digest() != shards(root=str(out)).train.digest()


def huge_jpeg(before_the_frame: bytes = b"") -> bytearray:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "JPEG")
    content = bytearray(b"\xff\xd8" + before_the_frame + stream.getvalue()[2:])
    frame = content.index(b"\xff\xc0\x00\x11")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return content


@pytest.mark.parametrize(
    "before", [b"", b"\x00\x01", b"\xff\xff", b"\xff\x01", b"\xff\xe1\x00\x06\xff\xc0\x00\x00"]
)
def test_a_jpeg_that_claims_to_be_huge_is_unreadable_before_memory_is_asked_for(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_arguments: object, **_more: object) -> None:
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr("relloc.data.shards.decode_jpeg", called)
    with pytest.raises(UnreadableImage, match="65500 x 65500 px"):
        decoded(huge_jpeg(before))


def test_a_huge_image_among_packed_ones_is_one_unreadable_image(copy: Path) -> None:
    images = shards(root=str(copy)).train
    path, content = copy / "train-000000.tar", bytearray((copy / "train-000000.tar").read_bytes())
    frame = content.index(b"\xff\xc0\x00\x11")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="claims to have"):
        images.read(0)
    assert images.read(1).size


@pytest.mark.parametrize(
    "name", ["manifest.json", "train-index.safetensors", "train-names.jsonl", "train-000000.tar"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files_are_told_and_not_waited_for(
    copy: Path, name: str, make: Callable[[Path], None]
) -> None:
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(DataError, match=name):
        shards(root=str(copy))
