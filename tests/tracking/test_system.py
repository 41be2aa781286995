import functools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_until

from relloc.tracking import Mirror, RunRecord, mirror, open_store, read_journal, read_note, system
from relloc.tracking.journal import SYSTEM_FILE
from relloc.tracking.system import SystemMetrics

NewRun = Callable[..., Path]


def sampled(run_dir: Path, count: int = 1) -> None:
    wait_until(lambda: len(read_journal(run_dir, file=SYSTEM_FILE)) >= count)


def test_the_machine_is_followed_and_mlflow_gets_it_in_its_own_names(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = new_run()
    monkeypatch.setattr(mirror, "SystemMetrics", functools.partial(SystemMetrics, every_s=0.05))
    follower = Mirror(run_dir, uri, warn=pytest.fail)
    follower.start()
    sampled(run_dir)
    assert follower.close("FINISHED") is None
    noted = read_journal(run_dir, file=SYSTEM_FILE)
    metrics = noted[-1].metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert {"system/disk_usage_percentage", "system/network_receive_megabytes"} <= set(metrics)
    note = read_note(run_dir)
    assert note is not None
    stored = open_store(uri).get_metric_history(note.run_id, "system/cpu_utilization_percentage")
    assert [point.step for point in stored] == [entry.step for entry in noted]
    assert [entry.step for entry in read_journal(run_dir)] == [
        0,
        10,
        20,
    ]  # training's journal is its own


def test_a_run_that_goes_on_adds_to_what_was_noted(new_run: NewRun) -> None:
    run_dir = new_run(started_ms=1_700_000_000_000)
    for count in (1, 2):
        following = SystemMetrics(run_dir, every_s=0.02)
        sampled(run_dir, count)
        following.stop()
    steps = [entry.step for entry in read_journal(run_dir, file=SYSTEM_FILE)]
    assert steps == sorted(set(steps))
    age_s = (
        read_journal(run_dir, file=SYSTEM_FILE)[0].time_ms // 1000
        - RunRecord.read(run_dir).started_ms // 1000
    )
    assert abs(steps[0] - age_s) <= 60  # of years; a busy machine notes them apart


def test_what_the_machine_does_not_tell_is_left_out(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise AttributeError(
            "'NoneType' object has no attribute 'bytes_recv'"
        )  # psutil without a network

    monkeypatch.setattr(
        "mlflow.system_metrics.metrics.network_monitor.NetworkMonitor.__init__", broken
    )
    monkeypatch.setattr(
        "mlflow.system_metrics.metrics.disk_monitor.DiskMonitor.collect_metrics", broken
    )
    monkeypatch.setattr(system, "MONITORS", {**system.MONITORS, "no_monitor": "NoMonitor"})
    run_dir = new_run()
    following = SystemMetrics(run_dir, every_s=0.02)
    sampled(run_dir)
    following.stop()
    parts = {name.split("_")[0] for name in read_journal(run_dir, file=SYSTEM_FILE)[0].metrics}
    assert "system/cpu" in parts
    assert not parts & {"system/disk", "system/network"}


def test_a_damaged_file_is_named_and_ends_no_training(uri: str, new_run: NewRun) -> None:
    run_dir, warnings = new_run(), []
    (run_dir / SYSTEM_FILE).write_text("garbage\n")
    follower = Mirror(run_dir, uri, warn=warnings.append)
    follower.start()
    assert len(warnings) == 1
    assert f"{run_dir / SYSTEM_FILE} line 1 " in warnings[0]
    assert "Nothing is lost" in (follower.close("FINISHED") or "")


def test_a_driver_that_does_not_answer_is_not_waited_for(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def silent(_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            answer.wait(60)

    monkeypatch.setattr(
        "mlflow.system_metrics.metrics.disk_monitor.DiskMonitor.collect_metrics", silent
    )
    monkeypatch.setattr(system, "STOP_S", 0.1)
    following = SystemMetrics(new_run(), every_s=0.01)
    assert asked.wait(60)
    following.stop()
    assert not answer.is_set()
    answer.set()
