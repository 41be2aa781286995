import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from relloc.data import contents
from relloc.data.contents import hash_files
from relloc.data.folder import FolderImages, folder
from relloc.data.processes import without_progress


def files(root: Path, n: int, n_bytes: int = 40) -> Path:
    rng = np.random.default_rng(0)
    root.mkdir()
    for number in range(n):
        (root / f"{number:03d}.jpg").write_bytes(rng.bytes(n_bytes))
    return root


def of(root: Path) -> str:
    paths = sorted(map(str, root.iterdir()))
    return hash_files(
        paths, [os.path.basename(path) for path in paths], ["label"], without_progress
    )


def change(path: Path, *, n_bytes: int | None = None) -> None:
    before = path.read_bytes()
    content = bytes(255 - byte for byte in before) if n_bytes is None else bytes(n_bytes)
    path.write_bytes(content)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty images are a large set, of which ten are read."""
    monkeypatch.setattr(contents, "WHOLE_IMAGES", 29)
    monkeypatch.setattr(contents, "SAMPLED_IMAGES", 10)


def test_in_a_small_set_every_byte_counts_and_times_and_places_do_not(tmp_path: Path) -> None:
    root = files(tmp_path / "here", 30)
    before = of(root)
    assert len(before) == 16
    for path in root.iterdir():
        os.utime(path, (1, 1))
    copied = Path(shutil.copytree(root, tmp_path / "there"))
    assert before == of(root) == of(copied)
    found = {before}
    for path in sorted(copied.iterdir()):
        change(path)
        found.add(of(copied))
    assert len(found) == 31


@pytest.mark.usefixtures("large")
def test_in_a_large_set_all_sizes_count_and_the_bytes_of_a_sample(tmp_path: Path) -> None:
    root = files(tmp_path / "set", 30)
    before, seen = of(root), 0
    for path in sorted(root.iterdir()):
        content = path.read_bytes()
        change(path, n_bytes=41)
        assert of(root) != before
        path.write_bytes(bytes(255 - byte for byte in content))
        seen += of(root) != before
        path.write_bytes(content)
    assert seen == 10
    assert of(root) == before


def test_a_set_of_few_and_huge_files_is_sampled_within_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "WHOLE_BYTES", 30 * 40 - 1)
    monkeypatch.setattr(contents, "SAMPLED_BYTES", 7 * 40)
    root = files(tmp_path / "set", 30)
    before, seen = of(root), 0
    for path in sorted(root.iterdir()):
        change(path)
        seen += of(root) != before
        change(path)
    assert seen == 7


def test_what_cannot_be_read_counts_as_that_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = files(tmp_path / "set", 4)
    path, whole = root / "001.jpg", of(root)
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    missing = of(root)
    path.unlink()
    os.mkfifo(path)
    assert of(root) == missing != whole
    path.unlink()
    path.write_bytes(content)
    assert of(root) == whole
    assert hash_files(["nul\0.jpg"], ["nul\0.jpg"], [], without_progress)


def test_line_ends_in_names_make_no_two_sets_alike(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    path = str(tmp_path / "one")
    name_lists = [
        (["a\nb"], []),
        (["a"], ["b"]),
        (["a"], ["b\n"]),
        (["a"], ["1:b"]),
        (["a"], ["", "b"]),
    ]
    assert len(
        {hash_files([path], names, besides, without_progress) for names, besides in name_lists}
    ) == len(name_lists)


def test_progress_is_told_of_sizes_and_of_what_is_read(tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []

    @contextlib.contextmanager
    def display(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        assert done == 0
        yield lambda now, text: reports.append((now, total, text))

    root = files(tmp_path / "set", 30)
    paths = sorted(map(str, root.iterdir()))
    hash_files(paths, paths, [], display)
    assert reports == [(30, 30, "file sizes"), (30, 30, "files")]


def test_a_digest_says_by_which_rules_it_was_made(tmp_path: Path) -> None:
    images = folder(name="mine", root=str(files(tmp_path / "set", 30)), held_out_share=0.5).train
    assert isinstance(images, FolderImages)
    assert images.digest().endswith("-2")
    assert len(images.digest()) == 16


def test_a_digest_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(name="mine", root=str(files(tmp_path / "set", 30)), held_out_share=0.5).train
    before = images.digest()
    monkeypatch.setattr(contents, "os", None)  # reading would fail
    assert images.digest() == before
