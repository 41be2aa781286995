import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from waiting import wait_until

from relloc.tracking import Journal, Mirror, StoreError, mirror, open_store, read_note, search, sync

NewRun = Callable[..., Path]
DEAD = "http://127.0.0.1:9"


def stored_steps(run_dir: Path, uri: str) -> list[int]:
    note = read_note(run_dir)
    history = open_store(uri).get_metric_history(note.run_id, "train/loss") if note else []
    return sorted(point.step for point in history)


def test_mlflow_follows_while_training_goes_on_and_gets_the_rest_at_the_end(
    uri: str, new_run: NewRun
) -> None:
    run_dir, warnings = new_run(), []
    follower = Mirror(run_dir, uri, warn=warnings.append, every_s=0.05)
    follower.start()
    wait_until(lambda: stored_steps(run_dir, uri) == [0, 10, 20])
    journal = Journal(run_dir)
    journal.log({"train/loss": 1.0}, 30)
    wait_until(lambda: stored_steps(run_dir, uri) == [0, 10, 20, 30])
    assert search(uri, "relloc")[0]["status"] == "RUNNING"
    journal.log({"train/loss": 0.5}, 40)
    assert follower.close("FINISHED") is None
    assert stored_steps(run_dir, uri) == [0, 10, 20, 30, 40]
    assert search(uri, "relloc")[0]["status"] == "FINISHED"
    assert warnings == []


def test_a_resumed_run_goes_back_to_running(uri: str, new_run: NewRun) -> None:
    run_dir = new_run()
    first = Mirror(run_dir, uri, warn=pytest.fail)
    first.start()
    assert first.close("KILLED") is None
    second = Mirror(run_dir, uri, warn=pytest.fail)
    second.start()
    wait_until(lambda: search(uri, "relloc")[0]["status"] == "RUNNING")
    assert second.close("FINISHED") is None
    assert len(search(uri, "relloc")) == 1


