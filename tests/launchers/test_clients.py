"""SLURM's commands with what sites print beside their answers; tests write them as scripts."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra_plugins.relloc_launchers import clients
from hydra_plugins.relloc_launchers.clients import (
    Job,
    cancel,
    largest_array,
    new_token,
    read_sbatch,
    states,
    submit,
    wait_for_sbatch,
)
from hydra_plugins.relloc_launchers.environment import cluster_of, environment_for
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from relloc.errors import Interrupted, UsageError
from relloc.status import Status

TOKEN = "relloc-0123456789ab"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of SLURM's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def write(commands: Path, name: str, does: str) -> None:
    (commands / name).write_text(f'#!/bin/sh\necho "{name} $*" >> asked\n{does}\n')
    (commands / name).chmod(0o755)


def asked() -> list[str]:
    return Path("asked").read_text().splitlines()


@pytest.mark.parametrize(
    "text", ["42", "42_3", "42_3@mpp2", "42@mpp2", TOKEN, f"{TOKEN}_3", f"{TOKEN}_3@a,b"]
)
def test_a_job_is_read_as_it_is_written(text: str) -> None:
    job = Job.parse(text)
    assert str(job) == text
    assert job.name == text.partition("@")[0]
    assert job.is_token == text.startswith("relloc")


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("Submitted batch job 43\n", "43"),
        ("Submitted batch job 43 on cluster mpp2\n", "43@mpp2"),
        ("20418660\n", "20418660"),
        ("20418660;mpp2\n", "20418660@mpp2"),
        (
            "--- Welcome, 17 users are here ---\n"
            "sbatch: 2 nodes\n"
            "Submitted batch job 43\n"
            "Maintenance on 2026-12-01\n",
            "43",
        ),
        ("Quota: 30 of 100\n20418660\n", "20418660"),
        ("Your last job 41 used 12 h\nSubmitted batch job 43\n", "43"),
    ],
)
def test_sbatchs_answer_is_found_among_other_lines(answer: str, job: str) -> None:
    assert str(read_sbatch(answer)) == job


def test_a_cluster_that_was_asked_for_is_the_jobs_unless_slurm_chose_among_several() -> None:
    assert str(read_sbatch("Submitted batch job 43", "mpp2")) == "43@mpp2"
    assert str(read_sbatch("Submitted batch job 43 on cluster b", "a,b")) == "43@b"
    assert str(read_sbatch("Submitted batch job 43", "a,b")) == "43"
    assert cluster_of({"clusters": "x"}, {"SBATCH_CLUSTERS": "y"}) == "x"
    assert cluster_of({}, {"SBATCH_CLUSTERS": "y"}) == "y"
    assert cluster_of({}, {}) is None


@pytest.mark.parametrize(("queue", "job"), [(f"77|PENDING|n|{TOKEN}", "77"), ("", "42")])
def test_an_answer_in_another_language_is_looked_up_in_the_queue_first(
    commands: Path, queue: str, job: str
) -> None:
    write(commands, "sbatch", "echo 'Aviso: 3 de 4 nodos'; echo 'Trabajo 42 enviado'")
    write(commands, "squeue", f"echo '{queue}'")
    taken, _ = submit(
        Path("script"),
        token=TOKEN,
        environment={"PATH": str(commands)},
        cluster=None,
        lock=Path("lock"),
    )
    assert str(taken) == job


def test_an_answer_without_a_number_leaves_the_token(commands: Path) -> None:
    write(commands, "sbatch", "echo ok; echo 'watch your quota' >&2")
    write(commands, "squeue", "exit 1")
    taken, told = submit(
        Path("script"),
        token=TOKEN,
        environment={"PATH": str(commands)},
        cluster="a",
        lock=Path("lock"),
    )
    assert (str(taken), told) == (f"{TOKEN}@a", "watch your quota")


def test_a_refusal_and_not_knowing_are_two_things(commands: Path) -> None:
    write(commands, "squeue", "exit 0")
    write(commands, "sbatch", "echo 'sbatch: error: Invalid partition' >&2; exit 1")
    # By its module: Hydra executes the modules of plugins once more when it looks for plugins.
    with pytest.raises(clients.NotTaken, match="Invalid partition"):
        submit(
            Path("script"),
            token=TOKEN,
            environment={"PATH": str(commands)},
            cluster=None,
            lock=Path("lock"),
        )
    late = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    write(commands, "sbatch", f"echo '{late}' >&2; exit 1")
    with pytest.raises(Interrupted):
        submit(
            Path("script"),
            token=TOKEN,
            environment={"PATH": str(commands)},
            cluster=None,
            lock=Path("lock"),
        )
    write(commands, "squeue", f"echo '42_1|RUNNING|n|{TOKEN}'")
    taken, _ = submit(
        Path("script"),
        token=TOKEN,
        environment={"PATH": str(commands)},
        cluster=None,
        lock=Path("lock"),
    )
    assert str(taken) == "42"


@pytest.mark.slow
def test_an_sbatch_that_outlives_its_command_is_waited_for(commands: Path) -> None:
    write(
        commands, "sbatch", "kill -9 $PPID; sleep 2; touch registered; echo Submitted batch job 42"
    )
    asks = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from hydra_plugins.relloc_launchers.clients import submit\n"
        f"submit(Path('script'), token='{TOKEN}', environment=os.environ, cluster=None, "
        "lock=Path('lock'))"
    )
    done = subprocess.run([sys.executable, "-c", asks], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for_sbatch(Path("lock"))
    assert Path("registered").exists()


def test_jobs_are_found_among_lines_of_others(commands: Path) -> None:
    lines = (
        *(
            "Maintenance on Friday | all day",
            "",
            "42_0|RUNNING",
            "42_1|PENDING|name|a|b",
            "42_[2-3,5%2]|PENDING|n|",
        ),
        *("42_4|COMPLETED|n|c", "7|COMPLETING|relloc_gaps_x|c", "squeue: 12|what", "8|SUSPENDED"),
    )
    write(commands, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    numbers = [f"42_{task}" for task in range(6)]
    found = states([*numbers, "7", "8", "12"])
    waiting = dict.fromkeys(("42_1", "42_2", "42_3", "42_5"), Status.WAITING)
    assert found == {"42_0": Status.RUNNING, "7": Status.RUNNING, "8": Status.RUNNING, **waiting}


def test_a_queue_in_a_format_of_the_sites_own_loses_no_job(commands: Path) -> None:
    table = (
        "JOBID PARTITION NAME USER ST TIME NODES",
        " 42_0 main relloc_g me  R 0:10 1 n1",
        "42_[1-2] main relloc_g me PD 0:00 1",
    )
    write(
        commands,
        "squeue",
        "\n".join(f"echo '{line}'" for line in (*table, "42_3 main relloc_g me CD 0:10 1")),
    )
    assert states([f"42_{task}" for task in range(4)]) == {
        "42_0": Status.RUNNING,
        "42_1": Status.WAITING,
        "42_2": Status.WAITING,
    }


def test_a_token_finds_its_jobs_by_comment_and_by_name(commands: Path) -> None:
    write(
        commands,
        "squeue",
        f"echo '42_1|RUNNING|n|{TOKEN}'; echo '43|PENDING|mine_relloc-aaaaaaaaaaaa|mine'",
    )
    asking = [f"{TOKEN}_0", f"{TOKEN}_1", "relloc-aaaaaaaaaaaa", "relloc-bbbbbbbbbbbb"]
    assert states(asking) == {f"{TOKEN}_1": Status.RUNNING, "relloc-aaaaaaaaaaaa": Status.WAITING}
    write(commands, "scancel", "")
    cancel(asking)
    assert asked()[-1] == "scancel 42_1 43"


def test_each_cluster_is_asked_for_its_jobs(commands: Path) -> None:
    does = (
        'case "$*" in '
        '*--clusters=mpp2*) echo "CLUSTER: mpp2"; echo "43_0|RUNNING";; '
        '*) echo "43_1|RUNNING";; esac'
    )
    write(commands, "squeue", does)
    assert states(["43_0@mpp2", "43_1@mpp2", "43_1", "43_0"]) == {
        "43_0@mpp2": Status.RUNNING,
        "43_1": Status.RUNNING,
    }
    write(commands, "scancel", "")
    cancel(["43_0@mpp2", "43_1"])
    assert set(asked()[-2:]) == {"scancel --clusters=mpp2 43_0", "scancel 43_1"}


def test_the_users_defaults_for_squeue_hide_no_job(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    write(commands, "squeue", '[ -z "$SQUEUE_PARTITION" ] && echo "42|RUNNING"')
    assert states(["42"]) == {"42": Status.RUNNING}


def test_jobs_that_were_ended_by_hand_are_told_from_others_that_are_over(commands: Path) -> None:
    lines = ("42_0|CANCELLED|n|c", "42_1|FAILED|n|c", "42_2|RUNNING|n|c", f"43|CANCELLED|n|{TOKEN}")
    write(commands, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    found = {"42_0": Status.CANCELLED, "42_2": Status.RUNNING, TOKEN: Status.CANCELLED}
    assert states(["42_0", "42_1", "42_2", TOKEN]) == found


def test_an_array_that_is_shown_without_its_tasks_stands_for_them(commands: Path) -> None:
    lines = ("42|RUNNING|n|c", "43|COMPLETED|n|c", "44|CANCELLED|n|c", "44_0|COMPLETED|n|c")
    write(commands, "squeue", "\n".join(f"echo '{line}'" for line in lines))
    found = {"42_0": Status.RUNNING, "42_1": Status.RUNNING, "44_1": Status.CANCELLED}
    assert states(["42_0", "42_1", "43_0", "44_0", "44_1"]) == found


def test_a_notice_of_an_error_beside_jobs_hides_none(commands: Path) -> None:
    write(commands, "squeue", "echo 'squeue: error: a plugin' >&2; echo '42|RUNNING|n|c'")
    assert states(["42"]) == {"42": Status.RUNNING}


_TROUBLE = "slurm_load_jobs error: Unable to contact slurm controller"


@pytest.mark.parametrize(
    "does",
    ["echo slurm_load_jobs error >&2; exit 1", f"echo {_TROUBLE} >&2", f"echo {_TROUBLE}", None],
)
def test_a_queue_that_does_not_answer_is_no_empty_queue(commands: Path, does: str | None) -> None:
    if does is not None:
        write(commands, "squeue", does)
    else:
        (commands / "squeue").mkdir()
        (commands.parent / "elsewhere").mkdir()
    with pytest.raises(UsageError, match="SLURM .*jobs"):
        states_without_others(commands)


def states_without_others(commands: Path) -> None:
    """With no other squeue to be found than the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(commands))
        states(["42"])


