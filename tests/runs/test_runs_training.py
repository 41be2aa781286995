"""Tests that a stopped and resumed training ends with the same bits as one never stopped."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from relloc.checkpoints import states
from relloc.data.image_set import Splits
from relloc.data.loader import Unreadable
from relloc.errors import DataError, UsageError
from relloc.pretext.alarm import Diverged
from relloc.pretext.stopping import StopRequest, stop_request
from relloc.runs import build, saving, training
from relloc.runs.command_settings import Pretraining
from relloc.runs.engine import resolve_engine
from relloc.runs.pretraining import make_plan, make_task
from relloc.runs.settings import conf_dir
from relloc.runs.training import Training, train_to_the_end

WORDS = (
    *("data.source.tiles=[0.4]", "data.source.stride=0.5", "recipe.images_per_step=16"),
    *("recipe.images_per_batch_norm=16", "grid.patch_px=16", "grid.gap_px=4", "grid.jitter_px=2"),
    *(
        "grid.resize.px=64",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "schedule.milestone_epochs=[1]",
    ),
    *("device=cpu", "workers=0", "monitor.every_epochs=null", "eval=[]", "tracking=none"),
)


CURRICULUM = ("curriculum=linear", "curriculum.gap_px=0", "curriculum.treated=0.5")


def composed(*words: str) -> Pretraining:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.pretraining(compose("train", [*WORDS, *words]))


@pytest.fixture(scope="module")
def settings() -> Pretraining:
    return composed()


@pytest.fixture(scope="module")
def data(settings: Pretraining) -> Splits:
    return settings.data.read()


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with stop_request() as request:
        yield request


def prepared(settings: Pretraining, data: Splits, run_dir: Path, stop: StopRequest) -> Training:
    engine = resolve_engine(settings.engine)
    plan = make_plan(settings, data, engine)
    task = make_task(
        settings, engine, steps_per_epoch=plan.steps_per_epoch, accumulation=plan.accumulation
    )
    return Training(
        settings=settings,
        engine=engine,
        data=data,
        task=task,
        plan=plan,
        identity=settings.identity,
        milestones=saving.milestone_steps(settings.milestones, task),
        run_dir=run_dir,
        stop=stop,
    )


@pytest.mark.parametrize(
    "words", [(), (*CURRICULUM, "pretext_flip=0.5")], ids=["plain", "curriculum"]
)
def test_stopped_after_each_step_it_ends_as_if_never_stopped(
    words: tuple[str, ...], data: Splits, tmp_path: Path, stop: StopRequest
) -> None:
    settings = composed(*words)
    whole = prepared(settings, data, tmp_path / "whole", stop)
    train_to_the_end(whole, whole.task.start(), None)
    expected = whole.task.model.state_dict()
    assert whole.task.steps > 2
    for step in range(1, whole.task.steps + 1):
        part = prepared(settings, data, tmp_path / "parts", stop)
        begun = saving.resume(part.identity, part.task, part.run_dir)
        assert begun.step == step - 1
        stop.signal = 15
        with pytest.raises(SystemExit) as left:
            train_to_the_end(part, begun, None)
        assert left.value.code == 128 + 15
        stop.signal = None
    found = part.task.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # What is done is not done again.
    last = prepared(settings, data, tmp_path / "parts", stop)
    done = saving.resume(last.identity, last.task, last.run_dir)
    train_to_the_end(last, done, None)
    assert done.step == whole.task.steps


@pytest.mark.parametrize(("workers", "at_once", "n_ghosts"), [(0, 512, 4), (2, 8, 2), (2, 3, 1)])
def test_decoded_on_a_cpu_as_device_it_ends_with_the_same_weights(
    data: Splits,
    tmp_path: Path,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    at_once: int,
    n_ghosts: int,
) -> None:
    words = ("recipe.images_per_batch_norm=4", "images_per_forward=16", "pretext_flip=0.5")
    settings = composed(*words)
    usual = prepared(settings, data, tmp_path, stop)
    train_to_the_end(usual, usual.task.start(), None)
    monkeypatch.setattr(training, "_DECODED_AT_ONCE", at_once)
    engine = dataclasses.replace(settings.engine, workers=workers)
    given = dataclasses.replace(settings, decode="device", engine=engine)
    run = prepared(given, data, tmp_path, stop)
    assert training._ghosts_decoded_at_once(run.plan) == n_ghosts
    train_to_the_end(run, run.task.start(), None)
    expected = usual.task.model.state_dict()
    found = run.task.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_of_the_training_are_mirrored(
    data: Splits, tmp_path: Path, stop: StopRequest
) -> None:
    batches = []
    for flip in (0, 1):
        run = prepared(composed(f"pretext_flip={flip}"), data, tmp_path, stop)
        feed = training._feed(run, 0, Unreadable(n_images=len(data.train), most_share=0))
        batches.append(next(iter(feed)).clone())
    plain, mirrored = batches
    assert torch.equal(mirrored, plain.flip(-1))


def test_a_training_that_diverges_says_what_was_saved_and_what_to_try(
    settings: Pretraining,
    data: Splits,
    tmp_path: Path,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverging(*_given: object, **_named: object) -> int:
        raise Diverged("the loss is nan at step 3")

    monkeypatch.setattr(training, "train", diverging)
    run = prepared(settings, data, tmp_path, stop)
    with pytest.raises(UsageError, match=r"loss is nan.*no checkpoint.*optimizer\.lr"):
        train_to_the_end(run, run.task.start(), None)
    assert not states.saved_trainings(tmp_path)


def test_too_little_memory_names_fewer_images_that_fit(
    settings: Pretraining,
    data: Splits,
    tmp_path: Path,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_room(*_given: object, **_named: object) -> int:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "train", without_room)
    asked = dataclasses.replace(settings, images_per_step=64, images_per_forward=64)
    run = prepared(asked, data, tmp_path, stop)
    with pytest.raises(UsageError, match=r"64 images.*images_per_forward=32\b"):
        train_to_the_end(run, run.task.start(), None)


def test_too_many_unreadable_images_end_it(
    settings: Pretraining,
    data: Splits,
    tmp_path: Path,
    stop: StopRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: object, *_given: object) -> None:
        raise training_error

    from relloc.errors import UnreadableImage

    training_error = UnreadableImage("is an empty file")
    monkeypatch.setattr(type(data.train), "read_crop", broken, raising=False)
    monkeypatch.setattr(type(data.train), "read", broken, raising=False)
    run = prepared(settings, data, tmp_path, stop)
    with pytest.raises(DataError, match="is an empty file"):
        train_to_the_end(run, run.task.start(), None)