def test_a_dead_server_costs_one_warning_and_one_message_and_nothing_is_lost(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CLOSE_IN_TROUBLE_S", 120.0)
    run_dir, warnings = new_run(), []
    follower = Mirror(run_dir, DEAD, warn=warnings.append, every_s=0.01)
    follower.start()
    wait_until(lambda: follower._failures >= 3)
    start = time.monotonic()
    message = follower.close("FINISHED")
    assert time.monotonic() - start < 60
    assert message is not None
    assert "Nothing is lost" in message
    assert f"no answer from {DEAD}" in message
    assert message.endswith(f"python -m relloc.sync {run_dir} --uri {DEAD}")
    assert len(warnings) == 1
    assert f"no answer from {DEAD}" in warnings[0]
    assert sync(run_dir, uri).points == 6
    assert stored_steps(run_dir, uri) == [0, 10, 20]
    assert search(uri, "relloc")[0]["status"] == "FINISHED"


def test_attempts_grow_rarer(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def fail(*_: object) -> None:
        times.append(time.monotonic())
        raise StoreError("down")

    monkeypatch.setattr(mirror, "sync", fail)
    follower = Mirror(new_run(), DEAD, warn=lambda _: None, every_s=0.05)
    follower.start()
    wait_until(lambda: len(times) == 5)
    follower.close("FAILED")
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert all(pause >= 0.05 * 2**failures for failures, pause in enumerate(pauses[:4], start=1))


def test_a_store_that_comes_back_gets_everything(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, warnings, down = new_run(), [], threading.Event()
    down.set()

    def flaky(folder: Path, address: str) -> object:
        if down.is_set():
            raise StoreError("disk is full")
        return sync(folder, address)

    monkeypatch.setattr(mirror, "sync", flaky)
    follower = Mirror(run_dir, uri, warn=warnings.append, every_s=0.01)
    follower.start()
    wait_until(lambda: warnings)
    down.clear()
    wait_until(lambda: stored_steps(run_dir, uri) == [0, 10, 20])
    assert follower.close("FINISHED") is None
    assert len(warnings) == 1
    assert "disk is full" in warnings[0]


def test_a_store_that_hangs_does_not_hold_up_the_end(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hang(*_: object) -> None:
        release.wait(120)
        raise StoreError("too late")

    monkeypatch.setattr(mirror, "sync", hang)
    follower = Mirror(new_run(), DEAD, warn=lambda _: None)
    follower.start()
    start = time.monotonic()
    message = follower.close("FINISHED", timeout_s=0.2)
    assert time.monotonic() - start < 60
    release.set()
    # Its last attempt must still find the replaced sync, which goes with this test.
    wait_until(lambda: not follower._thread.is_alive())
    assert message is not None
    assert "longer than 0.2 s" in message


@pytest.fixture
def slow_server() -> Iterator[str]:
    """It says that it is well, and leaves all other questions open."""
    enough = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                enough.wait(60)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        enough.set()
        server.shutdown()


@pytest.mark.slow
def test_a_server_too_slow_to_answer_is_one_warning_and_one_message(
    slow_server: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run_dir, warnings = new_run(), []
    follower = Mirror(run_dir, slow_server, warn=warnings.append, every_s=0.01)
    follower.start()
    journal = Journal(run_dir)
    start = time.monotonic()
    for step in range(30, 230):
        journal.log({"train/loss": 1.0}, step)
    assert time.monotonic() - start < 60, "training waits for the server"
    wait_until(lambda: warnings)
    message = follower.close("FINISHED")
    assert message is not None
    assert "timed out" in message
    assert f"python -m relloc.sync {run_dir} --uri {slow_server}" in message
    assert len(warnings) == 1


def test_a_full_disk_costs_no_point_and_no_point_twice(
    uri: str, new_run: NewRun, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, warnings = new_run(), []
    journal = Journal(run_dir)
    for step in range(30, 430):
        journal.log({f"m{number}": float(step) for number in range(10)}, step)
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path(uri.removeprefix("sqlite:///")).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500_000, hard))
    try:
        follower = Mirror(run_dir, uri, warn=warnings.append)
        follower.start()
        message = follower.close("FINISHED")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert message is not None
    assert "Nothing is lost" in message
    assert len(warnings) == 1
    assert "disk" in warnings[0]
    assert "Traceback" not in capfd.readouterr().err
    note = read_note(run_dir)
    assert note is not None
    assert 0 < note.lines < 403, "part of it was sent"
    sync(run_dir, uri)
    for number in range(10):
        history = open_store(uri).get_metric_history(note.run_id, f"m{number}")
        assert sorted(point.step for point in history) == list(range(30, 430))


def test_a_broken_database_is_only_a_message(new_run: NewRun, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database\n" * 50)
    warnings: list[str] = []
    follower = Mirror(new_run(), f"sqlite:///{tmp_path}/mlflow.db", warn=warnings.append)
    follower.start()
    message = follower.close("FAILED")
    assert message is not None
    assert "file is not a database" in message
    assert len(warnings) == 1


def test_a_mirror_that_never_began_says_so(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_uri: str) -> None:
        raise ImportError("No module named 'mlflow'")

    monkeypatch.setattr(mirror, "import_for", missing)
    warnings: list[str] = []
    follower = Mirror(new_run(), DEAD, warn=warnings.append)
    follower.start()
    message = follower.close("FINISHED")
    assert message is not None
    assert "No module named 'mlflow'" in message
    assert len(warnings) == 1


PAGE, JSON = {"Content-Type": "text/html"}, {"Content-Type": "application/json"}
ANSWERS = {
    "page": (200, PAGE, b"<!DOCTYPE html>\n<html>\x1b[31mSign in</html>"),
    "page without a name": (200, {}, b"<!DOCTYPE html>\n<html>\x1b[31mSign in</html>"),
    "sent to itself": (302, {"Location": "/health"}, b""),
    "unauthorized": (401, {}, b"who are you?"),
    "forbidden": (403, PAGE, b"<html>no</html>"),
    "lost": (404, {}, b""),
    "broken": (500, {}, b"Traceback (most recent call last):\n" * 30),
    "no gateway": (502, PAGE, b"<html>\n</html>"),
    "nothing": (200, {}, b""),
    "half": (200, JSON, b'{"experiment": '),
    "a list": (200, JSON, b"[]"),
    "an empty object": (200, JSON, b"{}"),
    "another object": (200, JSON, b'{"experiment": 3}'),
    "no number": (200, JSON, b'{"experiment": {"experiment_id": NaN}}'),
    "not text": (200, JSON, b"\xff\xfe{"),
    "deep": (200, JSON, b"[" * 100_000),
    "odd error": (400, JSON, b'{"error_code": 3, "message": ["\\u001b[31m"]}'),
    "hung up": (0, {}, b""),
}


@pytest.fixture
def odd_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """It answers every question alike."""
    status, headers, body = ANSWERS[request.param]

    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if status:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("odd_server", ANSWERS, indirect=True)
def test_whatever_a_server_answers_is_one_line_and_training_goes_on(
    odd_server: str, new_run: NewRun
) -> None:
    run_dir, warnings = new_run(), []
    follower = Mirror(run_dir, odd_server, warn=warnings.append)
    follower.start()
    message = follower.close("FINISHED")
    assert message is not None
    assert f"python -m relloc.sync {run_dir} --uri {odd_server}" in message
    assert len(warnings) == 1
    assert odd_server in warnings[0]
    assert warnings[0].isprintable()


def test_a_server_without_https_is_told(new_run: NewRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(StoreError, match="SSLError"):
            sync(new_run(), f"https://127.0.0.1:{listener.getsockname()[1]}")


def test_a_file_outside_of_the_folder_is_told_once(
    uri: str, new_run: NewRun, tmp_path: Path
) -> None:
    run_dir, warnings = new_run(), []
    (tmp_path / "key").write_text("secret")
    (run_dir / "artifacts.json").write_text('["../key"]')
    follower = Mirror(run_dir, uri, warn=warnings.append, every_s=0.01)
    follower.start()
    wait_until(lambda: warnings)
    assert follower.close("FINISHED") is None
    assert len(warnings) == 1
    assert "../key" in warnings[0]
