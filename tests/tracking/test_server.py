"""A server over a real PostgreSQL by launchers/tracking_server/serve.sh, also with a password."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
from waiting import wait_until, wait_until_served

from relloc.sync import main
from relloc.tracking import Journal, Mirror, add_artifact, open_store, read_note, search
from relloc.tracking.note import Note, write_note

pytestmark = pytest.mark.postgres

NewRun = Callable[..., Path]
SERVE = Path(__file__).parents[2] / "launchers" / "tracking_server" / "serve.sh"
PASSWORD = "a long enough password"
STEPS, NAMES = 400, [f"train/m{number}" for number in range(10)]


class Server:
    """What serve.sh serves from one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, password: str | None = None) -> None:
        self.password = password
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {
            "PATH": path,
            **({"MLFLOW_AUTH_ADMIN_PASSWORD": password} if password else {}),
        }
        named = (
            "--allowed-hosts",
            "login1:*,127.0.0.1:*",
            "--cors-allowed-origins",
            f"http://login1:{self.port}",
        )
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [SERVE, self.folder / "store", "--port", str(self.port), *named],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_until_served(self.uri, self.process, self.folder / "log")

    def end(self, number: int) -> int:
        """Send a signal to the script, or SIGKILL to all that it started; gives its exit code."""
        hit = [psutil.Process(self.process.pid)]
        for process in hit[0].children(recursive=True) if number == signal.SIGKILL else hit:
            process.send_signal(number)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory(prefix="relloc_server_") as folder:
        os.chmod(folder, 0o711)  # PostgreSQL may be another user, whom pytest's folders keep out
        served = Server(Path(folder))
        served.start()
        yield served
        assert served.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert not (served.folder / "store" / "db" / "postmaster.pid").exists()


