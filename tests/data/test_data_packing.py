import contextlib
import hashlib
import io
import json
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mixed_folder import BROKEN, ENCODED, KEPT, REDUCED, jpeg, picture, write_many, write_mixed
from PIL import Image

from relloc.data.check import Check
from relloc.data.folder import folder
from relloc.data.image_set import Splits
from relloc.data.images import read_rgb
from relloc.data.packing import Packing, pack
from relloc.data.photos import photos
from relloc.data.shards import shards
from relloc.errors import DataError, UnreadableImage, UsageError

PACKING = {"short_px": 96, "quality": 90, "subsampling": "4:2:0", "images_per_shard": 4}
# What makes of these settings those of pixels
PIXELS = {"format": "pixels", "quality": None, "subsampling": None, "enlarge": True}
in_each_format = pytest.mark.parametrize("format", [{}, PIXELS], ids=["jpeg", "pixels"])


@contextlib.contextmanager
def unseen(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda now, text: None


def packed(data: Splits, out: Path, workers: int = 2, **settings: object) -> Check:
    return pack(data, out, Packing(**(PACKING | settings)), workers=workers, progress=unseen)


def of(root: Path) -> Splits:
    return folder(name="mine", root=str(root), held_out_share=0.5)


def files(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())
    }


def members(out: Path, split: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path, "r:") as tar:
            assert all(
                member.uid == member.gid == member.mtime == 0 and member.isfile() for member in tar
            )
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of all kinds, and what it was packed into."""
    place = tmp_path_factory.mktemp("mixed")
    packed(of(write_mixed(place / "originals")), place / "out")
    return place / "originals", place / "out"


def test_each_kind_of_file_is_stored_in_its_way(mixed: tuple[Path, Path]) -> None:
    root, out = mixed
    images, stored = shards(root=str(out)).train, members(out, "train")
    numbers = {f"train/{images.source(index)}": index for index in range(len(images))}
    assert set(numbers) == {*KEPT, *REDUCED, *ENCODED, *BROKEN}
    for name in KEPT:
        assert stored[f"{numbers[name]:09d}.jpg"] == (root / name).read_bytes()
        assert np.array_equal(
            np.asarray(images.read(numbers[name])), np.asarray(read_rgb(root / name))
        )
    for name in (*REDUCED, *ENCODED):
        upright = read_rgb(root / name)
        if name in REDUCED:
            scale = 96 / min(upright.size)
            size = (int(upright.width * scale + 1e-9), int(upright.height * scale + 1e-9))
            upright = upright.resize(size, Image.Resampling.BILINEAR)
            assert min(upright.size) == 96
        upright.info.clear()
        assert stored[f"{numbers[name]:09d}.jpg"] == jpeg(upright, quality=90, subsampling="4:2:0")
    for name in BROKEN:
        assert f"{numbers[name]:09d}.jpg" not in stored
        with pytest.raises(UnreadableImage) as caught:
            images.read(numbers[name])
        with pytest.raises(UnreadableImage) as before:
            read_rgb(root / name)
        assert str(caught.value) == str(before.value)


def test_others_can_read_the_tars_and_find_labels_beside_images(mixed: tuple[Path, Path]) -> None:
    _, out = mixed
    images, stored = shards(root=str(out)).train, members(out, "train")
    keys = {name.partition(".")[0] for name in stored}
    assert len(keys) == len(images) - len(BROKEN)
    for key in keys:
        assert images.labels is not None
        assert int(stored[f"{key}.cls"]) == images.labels[int(key)]
        with Image.open(io.BytesIO(stored[f"{key}.jpg"])) as image:
            assert (image.format, min(image.size) <= 96) == ("JPEG", True)
    assert sorted(path.name for path in out.glob("train-*.tar")) == [
        f"train-{number:06d}.tar" for number in range(3)
    ]
    with tarfile.open(out / "train-000001.tar", "r:") as tar:
        assert {int(name.partition(".")[0]) // 4 for name in tar.getnames()} == {1}
    assert (out / "train-000001.tar").read_bytes()[
        257:265
    ] == b"ustar\x0000"  # plain POSIX, no extension


def test_the_manifest_says_how_all_came_to_be(mixed: tuple[Path, Path]) -> None:
    root, out = mixed
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert PACKING.items() <= manifest["packed"].items()
    assert manifest["packed"]["encoder"].startswith("Pillow ")
    train = manifest["train"]
    counts = {"kept": 2, "reduced": 3, "encoded": 3, "enlarged": 0, "unreadable": 2}
    assert train["stored"] == counts
    assert train["classes"] == ["a", "b"]
    assert set(train["unreadable"]) == {name.removeprefix("train/") for name in BROKEN}
    for tar in train["shards"]:
        content = (out / tar["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (tar["bytes"], tar["sha256"])
    for name, sha in train["originals_sha256"].items():
        assert hashlib.sha256((root / "train" / name).read_bytes()).hexdigest() == sha
    assert len(train["originals_sha256"]) == len(KEPT + REDUCED + ENCODED)
    assert not (out / "unfinished").exists()
    assert Check.from_json(json.loads((out / "check.json").read_bytes())).train.images == 10
    assert str(root) not in (out / "manifest.json").read_text()


def test_images_that_are_no_files_are_packed_too(tmp_path: Path) -> None:
    data = photos(tiles=[0.2], stride=1.0)
    packed(data, tmp_path / "out", images_per_shard=50)
    found = shards(root=str(tmp_path / "out"))
    assert list(found.train.labels or ()) == list(data.train.labels or ())
    assert [found.held_out.source(index) for index in range(3)] == [
        data.held_out.source(index) for index in range(3)
    ]
    for index in range(0, len(found.train), 20):
        before, after = data.train.read(index), found.train.read(index)
        assert min(after.size) == min(96, *before.size)
        difference = np.asarray(
            before.resize(after.size, Image.Resampling.BILINEAR), int
        ) - np.asarray(after, int)
        assert np.abs(difference).mean() < 6


@in_each_format
def test_the_bytes_depend_neither_on_processes_nor_on_where_the_originals_lie(
    mixed: tuple[Path, Path], tmp_path: Path, format: dict
) -> None:
    root, out = mixed
    if format:
        out = tmp_path / "here"
        packed(of(root), out, **format)
    packed(of(write_mixed(tmp_path / "elsewhere")), tmp_path / "out", workers=1, **format)
    assert files(tmp_path / "out") == files(out)


class Interrupt:
    """Stops packing once some images are done."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.done_before: list[int] = []

    @contextlib.contextmanager
    def __call__(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        self.done_before.append(done)

        def tell(now: int, text: str) -> None:
            if now >= self.after:
                raise KeyboardInterrupt

        yield tell


@in_each_format
def test_interrupted_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: dict
) -> None:
    monkeypatch.setattr("relloc.data.processes._LOOK_EVERY_S", 0.001)
    data = of(write_many(tmp_path / "originals", 40, 12, height=400, width=500))
    packed(data, tmp_path / "straight", **format)
    written_at: dict[str, int] = {}
    befores = []
    for after in (12, 30):
        stop = Interrupt(after)
        with pytest.raises(KeyboardInterrupt):
            packing = Packing(**(PACKING | format))
            pack(data, tmp_path / "out", packing, workers=2, progress=stop)
        befores += stop.done_before
        unfinished = tmp_path / "out" / "unfinished"
        finished = {path.stem for path in unfinished.glob("*-*.json")}
        for name, time_ns in written_at.items():
            assert (
                tmp_path / "out" / name
            ).stat().st_mtime_ns == time_ns  # finished ones are not written again
        written_at = {
            f"{name}.tar": (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns
            for name in finished
        }
        with pytest.raises(DataError, match="not finished.* same prepare command"):
            shards(root=str(tmp_path / "out"))
    assert befores[0] == 0 < befores[1] < 40
    packed(data, tmp_path / "out", workers=1, **format)
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_packing_that_an_older_relloc_began_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings say nothing of formats, as it knew JPEGs only."""
    monkeypatch.setattr("relloc.data.processes._LOOK_EVERY_S", 0.001)
    data = of(write_many(tmp_path / "originals", 20, 4, height=400, width=500))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(data, out, Packing(**PACKING), workers=1, progress=Interrupt(10))
    settings = out / "unfinished/settings.json"
    written = json.loads(settings.read_bytes())
    settings.write_text(
        json.dumps({key: written[key] for key in written.keys() - {"format", "enlarge"}})
    )
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert before
    packed(data, out)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert before.items() <= after.items()
    with pytest.raises(DataError, match="format was jpeg, now pixels"):
        packed(data, out, **PIXELS)


def test_a_finished_folder_is_left_as_it_is(mixed: tuple[Path, Path]) -> None:
    root, out = mixed
    born = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = packed(of(root), out)
    assert again.train.images == 10
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == born


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"short_px": 80}, "short_px .*96, .*80"),
        (
            {"quality": 80, "images_per_shard": 5},
            "images_per_shard .*4, .*5, quality .*90, .*80",
        ),
        ({"subsampling": "4:4:4"}, "subsampling .*4:2:0, .*4:4:4"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    mixed: tuple[Path, Path], changed: dict, difference: str
) -> None:
    root, out = mixed
    before = files(out)
    with pytest.raises(DataError, match=difference):
        packed(of(root), out, **changed)
    assert files(out) == before


def test_other_images_in_an_unfinished_folder_are_refused(tmp_path: Path) -> None:
    data = of(write_many(tmp_path / "originals", 20, 4))
    with pytest.raises(KeyboardInterrupt):
        pack(
            data,
            tmp_path / "out",
            Packing(**PACKING),
            workers=1,
            progress=Interrupt(5),
        )
    (tmp_path / "originals/train/a/more.jpg").write_bytes(jpeg(picture(96, 96)))
    with pytest.raises(DataError, match="images or their labels"):
        packed(of(tmp_path / "originals"), tmp_path / "out")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    data = of(write_many(tmp_path / "originals", 2, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=rf"{tmp_path / 'out'} .*relloc\.prepare"):
        packed(data, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_message_and_nothing_is_lost(tmp_path: Path) -> None:
    data = of(write_many(tmp_path / "originals", 12, 2))
    for number in range(8, 12):  # the last tar is the largest
        path = tmp_path / "originals/train" / "ab"[number % 2] / f"{number:04d}.jpg"
        path.write_bytes(jpeg(picture(96, 500, seed=number), quality=99, subsampling="4:4:4"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(
            DataError,
            match=r"/out .*File too large \(.*train-0.*\.tar\).* same command",
        ):
            packed(data, tmp_path / "out", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "train-000000.tar" in left
    assert not [name for name in left if name.endswith(".unfinished")]
    packed(data, tmp_path / "out")
    packed(data, tmp_path / "straight")
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_an_image_too_long_for_a_jpeg_is_unreadable(tmp_path: Path) -> None:
    root = write_many(tmp_path / "originals", 1, 1)
    Image.new("RGB", (70_000, 2)).save(root / "train/a/scroll.png")
    packed(of(root), tmp_path / "out")
    found = shards(root=str(tmp_path / "out")).train
    with pytest.raises(UnreadableImage, match=r"\b70000 px .*\b65500\b"):
        found.read(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"short_px": 0},
        {"images_per_shard": 0},
        {"quality": 0},
        {"quality": 101},
        {"subsampling": "4:1:1"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Packing(**(PACKING | wrong))


def test_what_an_older_relloc_packed_is_read_but_not_packed_on(tmp_path: Path) -> None:
    root = write_many(tmp_path / "originals", 10, 3)
    packed(of(root), tmp_path / "out", workers=1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    for role in ("train", "held_out"):
        manifest["packed"]["originals"][role]["digest"] = (
            "0123456789abcdef"  # as it identified images
        )
        del manifest[role]["index_sha256"]
        del manifest[role]["stored"]["enlarged"]
    del manifest["packed"]["format"], manifest["packed"]["enlarge"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    images = shards(root=str(tmp_path / "out")).train
    assert len(images) == 10
    assert min(images.read(0).size) == 96
    assert images.packing == "JPEG of quality 90 4:2:0, short side of at most 96 px"
    with pytest.raises(DataError, match="older relloc"):
        packed(of(root), tmp_path / "out", workers=1)


def test_packing_is_not_continued_with_other_images_of_the_same_names_and_sizes(
    tmp_path: Path,
) -> None:
    root = write_many(tmp_path / "originals", 10, 3)
    packed(of(root), tmp_path / "out", workers=1)
    path = root / "train/a/0000.jpg"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="images or their labels"):
        packed(of(root), tmp_path / "out", workers=1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train": 1}'])
def test_a_damaged_check_beside_packed_images_is_told(tmp_path: Path, content: str) -> None:
    root = write_many(tmp_path / "originals", 10, 3)
    packed(of(root), tmp_path / "out", workers=1)
    (tmp_path / "out/check.json").write_text(content)
    with pytest.raises(DataError, match=r"check\.json .*pack again"):
        packed(of(root), tmp_path / "out", workers=1)


def test_damaged_settings_of_unfinished_packing_are_told(tmp_path: Path) -> None:
    data = of(write_many(tmp_path / "originals", 20, 4))
    with pytest.raises(KeyboardInterrupt):
        pack(
            data,
            tmp_path / "out",
            Packing(**PACKING),
            workers=1,
            progress=Interrupt(5),
        )
    (tmp_path / "out/unfinished/settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings\.json .*pack again"):
        packed(data, tmp_path / "out")


def test_a_damaged_note_of_a_finished_part_is_packed_again_and_damaged_records_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = write_many(tmp_path / "originals", 10, 3), tmp_path / "out"
    packed(of(root), tmp_path / "whole", workers=1)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("relloc.data.packing._finish", full)
        with pytest.raises(DataError, match="No space left"):
            packed(of(root), out, workers=1)
    (out / "unfinished/train-000001.json").write_text('{"file": ')
    records = out / "unfinished/train-000000.npy"
    content = records.read_bytes()
    records.write_bytes(content[:50])
    with pytest.raises(DataError, match=r"train-000000\.npy .*damaged"):
        packed(of(root), out, workers=1)
    records.write_bytes(content)
    packed(of(root), out, workers=1)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_packed_folder_is_no_folder_of_images(tmp_path: Path, unfinished: bool) -> None:
    write_many(tmp_path / "originals", 8, 8)
    (tmp_path / "originals" / "manifest.json").write_text("{}")  # of others
    out = tmp_path / "out"
    packed(of(tmp_path / "originals"), out)
    if unfinished:
        (out / "manifest.json").rename(tmp_path / "manifest.json")
        (out / "unfinished").mkdir()
        (out / "unfinished" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match=f"give data.shards={out}"):
        of(out)