def test_the_largest_array_is_asked_where_it_can_be(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(commands, "scontrol", "echo 'MaxArraySize            = 1001'; echo 'MaxJobCount = 10000'")
    assert largest_array(None) == 1001
    write(commands, "scontrol", "exit 1")
    assert largest_array(None) is None


SCRIPT = (
    "#!/bin/bash\n"
    "#SBATCH --partition=a\n"
    "#SBATCH --time=60\n"
    "#SBATCH --gres=gpu:4\n"
    "#SBATCH --mem-per-gpu=8G\n"
)


def test_the_users_variables_reach_sbatch_but_for_what_the_script_decides() -> None:
    for_sbatch = {
        "SBATCH_ACCOUNT": "prof",
        "SBATCH_QOS": "q",
        "SBATCH_RESERVATION": "r",
        "SLURM_CONF": "/c",
        "HOME": "/h",
    }
    overruled = {
        "SBATCH_PARTITION": "b",
        "SBATCH_TIMELIMIT": "5",
        "SBATCH_MEM_PER_NODE": "4G",
        "SBATCH_GPUS": "1",
    }
    overruled |= {"SBATCH_ARRAY_INX": "0-3", "SBATCH_WAIT": "1", "SBATCH_GRES": "gpu:1"}
    others = {"SUBMITIT_X": "1", "RANK": "0"}
    kept, gave_way = environment_for(SCRIPT, {**for_sbatch, **overruled, **others})
    assert kept == for_sbatch
    assert gave_way == sorted(f"{name}={value}" for name, value in overruled.items())


def test_nothing_of_a_job_leaks_into_one_that_it_submits() -> None:
    of_job = {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_MEM_PER_NODE": "4",
        "SRUN_DEBUG": "3",
        "SLURMD_NODENAME": "n",
    }
    kept = {"SLURM_CONF": "/c", "SBATCH_ACCOUNT": "prof"}
    assert environment_for(SCRIPT, {**of_job, "SBATCH_CPU_BIND": "x", **kept}) == (kept, [])
    outside = {"SLURM_NTASKS": "4"}
    assert environment_for(SCRIPT, outside)[0] == outside


def test_a_job_inherits_the_users_folder_of_compiled_code_but_not_torchs_own() -> None:
    own = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    assert environment_for(SCRIPT, own) == ({}, [])
    name = Path(default_cache_dir()).name
    by_user = {"TORCHINDUCTOR_CACHE_DIR": f"/scratch/of a user/{name}"}
    assert environment_for(SCRIPT, by_user) == (by_user, [])


def test_tokens_differ() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    assert Job.parse(new_token()).is_token
