import errno
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from relloc.data.crops import Crops
from relloc.data.folder import FolderImages
from relloc.data.loader import ImageBatch, Sample, Unreadable, collate, load
from relloc.data.order import StepPlan, StepSampler
from relloc.errors import DataError, Interrupted
from relloc.geometry import PatchGrid, ShortSide
from relloc.seeds import Use

GRID = PatchGrid(patch_px=8, gap_px=2, jitter_px=1, resize=ShortSide(px=36))


def sample(index: int, unreadable: dict[str, str] | None = None, *, usable: bool = True) -> Sample:
    pixels = np.full((4, 4, 3), index, np.uint8) if usable else None
    return Sample(index=index, pixels=pixels, unreadable=unreadable or {})


@pytest.fixture
def crops(tmp_path: Path) -> Crops:
    """Of eleven files, the fourth empty."""
    random = np.random.default_rng(0)
    for number in range(11):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes(b"")
    paths = sorted(map(str, tmp_path.iterdir()))
    return Crops(
        FolderImages(name="mine", split="train", paths=paths),
        GRID,
        use=Use.CROP,
        seed=0,
        centered=False,
    )


def loaded(crops: Crops, workers: int) -> list[ImageBatch]:
    plan = StepPlan(n_images=len(crops), images_per_step=4, images_per_batch_norm=2)
    batches = StepSampler(plan, seed=0, first_step=1, steps=7)
    return list(load(crops, batches, workers=workers, pin=False))


def test_worker_processes_change_neither_batches_nor_their_order(
    crops: Crops, tmp_path: Path
) -> None:
    alone, with_two = loaded(crops, 0), loaded(crops, 2)
    assert len(alone) == len(with_two) == 12
    for one, other in zip(alone, with_two, strict=True):
        assert one.pixels.shape == (2, 3, 30, 30)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.indices, other.indices)
        assert one.unreadable == other.unreadable
    named = [batch.unreadable for batch in with_two if batch.unreadable]
    assert named
    assert all(names == {str(tmp_path / "03.png"): "is an empty file"} for names in named)


def test_batches_follow_the_sampler(crops: Crops) -> None:
    plan = StepPlan(n_images=len(crops), images_per_step=4, images_per_batch_norm=2)
    wanted = list(StepSampler(plan, seed=0, first_step=1, steps=7))
    for batch, samples in zip(loaded(crops, 0), wanted, strict=True):
        assert batch.indices.tolist() == [4 if index == 3 else index for index, _ in samples]
        for pixels, place in zip(batch.pixels, samples, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0), crops[place].pixels)


def test_collate_leaves_out_what_has_no_pixels_and_keeps_its_reason() -> None:
    batch = collate(
        [sample(4), sample(5, {"e.jpg": "is empty"}, usable=False), sample(6, {"f.jpg": "is text"})]
    )
    assert batch.indices.tolist() == [4, 6]
    assert batch.pixels[:, 0, 0, 0].tolist() == [4, 6]
    assert batch.unreadable == {"e.jpg": "is empty", "f.jpg": "is text"}


def test_a_batch_may_be_empty() -> None:
    batch = collate([sample(5, {"e.jpg": "is empty"}, usable=False)])
    assert len(batch.pixels) == len(batch.indices) == 0
    assert batch.indices.dtype == torch.int64
    assert batch.unreadable == {"e.jpg": "is empty"}


class Signaled(Dataset[Sample]):
    """Signals reach the process that loads, in the midst of it."""

    def __getitem__(self, index: int) -> Sample:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        return sample(index)


class Killed(Dataset[Sample]):
    def __getitem__(self, index: int) -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        return sample(index)


def test_a_killed_worker_is_a_clear_error() -> None:
    with pytest.raises(Interrupted, match=r"killed.*\(workers=1\)"):
        list(load(Killed(), [[0]], workers=1, pin=False))


def test_pixels_of_a_batch_lie_channels_last_whoever_loaded_them(crops: Crops) -> None:
    for workers in (0, 1):
        assert all(
            batch.pixels.is_contiguous(memory_format=torch.channels_last)
            for batch in loaded(crops, workers)
        )


def test_signals_of_a_terminal_or_a_cluster_do_not_end_workers() -> None:
    batches: Iterable[list[int]] = [[0, 1], [2]]
    assert [
        batch.indices.tolist() for batch in load(Signaled(), batches, workers=1, pin=False)
    ] == [[0, 1], [2]]


def test_an_image_is_counted_once_however_often_it_is_met() -> None:
    unreadable = Unreadable(n_images=10, most_share=0.1)
    for _ in range(5):
        unreadable.add({"a.jpg": "is empty"})
    assert unreadable.reasons == {"a.jpg": "is empty"}


def test_more_than_the_allowed_share_ends_the_run_with_the_numbers_and_the_first_name() -> None:
    unreadable = Unreadable(n_images=20, most_share=0.1)
    unreadable.add({"a.jpg": "is empty", "b.jpg": "is text"})  # just the share
    message = r"3 of 20 images .* data.unreadable_share=0.1 .* a.jpg: is empty"
    with pytest.raises(DataError, match=message):
        unreadable.add({"c.jpg": "is empty"})


def test_a_share_of_zero_allows_none() -> None:
    unreadable = Unreadable(n_images=20, most_share=0)
    unreadable.add({})
    with pytest.raises(DataError, match="1 of 20"):
        unreadable.add({"a.jpg": "is empty"})


def test_memory_that_can_not_be_handed_over_is_sent(
    crops: Crops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    for one, other in zip(loaded(crops, 0), loaded(crops, 2), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert one.pixels.stride() == other.pixels.stride()


def test_a_batch_that_has_no_room_in_memory_is_told(
    crops: Crops, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Interrupted, match=r"No space left.*workers=2"):
        loaded(crops, 1)


def test_batches_that_are_kept_take_no_file_descriptors(crops: Crops) -> None:
    before = len(os.listdir("/proc/self/fd"))
    batches = loaded(crops, 1)
    assert len(batches) == 12
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_locking_pages_keeps_batches_and_their_order(
    crops: Crops, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    locked: list[torch.Tensor] = []

    def pin_memory(pixels: torch.Tensor) -> torch.Tensor:
        locked.append(pixels.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    plan = StepPlan(n_images=len(crops), images_per_step=4, images_per_batch_norm=2)
    batches = StepSampler(plan, seed=0, first_step=1, steps=7)
    found = list(load(crops, batches, workers=workers, pin=True))
    # Several threads lock them, in any order.
    assert {batch.pixels.data_ptr() for batch in found} == {pixels.data_ptr() for pixels in locked}
    for one, other in zip(found, loaded(crops, 0), strict=True):
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_page_locked_and_the_same(crops: Crops, workers: int) -> None:
    plan = StepPlan(n_images=len(crops), images_per_step=4, images_per_batch_norm=2)
    batches = StepSampler(plan, seed=0, first_step=1, steps=7)
    locked = list(load(crops, batches, workers=workers, pin=True))
    for one, other in zip(locked, loaded(crops, 0), strict=True):
        assert one.pixels.is_pinned()
        assert one.pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.indices, other.indices)
