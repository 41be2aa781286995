import hashlib
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relloc.checkpoints.backbone_files import load_backbone
from relloc.checkpoints.states import (
    delete_state,
    load_state,
    load_training,
    newest_sound,
    save_state,
    save_training,
    saved_trainings,
)
from relloc.errors import CheckpointError, DamagedCheckpoint

ABOUT = {
    "model": {"name": "tiny", "backbone": {"widths": [4, 8]}},
    "step": 3,
    "computed": {"path": "/ä/𝄞"},
}


def network(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(5, 2))
    layers(torch.randn(2, 3, 7, 7))  # running statistics of its own
    return layers


def training_state(seed: int = 0) -> dict[str, Any]:
    model = nn.ModuleDict({"backbone": network(seed), "head": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(value.sum() for value in model.parameters()).backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "about": ABOUT,
        "computed": {"lr": 0.1},
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(
            one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
        )  # to the bit, nan too
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_same(mine, yours)
    else:
        assert one == other
        assert type(one) is type(other)


def files_below(folder: Path) -> list[str]:
    """All files but the hashes of checkpoints, each of which has to stand beside its checkpoint."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    hashes = {name for name in files if name.endswith(".sha256")}
    assert hashes == {
        f"{name}.sha256"
        for name in files
        if (Path(name).parent.name == "checkpoints" or f"{name}.sha256" in hashes)
        and name not in hashes
        and ".damaged" not in name
    }
    return sorted(files - hashes)


def test_a_training_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = training_state()
    state["odd"] = {
        "bf16": torch.tensor([math.nan, -0.0, 1e-39]).bfloat16(),
        "float64": torch.tensor([math.nan, math.inf, 5e-324], dtype=torch.float64),
        "scalar": torch.tensor(3, dtype=torch.int64).reshape(1),
        "plain": [1, 0.1, None, "ä", True, (1, 2)],
    }
    path = save_training(tmp_path, state, step=7)
    assert path == tmp_path / "checkpoints" / "step_000000007.pt"
    assert_same(load_training(path), {**state, "step": 7})


def test_the_newest_two_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 99, 1000):
        save_training(tmp_path, {"step_was": step}, step)
    kept = saved_trainings(tmp_path)
    assert [load_training(path)["step_was"] for path in kept] == [99, 1000]
    assert files_below(tmp_path) == [
        "checkpoints/step_000000099.pt",
        "checkpoints/step_000001000.pt",
    ]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert saved_trainings(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_training(tmp_path, {"value": 1}, 5)
    path = save_training(tmp_path, {"value": 2}, 5)
    assert saved_trainings(tmp_path) == [path]
    assert load_training(path)["value"] == 2


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from relloc.checkpoints.backbone_files import save_backbone
from relloc.checkpoints.states import save_training
from relloc.errors import CheckpointError

run_dir = Path(sys.argv[1])
network = torch.nn.Linear(1000, 1000)
save_training(run_dir, {"weight": torch.ones(1000)}, 1)
save_backbone(run_dir / "backbone.safetensors", torch.nn.Linear(2, 2), {"of": "first"})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the next file ends midway
for save in (
    lambda: save_training(run_dir, {"weight": network.weight.data}, 2),
    lambda: save_backbone(run_dir / "backbone.safetensors", network, {"of": "second"}),
):
    try:
        save()
    except CheckpointError as error:
        print(error)
    else:
        sys.exit("nothing was raised")
"""


def test_a_write_that_fails_midway_says_what_to_do_and_what_was_before_still_loads(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    of_training, of_backbone = done.stdout.splitlines()
    advice = (
        "could not be written (File too large). What was saved before is untouched; free some "
        "space and start the same command with the same hydra.run.dir to go on"
    )
    assert of_training == f"{tmp_path}/checkpoints/step_000000002.pt {advice}"
    assert of_backbone == f"{tmp_path}/backbone.safetensors {advice}"
    assert files_below(tmp_path) == ["backbone.safetensors", "checkpoints/step_000000001.pt"]
    assert torch.equal(load_training(saved_trainings(tmp_path)[-1])["weight"], torch.ones(1000))
    assert load_backbone(tmp_path)[1] == {"of": "first"}


def test_a_file_that_can_not_take_its_place_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_training(tmp_path, {"value": 1}, 1)

    def replace(_source: Path, _target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        CheckpointError, match=r"step_000000002\.pt.* written \(Permission denied\)"
    ):
        save_training(tmp_path, {"value": 2}, 2)
    assert files_below(tmp_path) == ["checkpoints/step_000000001.pt"]
    assert load_training(saved_trainings(tmp_path)[0])["value"] == 1


def test_a_run_folder_that_can_not_hold_checkpoints_is_an_error_with_the_advice(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match=r"step_000000001\.pt.* written \(.+\)\. \w"):
        save_training(tmp_path, {}, 1)


def test_what_is_unfinished_is_no_checkpoint(tmp_path: Path) -> None:
    path = save_training(tmp_path, {"value": 1}, 1)
    left = path.with_name(".step_000000002.pt.unfinished")
    left.write_bytes(path.read_bytes()[:100])  # as a killed process leaves it
    path.with_name("step_000000002.pt.sha256").write_text(
        "0" * 64 + "  step_000000002.pt"
    )  # and this before
    assert saved_trainings(tmp_path) == [path]
    newest = save_training(tmp_path, {"value": 2}, 2)
    assert newest_sound(tmp_path, pytest.fail) == newest
    assert load_training(newest)["value"] == 2
    assert files_below(tmp_path) == [
        "checkpoints/step_000000001.pt",
        "checkpoints/step_000000002.pt",
    ]


def test_a_milestone_stays_when_newer_ones_go_and_its_hash_is_one_that_sha256sum_checks(
    tmp_path: Path,
) -> None:
    for step in range(1, 5):
        save_training(tmp_path, {"value": step}, step, milestone="epoch_2" if step == 2 else None)
    names = ["epoch_2", "step_000000003", "step_000000004"]
    assert files_below(tmp_path) == [f"checkpoints/{name}.pt" for name in names]
    assert load_training(tmp_path / "checkpoints" / "epoch_2.pt")["value"] == 2
    assert [path.stem for path in saved_trainings(tmp_path)] == names[1:]
    check = ["sha256sum", "--check", *(f"{name}.pt.sha256" for name in names)]
    assert (
        subprocess.run(
            check, cwd=tmp_path / "checkpoints", capture_output=True, check=False
        ).returncode
        == 0
    )


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_training(tmp_path, {"weight": torch.zeros(1000)}, 1)
    flip_a_bit(path)
    with pytest.raises(
        CheckpointError,
        match=r"step_000000001\.pt .*damaged.* SHA-256 ",
    ):
        load_training(path)
    path.with_name(path.name + ".sha256").unlink()
    assert load_training(path)["weight"].any()  # without the hash nobody would have known


def test_the_newest_sound_checkpoint_is_used_and_a_damaged_one_set_aside_with_a_warning(
    tmp_path: Path,
) -> None:
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) is None
    older, newest = (
        save_training(tmp_path, {"weight": torch.zeros(1000)}, step) for step in (1, 2)
    )
    assert newest_sound(tmp_path, warnings.append) == newest
    assert warnings == []
    flip_a_bit(newest)
    assert newest_sound(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert "step_000000002.pt is damaged" in warnings[0]
    assert "set aside as step_000000002.pt.damaged" in warnings[0]
    assert files_below(tmp_path) == [
        "checkpoints/step_000000001.pt",
        "checkpoints/step_000000002.pt.damaged",
        "checkpoints/step_000000002.pt.sha256.damaged",
    ]
    flip_a_bit(older)
    for _ in range(2):  # nor is training begun anew, unasked, when it is started again
        with pytest.raises(
            CheckpointError,
            match=r"no checkpoint .*/checkpoints .* step_000000000",
        ):
            newest_sound(tmp_path, warnings.append)


@pytest.mark.parametrize(
    ("place", "name"), [(Path, "open"), (hashlib, "file_digest"), (torch, "load")]
)
def test_a_checkpoint_that_can_not_be_read_at_present_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    save_training(tmp_path, {"value": 1}, 1)
    before = files_below(tmp_path)

    def stale(*_arguments: object, **_more: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(place, name, stale)
    with pytest.raises(CheckpointError, match=r"step_000000001\.pt.* read \(Stale file handle\)"):
        newest_sound(tmp_path, pytest.fail)
    monkeypatch.undo()
    assert files_below(tmp_path) == before


def test_a_state_comes_back_to_the_bit_and_its_hash_is_one_that_sha256sum_checks(
    tmp_path: Path,
) -> None:
    state = training_state() | {
        "odd": torch.tensor([math.nan, -0.0]).bfloat16(),
        "plain": [1, None, (1, "ä")],
    }
    path = tmp_path / "evaluations" / "a.pt"
    for number in (1, 2):  # also in the place of the one before
        save_state(path, state | {"number": number})
    found = load_state(path)
    assert_same(found, state | {"number": 2})
    check = ["sha256sum", "--check", "a.pt.sha256"]
    assert subprocess.run(check, cwd=path.parent, capture_output=True, check=False).returncode == 0
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.pt", "a.pt.sha256"]
    weight = found["model"]["backbone.0.weight"]
    weight.add_(1)  # it is the reader's own
    assert_same(load_state(path), state | {"number": 2})
    save_state(path, found)  # over the file that it is still read from
    assert_same(load_state(path), found)


@pytest.mark.slow
def test_a_state_is_neither_saved_nor_loaded_by_way_of_memory_of_its_size(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import torch
from relloc.checkpoints.states import load_state, save_state

path = Path(sys.argv[1])
weight = torch.ones(30_000_000)
save_state(path, {"weight": weight[:10]})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_state(path, {"weight": weight})
loaded = load_state(path)["weight"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert loaded.shape == weight.shape and loaded[-1] == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.pt")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # KiB; the state is 117,000


@pytest.mark.parametrize("fails", ["midway", "at once", "when it takes its place"])
def test_a_state_that_can_not_be_saved_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "a.pt"
    save_state(path, {"value": 1})
    if fails == "midway":
        full_disk(monkeypatch, after_bytes=3_000_000)
    elif fails == "at once":
        full_disk(monkeypatch, after_bytes=0)
    else:
        monkeypatch.setattr(os, "replace", no_replace_of(path))
    with pytest.raises(CheckpointError, match=r"a\.pt .*written \(.+\)"):
        save_state(
            path, {"a": torch.ones(500_000), "b": torch.ones(500_000), "c": torch.ones(500_000)}
        )
    monkeypatch.undo()
    assert load_state(path) == {"value": 1}
    assert not list(tmp_path.glob(".*"))


def full_disk(monkeypatch: pytest.MonkeyPatch, after_bytes: int) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > after_bytes:
                raise OSError(28, "No space left on device")
            return super().write(content)

    monkeypatch.setattr("builtins.open", lambda path, mode: Full(path, mode))


def no_replace_of(path: Path) -> Callable[[Path, Path], None]:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == path:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    return refuse


def test_a_damaged_state_is_told_and_a_lost_hash_only_means_that_it_is_not_checked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.pt"
    save_state(path, {"weight": torch.zeros(1000)})
    flip_a_bit(path)
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt .*damaged.* SHA-256 .*a\.pt\.sha256"):
        load_state(path)
    path.with_name("a.pt.sha256").unlink()
    assert load_state(path)["weight"].any()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt is damaged"):
        load_state(path)
    with pytest.raises(CheckpointError, match=r"b\.pt .*\(No such file or directory\)"):
        load_state(tmp_path / "b.pt")


def test_where_files_can_not_be_mapped_a_state_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    save_state(path, {"weight": torch.ones(3)})

    def refuse(*_args: Any, **_more: Any) -> None:
        raise RuntimeError("unable to mmap 1500 bytes from file: No such device (19)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    assert torch.equal(load_state(path)["weight"], torch.ones(3))


def test_what_was_saved_or_begun_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    delete_state(path)
    save_state(path, {"value": 1})
    (tmp_path / ".a.pt.unfinished").write_bytes(b"half")  # as a killed process leaves it
    delete_state(path)
    assert not list(tmp_path.iterdir())


def saved_bytes(tmp_path: Path) -> bytes:
    return save_training(tmp_path / "whole", training_state(), 1).read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "zeros", "torn"])
def test_a_damaged_checkpoint_is_an_error_with_its_name(tmp_path: Path, damage: str) -> None:
    whole = saved_bytes(tmp_path)
    content = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "zeros": bytes(len(whole)),
        "torn": whole[:-500] + bytes(500),
    }[damage]
    path = tmp_path / "step_000000001.pt"
    path.write_bytes(content)
    for load in (load_training, load_backbone):
        with pytest.raises(CheckpointError, match=r"step_000000001\.pt is damaged"):
            load(path)


def test_a_missing_training_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt .*\(No such file or directory\)"):
        load_training(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"conv1.weight": torch.ones(1)}},
        torch.ones(3),
        [1],
        {"model": {"backbone.a": torch.ones(1)}, "about": {}},
        {"step": 7, "state_dict": {}},
    ],
)
def test_a_checkpoint_of_another_project_is_an_error(tmp_path: Path, content: object) -> None:
    path = tmp_path / "epoch_70.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"epoch_70\.pt is damaged or no checkpoint"):
        load_backbone(path)


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save(
        {"step": 1, "model": {}, "about": {}, "code": RunsCode(tmp_path / "ran")},
        tmp_path / "evil.pt",
    )
    with pytest.raises(CheckpointError, match=r"evil\.pt is damaged") as raised:
        load_training(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(
        raised.value
    )  # torch advises to run the code; nobody should read that
