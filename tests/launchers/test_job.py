"""A point's command inside of a SLURM job, with submitit's own handler of signals.

What submitit and Hydra's launcher for it do to jobs, and the tests that fail if it comes back.
Those without a file are here; S is tests/slurm/test_sweeps_on_slurm.py, which has a SLURM.

 1. A task that failed counts as completed, with its traceback in no log.
      S: a_failing_point_is_named_with_its_log_and_command_and_the_others_finish;
      a_command_that_fails_fails_its_job
 2. A job that leaves no result (cancelled, lost with its node) hides the results of later jobs.
      S: a_cancelled_point_hides_no_other_and_the_sweep_goes_on_without_its_command
 3. Code and configs are those of the moment at which a job starts, not at which it was submitted.
      S: jobs_run_the_code_and_configs_of_their_submission;
      test_sweeps.py: the_copy_of_the_code_wins_over_any_other;
      tests/sweeps: a_copy_of_the_code_is_shared_until_something_changes
 4. Forked readers inherit submitit's handlers, and at a signal of SLURM each queues the job again.
      commands_inherit_no_handler;
      S: a_job_that_the_cluster_takes_goes_on_to_the_same_bits, with a reader
 5. A cluster may preempt without the signal that submitit waits for: SIGTERM, and soon SIGKILL.
      S: a_job_that_the_cluster_takes_goes_on_to_the_same_bits (scontrol requeue does the same);
      a_point_whose_node_dies_goes_on_on_another_to_the_same_bits;
      a_killed_process_is_started_again_in_its_job
 6. What is queued again is the same call, and the task is not asked for its state.
      a_signal_has_the_command_save_before_the_job_is_queued_again;
      S: the tests that end in the same bits
 7. At its time limit a job is not queued again unless that is allowed; when it was often enough, an
    exception is raised inside of the task, which may swallow it.
      used_up_starts_end_the_job_after_saving; S: a_job_at_its_time_limit_saves_and_is_queued_again
 8. Each of several tasks runs as if it were alone: all write the same files.
      S: two_nodes_train_together_and_a_killed_rank_starts_the_job_again;
      tests/runs/test_runs_start_command.py: other_ranks_write_in_a_folder_that_goes
 9. Resolvers, and whatever __main__ holds, travel to the job in a pickle of Hydra's state.
      nothing_of_hydra_is_pickled;
      test_sweeps.py: a_launcher_that_pickles_hydra_is_refused_before_anything_is_started
10. Under torchrun each process names its run folder itself, after its own clock.
      tests/flow/test_train.py: two_processes_share_one_run_folder
"""

import importlib
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, UncompletedJobError

# submitit leaves the job by an exception, before it has waited for the command, which has ended.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

SAVING = """
import pathlib, signal, sys, time
names = ("SIGTERM", "SIGCONT", "SIGUSR1", "SIGUSR2")
handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
inherited = [name for name, handler in handlers.items() if handler is not signal.SIG_DFL]
def save(number, _frame):
    time.sleep(0.3)
    pathlib.Path("saved").write_text(f"inherited: {inherited}")
    sys.exit(128 + number)
signal.signal(signal.SIGUSR2, save)
pathlib.Path("started").touch()
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_NTASKS", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def job_module() -> Any:
    """The module as it is now: Hydra, in other tests, imports plugins again to look for them."""
    return importlib.import_module("hydra_plugins.relloc_launchers.job")


def job_of(script: str) -> DelayedSubmission:
    return DelayedSubmission(job_module().PointJob(), [sys.executable, "-c", script], {})


def signalled(job: DelayedSubmission) -> list[str]:
    """Runs a job, and submitit's handler once its command started; returns the steps."""
    did: list[str] = []

    def requeue(starts_left: int) -> None:
        did.append(
            f"{'saved' if Path('saved').exists() else 'unsaved'}, queued again, "
            f"{starts_left} starts left"
        )

    environment = SimpleNamespace(global_rank=0, _requeue=requeue)
    paths = SimpleNamespace(submitted_pickle=Path("submitted.pkl"))
    handler = SignalHandler(environment, paths, job)  # type: ignore[arg-type]
    before = signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)

    def send() -> None:
        end = time.monotonic() + 60
        # The command may be ahead of the process that started it, which does not know it yet.
        while not (Path("started").exists() and job.function._pid) and time.monotonic() < end:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        job.result()
    except SystemExit:
        did.append("left")
    except UncompletedJobError as error:
        did.append(f"{'saved' if Path('saved').exists() else 'unsaved'}, {error}")
    finally:
        sender.join()
        signal.signal(signal.SIGUSR2, before)
    return did


def test_a_signal_has_the_command_save_before_the_job_is_queued_again() -> None:
    job = job_of(SAVING)
    job.set_timeout(60, 2)
    assert signalled(job) == ["saved, queued again, 2 starts left", "left"]
    again = DelayedSubmission.load("submitted.pkl")
    assert isinstance(again.function, job_module().PointJob)
    assert again.args == job.args


def test_used_up_starts_end_the_job_after_saving() -> None:
    job = job_of(SAVING)
    job.set_timeout(0, 0)  # each signal counts as the time limit
    assert signalled(job) == ["saved, Job not requeued because: timed-out too many times."]


def test_commands_inherit_no_handler() -> None:
    job = job_of(SAVING)
    job.set_timeout(60, 2)
    signalled(job)
    assert Path("saved").read_text() == "inherited: []"


def test_a_command_that_fails_fails_its_job() -> None:
    with pytest.raises(job_module().PointFailed, match="exit code 3"):
        job_of("raise SystemExit(3)").result()


@pytest.mark.slow
def test_a_command_that_is_killed_starts_four_times_at_most(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(job_module().PointFailed, match="exit code -9"):
        job_of("import os; print('started', flush=True); os.kill(os.getpid(), 9)").result()
    assert capfd.readouterr().out.count("started") == 4


@pytest.mark.slow
def test_a_command_that_lost_a_reading_process_starts_again() -> None:
    job_of(
        "import pathlib; path = pathlib.Path('began'); again = path.exists(); path.touch(); "
        "exit(0 if again else 75)"
    ).result()
    assert Path("began").exists()


def test_only_starts_after_a_kill_count_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = job_module()
    asked: list[list[str]] = []
    monkeypatch.setattr(module.shutil, "which", lambda _: "scontrol")
    monkeypatch.setattr(module.subprocess, "run", lambda words, **_: asked.append(words))
    monkeypatch.setattr(module, "_LEFT_TO_SLURM_S", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = module._folder_of(["python", rf"hydra.run.dir='{tmp_path}/it\'s a run'"])
    assert folder == tmp_path / "it's a run"
    for start in (
        "5",
        "5",
        "8",
        "9",
    ):  # the others were preemptions; two tasks were killed in the first of these
        monkeypatch.setenv("SLURM_RESTART_COUNT", start)
        module._requeue(folder)
    assert asked == [["scontrol", "requeue", "7"]] * 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "10")
    with pytest.raises(module.PointFailed, match="often enough"):
        module._requeue(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # the point, submitted anew
    module._requeue(folder)
    assert len(asked) == 5


def test_nothing_of_hydra_is_pickled() -> None:
    pickled = cloudpickle.dumps(job_of("pass"))
    assert b"hydra_plugins.relloc_launchers.job" in pickled  # by name
    assert b"omegaconf" not in pickled
    assert b"__main__" not in pickled
    assert len(pickled) < 1000
