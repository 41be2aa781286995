"""Tests when checkpoints are saved, and what a run resumes from."""

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from relloc import ranks
from relloc.checkpoints import states
from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.checkpoints.states import (
    load_training,
    newest_sound,
    save_training,
    saved_trainings,
    training_folder,
)
from relloc.errors import CheckpointError, DamagedCheckpoint, DamagedFile, UsageError
from relloc.geometry import PatchGrid
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.optimization import StepsDone
from relloc.patches.color import Keep
from relloc.patches.curriculum import TrainingPatches
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.alarm import Diverged
from relloc.pretext.loop import Task
from relloc.pretext.relative_location import RelativeLocation
from relloc.pretext.schedule import Constant
from relloc.pretext.stopping import StopRequest
from relloc.runs import saving
from relloc.runs.saving import (
    RANDOM_NUMBERS,
    TRAINING_FILE,
    Saver,
    milestone_steps,
    note_identity,
    resume,
)
from relloc.tracking.journal import JOURNAL_FILE

IDENTITY = {"grid.gap_px": 4, "seed": 0}


def new_task(*, seed: int = 0, epochs: float = 3, steps_per_epoch: int = 4) -> Task:
    torch.manual_seed(seed)
    head = PairHead(
        embedding_dim=4,
        hidden_dim=4,
        batch_norm_momentum=0.1,
        dropout=0,
        neck_std=0.1,
        head_std=0.1,
    )
    backbone = SmallBackbone(widths=(8, 8, 8, 8, 4))
    model = RelativeLocation(backbone, head, batch_norm="separate", images_per_batch_norm=4)
    grid = PatchGrid(patch_px=16, gap_px=2, jitter_px=1, resize=None)
    pipeline = PatchPipeline(grid=grid, color=Keep(), normalize=ByDataset())
    return Task(
        model=model,
        network=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedule=Constant(epochs=epochs),
        draw=TrainingPatches(patches=pipeline).draw,
        make=pipeline.make,
        steps_per_epoch=steps_per_epoch,
        accumulation=1,
        seed_of=lambda *place: sum(place),
        device=torch.device("cpu"),
        bf16=False,
    )


def step(task: Task) -> None:
    """Everything that a checkpoint holds is moved."""
    task.optimizer.zero_grad()
    task.model(torch.randn(4, 9, 3, 16, 16)).square().sum().backward()
    task.optimizer.step()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def to(seconds: float) -> None:
        now[0] = seconds

    return to


def new_saver(run_dir: Path, task: Task, **changes: object) -> Saver:
    fixed = {
        "identity": IDENTITY,
        "about": {"model": {"name": "tiny"}},
        "stop": StopRequest(),
        "every_s": 10,
    }
    return Saver(task=task, run_dir=run_dir, **{**fixed, "milestones": {}, **changes})  # type: ignore[arg-type]


def standing(done: int, loss: float = 2.0) -> StepsDone:
    return StepsDone(step=done, sums=torch.tensor([loss, 3.0, 8.0], dtype=torch.float64))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in training_folder(run_dir).glob("*.pt"))