def processes_of(server: Server) -> list[psutil.Process]:
    """All that serve.sh started for the folder, PostgreSQL too, and the script itself."""
    script = psutil.Process(server.process.pid)
    database = (server.folder / "store" / "db" / "postmaster.pid").read_text().split()[0]
    started = [script, *script.children(recursive=True), psutil.Process(int(database))]
    return [*started, *psutil.Process(int(database)).children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def asked(server: Server, host: str, origin: str | None = None, password: str | None = None) -> int:
    """The status of the answer to a client at that address, or to a browser's page of `origin`."""
    headers = {"Host": f"{host}:{server.port}"} | (
        {"Origin": f"http://{origin}:{server.port}"} if origin else {}
    )
    address = f"{server.uri}/api/2.0/mlflow/experiments/search"
    known = ("admin", password) if password else None
    return requests.post(
        address, json={"max_results": 1}, headers=headers, auth=known, timeout=60
    ).status_code


def test_only_named_hosts_and_this_machine_get_answers(server: Server) -> None:
    assert asked(server, "127.0.0.1") == 200
    assert asked(server, "login1", origin="login1") == 200  # a browser that opened the UI there
    assert asked(server, "login2") == 403
    assert asked(server, "login1", origin="elsewhere") == 403
    with pytest.raises(
        OSError, match="refused"
    ):  # a server that listens to all addresses answers here
        socket.create_connection(("127.0.0.2", server.port), timeout=60)


def test_a_second_server_of_the_folder_is_refused_and_leaves_the_first_alone(
    server: Server,
) -> None:
    second = subprocess.run(
        [SERVE, server.folder / "store"], capture_output=True, text=True, timeout=120
    )
    assert (second.returncode, second.stderr) == (
        1,
        f"{server.folder / 'store'} is served already\n",
    )
    assert open_store(server.uri).search_experiments()


def test_runs_arrive_with_their_files(
    server: Server, new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [new_run(f"arrives {number}", experiment="arrives") for number in range(2)]
    for run_dir in runs:
        (run_dir / "notes.txt").write_text(run_dir.name)
        add_artifact(run_dir, "notes.txt")
    assert main([*map(str, runs), "--uri", server.uri]) == 0
    assert capsys.readouterr().out.count("4 params, 6 points, 1 artifacts") == 2
    stored = search(server.uri, "arrives")
    assert {run["name"]: run["metrics"]["train/loss"] for run in stored} == {
        run_dir.name: 2.0 for run_dir in runs
    }
    files = list((server.folder / "store" / "artifacts").rglob("notes.txt"))
    assert sorted(file.read_text() for file in files) == sorted(run_dir.name for run_dir in runs)


def test_a_server_that_is_killed_and_comes_back_gets_each_point_once(
    server: Server,
    new_run: NewRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, warnings = new_run("killed", experiment="killed", tracking_uri=server.uri), []
    journal = Journal(run_dir)
    for step in range(STEPS):
        journal.log(dict.fromkeys(NAMES, step / 3), step)
    is_killed = threading.Event()

    def write_and_wait(folder: Path, note: Note) -> None:
        write_note(folder, note)
        # Of four batches the last is not sent before the server is killed.
        if note.lines >= STEPS * 3 // 4:
            is_killed.wait(600)

    monkeypatch.setattr("relloc.tracking.mlflow.write_note", write_and_wait)
    follower = Mirror(run_dir, server.uri, warn=warnings.append, every_s=0.05)
    follower.start()
    wait_until(lambda: (note := read_note(run_dir)) and note.lines > 0)
    assert server.end(signal.SIGKILL) == 128 + signal.SIGKILL
    is_killed.set()
    for step in range(STEPS, STEPS + 50):  # training goes on
        journal.log(dict.fromkeys(NAMES, step / 3), step)
    wait_until(lambda: warnings)
    message = follower.close("FINISHED")
    note = read_note(run_dir)
    assert note is not None
    assert note.lines < STEPS
    assert len(warnings) == 1
    assert message is not None
    assert f"python -m relloc.sync {run_dir} --uri {server.uri}" in message

    server.start(PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert main([str(run_dir)]) == 0
    client, again = open_store(server.uri), read_note(run_dir)
    assert again is not None
    assert again.run_id == note.run_id
    for name in NAMES:
        history = client.get_metric_history(note.run_id, name)
        assert sorted((point.step, point.value) for point in history) == [
            (n, n / 3) for n in range(STEPS + 50)
        ]
    (stored,) = search(server.uri, "killed")
    assert stored["status"] == "FINISHED"
    capsys.readouterr()
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{run_dir}: nothing new -> {server.uri}"


def restart_with_password(server: Server) -> None:
    if not server.password:
        server.end(signal.SIGTERM)
        server.start(PASSWORD)


def test_the_password_is_nowhere_but_as_a_hash(server: Server) -> None:
    restart_with_password(server)
    secret = PASSWORD.encode()
    processes = processes_of(server)
    assert len(processes) > 4
    for process in processes:
        for seen in ("environ", "cmdline"):
            assert secret not in Path(f"/proc/{process.pid}/{seen}").read_bytes(), process
    files = [file for file in server.folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if secret in file.read_bytes()]
    assert asked(server, "127.0.0.1", password=PASSWORD) == 200


@pytest.mark.parametrize(
    "killed", ["the script", "the script and MLflow", "the script and PostgreSQL", "all"]
)
def test_what_a_killed_script_left_is_ended_or_taken_over(server: Server, killed: str) -> None:
    restart_with_password(server)
    script, *others = processes_of(server)
    database = [process for process in others if "postgres" in process.name()]
    of_mlflow = [process for process in others if process not in database]
    hit = [script]
    if killed != "the script":
        hit += {
            "the script and MLflow": of_mlflow,
            "the script and PostgreSQL": database[:1],
            "all": others,
        }[killed]
    for process in hit:
        process.kill()
    server.process.wait(120)
    server.start()
    wait_until(lambda: not any(map(is_alive, of_mlflow)))
    wait_until_served(server.uri, server.process, server.folder / "log")  # by the new one
    assert asked(server, "127.0.0.1", password=PASSWORD) == 200
    server.password = PASSWORD  # the folder has one, given or not


def test_a_number_in_a_pid_file_that_is_another_process_by_now_holds_up_nothing(
    server: Server,
) -> None:
    restart_with_password(server)
    script, *others = processes_of(server)
    for process in (script, *others):
        process.kill()
    server.process.wait(120)
    pid_file = server.folder / "store" / "db" / "postmaster.pid"
    noted = pid_file.read_text().split("\n", 1)
    pid_file.write_text(f"{os.getpid()}\n{noted[1]}")
    server.start()
    server.password = PASSWORD
    assert asked(server, "127.0.0.1", password=PASSWORD) == 200


def test_without_a_password_nothing_is_sent_and_the_reason_is_told(
    server: Server,
    new_run: NewRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    restart_with_password(server)
    assert [
        asked(server, "127.0.0.1", password=password) for password in (None, "wrong", PASSWORD)
    ] == [401, 401, 200]
    run_dir = new_run(experiment="guarded", tracking_uri=server.uri)
    assert main([str(run_dir)]) == 1
    assert "You are not authenticated" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert main([str(run_dir)]) == 0
