"""A training and a watcher beside it, in processes of their own."""

import os
import signal
from pathlib import Path

from commands import start
from test_whole_path import SMALL
from tiny import TINY

from relloc.results import read_results
from relloc.tracking import open_store, read_note
from relloc.tracking.watched import read_watched

VIEW = ("view.short_px=64", "view.crop_px=56")


def test_a_watcher_evaluates_what_a_training_saves_and_goes_on_after_ctrl_c(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # By default the newest checkpoint is saved too rarely for a run this short: milestones are.
    training = start(
        "relloc.train",
        *TINY,
        *SMALL,
        "schedule.epochs=4",
        "milestones=[1,2,3]",
        "hydra.run.dir=runs/trained",
        folder=tmp_path,
        environment=environment,
    )
    trained = tmp_path / "runs/trained"
    assert training.wait_for((trained / "run.json").exists), training.text

    words = ("watch=runs/trained", "watch_every_s=0.2", "eval=[knn]", "batch_norm=as_trained")
    command = ("relloc.evaluate", *words, *VIEW, "hydra.run.dir=runs/watcher")
    watcher = start(*command, folder=tmp_path, environment=environment)
    assert watcher.wait_for(lambda: read_watched(trained)), watcher.text
    os.kill(watcher.pid, signal.SIGINT)
    # It may have come to its end meanwhile.
    assert watcher.wait() in (128 + signal.SIGINT, 0), watcher.text

    again = start(*command, folder=tmp_path, environment=environment)
    assert again.wait() == 0, again.text
    assert training.wait() == 0, training.text

    # Four epochs of 8 steps: three milestones, and the weights at the end
    watched = read_watched(trained)
    assert {each.step for each in watched} == {8, 16, 24, 32}
    rows = read_results(tmp_path / "runs/watcher")
    assert len(rows) == len(set(rows))
    assert len({row.checkpoint for row in rows}) == 4
    final = [row for row in read_results(trained) if row.eval == "knn"]
    assert {row.value for row in final} == {
        each.result.value for each in watched if each.step == 32
    }

    note = read_note(trained)
    assert note is not None
    client = open_store(note.uri)
    history = client.get_metric_history(note.run_id, "watch/knn/feature4/top1_k20")
    points = [(point.step, point.value) for point in history]
    curve = [
        (each.step, each.result.value)
        for each in watched
        if (each.result.layer, each.result.metric) == ("feature4", "top1_k20")
    ]
    assert sorted(points) == curve