def test_a_checkpoint_is_saved_once_so_many_seconds_have_passed(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    saver = new_saver(tmp_path, new_task())
    saved_after = []
    for done, now in enumerate([0.0, 9.9, 10.1, 20.0, 20.2, 25.0], start=1):
        clock(now)
        assert saver.after_step(standing(done)) is False
        if saved_trainings(tmp_path) and saved_trainings(tmp_path)[-1].stem.endswith(str(done)):
            saved_after.append(now)
    assert saved_after == [10.1, 20.2]  # ten seconds after the last one


def test_what_saving_took_is_added_up(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = new_saver(tmp_path, new_task())
    monkeypatch.setattr(states, "save_training", lambda *_: clock(time.monotonic() + 4))
    for done, now in enumerate([5.0, 11.0, 20.0, 26.0], start=1):
        clock(now)
        saver.after_step(standing(done))
    assert saver.spent_s == 2 * 4


def test_the_last_step_is_saved_at_any_time(tmp_path: Path, clock: Callable[[float], None]) -> None:
    clock(0)
    saver = new_saver(tmp_path, new_task())
    for done in (11, 12):
        assert saver.after_step(standing(done)) is False
    assert names(tmp_path) == ["step_000000012.pt"]


def test_milestones_are_saved_by_name_and_stay(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    clock(0)
    saver = new_saver(tmp_path, new_task(), milestones={4: "epoch_1", 6: "epoch_1.5"})
    for done in range(1, 13):
        saver.after_step(standing(done))
    assert names(tmp_path) == [
        "epoch_1.5.pt",
        "epoch_1.pt",
        "step_000000006.pt",
        "step_000000012.pt",
    ]
    kept = load_training(training_folder(tmp_path) / "epoch_1.pt")
    assert (kept["step"], kept["about"]) == (4, {"model": {"name": "tiny"}, "step": 4})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_is_awaited_from_the_first_step_on_saved_and_answered(
    tmp_path: Path, clock: Callable[[float], None], number: int
) -> None:
    clock(0)
    stop = StopRequest()
    saver = new_saver(tmp_path, new_task(), stop=stop)
    assert not stop.awaited
    assert saver.after_step(standing(1)) is False
    assert stop.awaited
    stop.notice(number, None)
    assert saver.after_step(standing(2)) is True
    assert names(tmp_path) == ["step_000000002.pt"]


def test_ranks_answer_alike_when_another_one_was_asked_to_stop(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(0)
    stop = StopRequest()
    saver = new_saver(tmp_path, new_task(), stop=stop)
    other = torch.tensor([signal.SIGUSR1, 0])
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(
        ranks, "gathered", lambda mine: torch.stack([mine, other if len(mine) == 2 else mine])
    )
    assert saver.after_step(standing(1)) is True
    assert (stop.name, stop.exit_code) == ("SIGUSR1", 138)
    assert load_training(saved_trainings(tmp_path)[0])["tallies"].shape == (2, 3)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_sums_that_are_not_finite_are_not_saved(
    tmp_path: Path, clock: Callable[[float], None], loss: float
) -> None:
    clock(0)
    saver = new_saver(tmp_path, new_task(), milestones={1: "epoch_0.25", 2: "epoch_0.5"})
    saver.after_step(standing(1))
    with pytest.raises(Diverged, match=r"\bfinite\b.*\bstep 2\b"):
        saver.after_step(standing(2, loss))
    assert names(tmp_path) == ["epoch_0.25.pt", "step_000000001.pt"]


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    clock(0)
    task = new_task()
    saver = new_saver(tmp_path, task, milestones={1: "epoch_0.25", 2: "epoch_0.5"})
    saver.after_step(standing(1))
    next(task.model.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(Diverged, match="not finite after step 2"):
        saver.after_step(standing(2))
    assert names(tmp_path) == ["epoch_0.25.pt", "step_000000001.pt"]


def test_what_was_saved_comes_back_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = new_task()
    for _ in range(3):
        step(task)
    Saver.save(new_saver(tmp_path, task), standing(7))
    other = new_task(seed=1)
    found = resume(IDENTITY, other, tmp_path)
    assert found.step == 7
    assert torch.equal(found.sums, standing(7).sums)
    torch.testing.assert_close(
        dict(other.model.state_dict()), dict(task.model.state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(
        other.optimizer.state_dict(), task.optimizer.state_dict(), rtol=0, atol=0
    )
    assert f"resume  {saved_trainings(tmp_path)[0]} after step 7 of 12" in capsys.readouterr().out


def test_an_empty_folder_is_a_training_that_has_done_nothing(tmp_path: Path) -> None:
    found = resume(IDENTITY, new_task(), tmp_path)
    assert found.step == 0
    assert torch.equal(found.sums, torch.zeros(3, dtype=torch.float64))


def test_a_folder_of_other_settings_is_refused_with_what_differs_and_changes_nothing(
    tmp_path: Path,
) -> None:
    Saver.save(new_saver(tmp_path, new_task()), standing(7))
    other = new_task(seed=1)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(UsageError) as raised:
        resume({"grid.gap_px": 5, "model.name": "small"}, other, tmp_path)
    for words in (
        str(tmp_path),
        "grid.gap_px was 4, now 5",
        "model.name was None, now small",
        "seed was 0, now None",
    ):
        assert words in str(raised.value)
    assert all(
        torch.equal(old, new) for old, new in zip(before, other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("left", [JOURNAL_FILE, BACKBONE_FILE])
def test_without_a_checkpoint_curves_and_weights_of_other_settings_are_refused(
    tmp_path: Path, left: str
) -> None:
    note_identity(tmp_path, IDENTITY)
    # Without curves or weights there is nothing that two runs could mix.
    other_identity = IDENTITY | {"grid.gap_px": 5}
    assert resume(other_identity, new_task(), tmp_path).step == 0
    (tmp_path / left).touch()
    assert resume(IDENTITY, new_task(), tmp_path).step == 0
    with pytest.raises(UsageError, match="gap_px was 4, now 5"):
        resume(IDENTITY | {"grid.gap_px": 5}, new_task(), tmp_path)
    (tmp_path / TRAINING_FILE).unlink()
    with pytest.raises(UsageError, match="older relloc"):
        resume(IDENTITY | {RANDOM_NUMBERS: 2}, new_task(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_identity_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JOURNAL_FILE).touch()
    (tmp_path / TRAINING_FILE).write_bytes(content)
    with pytest.raises(DamagedFile, match=TRAINING_FILE):
        resume(IDENTITY, new_task(), tmp_path)


def test_with_another_number_of_processes_no_sum_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    tallies = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    assert saving._sums_of_rank(tallies).tolist() == [3, 5, 7]  # one process takes both
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        assert torch.equal(saving._sums_of_rank(tallies), tallies[rank])
        monkeypatch.setattr(ranks, "world_size", lambda: 4)
        assert saving._sums_of_rank(tallies).tolist() == ([3, 5, 7] if rank == 0 else [0, 0, 0])


def test_a_milestone_is_the_step_that_completes_its_epoch() -> None:
    task = new_task(epochs=3, steps_per_epoch=4)
    assert milestone_steps([1, 2.5, 3], task) == {4: "epoch_1", 10: "epoch_2.5", 12: "epoch_3"}
    assert milestone_steps([], task) == {}


@pytest.mark.parametrize("epoch", [0, -1, 3.1, 99])
def test_a_milestone_outside_the_run_is_refused(epoch: float) -> None:
    numbers = rf"^milestones=\[1, {epoch}\]: .* epoch {epoch},.*\b3\b"
    with pytest.raises(UsageError, match=numbers):
        milestone_steps([1, epoch], new_task(epochs=3))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_the_newest_checkpoint_is_taken_where_it_is_whole(tmp_path: Path) -> None:
    save_training(tmp_path, {"value": 1}, 9)
    newest = save_training(tmp_path, {"value": 2}, 10)
    assert newest_sound(tmp_path, pytest.fail) == newest


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_sound(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("damage", [flip_a_byte, cut])
def test_a_damaged_newest_is_set_aside_with_one_warning(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    before = save_training(tmp_path, {"value": torch.ones(1000)}, 1)
    newest = save_training(tmp_path, {"value": torch.ones(1000)}, 2)
    damage(newest)
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) == before
    assert len(warnings) == 1
    for words in (f"{newest} is damaged", "SHA-256", "step_000000002.pt.damaged"):
        assert words in warnings[0]
    assert saved_trainings(tmp_path) == [before]
    assert {path.name for path in training_folder(tmp_path).iterdir()} == {
        *(
            before.name,
            f"{before.name}.sha256",
            f"{newest.name}.damaged",
            f"{newest.name}.sha256.damaged",
        )
    }
    assert newest_sound(tmp_path, pytest.fail) == before  # said once


def test_one_flipped_byte_that_torch_reads_without_complaint_is_noticed(tmp_path: Path) -> None:
    path = save_training(tmp_path, {"value": torch.zeros(1000)}, 1)
    flip_a_byte(path)
    state = torch.load(path, weights_only=True)  # torch checks no sum of what it reads
    assert state["value"].count_nonzero() == 1
    with pytest.raises(CheckpointError, match=r"SHA-256 .*step_000000001\.pt\.sha256"):
        newest_sound(tmp_path, lambda text: (_ for _ in ()).throw(CheckpointError(text)))


def test_only_damaged_ones_are_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    for done in (1, 2):
        flip_a_byte(save_training(tmp_path, {"value": torch.ones(1000)}, done))
    warnings: list[str] = []
    with pytest.raises(CheckpointError) as raised:
        newest_sound(tmp_path, warnings.append)
    assert len(warnings) == 2
    for words in (
        f"no checkpoint in {training_folder(tmp_path)} can be read",
        "milestone",
        "hydra.run.dir",
    ):
        assert words in str(raised.value)


def test_a_checkpoint_that_a_kill_left_without_its_content_is_no_checkpoint(tmp_path: Path) -> None:
    # Killed between the hash and the content of step 2, or while the content was written.
    before = save_training(tmp_path, {"value": 1}, 1)
    folder = training_folder(tmp_path)
    (folder / "step_000000002.pt.sha256").write_text("0" * 64 + "  step_000000002.pt\n")
    (folder / ".step_000000002.pt.unfinished").write_bytes(before.read_bytes()[:50])
    assert newest_sound(tmp_path, pytest.fail) == before


def test_a_run_goes_on_from_a_milestone_where_all_else_is_damaged(tmp_path: Path) -> None:
    """As the error says: copied to the name that the error gives."""
    task = new_task()
    saver = new_saver(tmp_path, task, milestones={4: "epoch_1"})
    for done in (4, 8, 9):
        Saver.save(saver, standing(done))
    for path in saved_trainings(tmp_path):
        flip_a_byte(path)
    with pytest.raises(CheckpointError, match=r"Copy a milestone to step_\d+\.pt") as raised:
        newest_sound(tmp_path, lambda _text: None)
    name = str(raised.value).partition("Copy a milestone to ")[2].split()[0]
    folder = training_folder(tmp_path)
    (folder / name).write_bytes((folder / "epoch_1.pt").read_bytes())
    assert resume(IDENTITY, task, tmp_path).step == 4
    Saver.save(saver, standing(5))
    Saver.save(saver, standing(6))
    # Steps that were done after going back to the milestone are not lost again.
    assert resume(IDENTITY, task, tmp_path).step == 6


def test_a_run_that_an_older_relloc_began_is_refused_with_the_reason(tmp_path: Path) -> None:
    saver = new_saver(tmp_path, new_task())
    Saver.save(saver, standing(7))
    with pytest.raises(UsageError, match="an older relloc began"):
        resume(IDENTITY | {RANDOM_NUMBERS: 2}, new_task(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": None},
        {"model": []},
        {"model": {"other": torch.zeros(1)}},
        {"optimizer": {}},
        {"optimizer": {"state": [], "param_groups": 3}},
        {"tallies": [1.0]},
    ],
    ids=str,
)
def test_a_whole_file_that_is_no_state_of_this_training_is_named(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    task = new_task()
    new_saver(tmp_path, task, milestones={1: "first"}).after_step(standing(1))
    (path,) = saved_trainings(tmp_path)
    state = load_training(path)
    save_training(tmp_path, {**state, **changes}, 1)
    with pytest.raises(DamagedCheckpoint, match=path.name):
        resume(IDENTITY, new_task(), tmp_path)
