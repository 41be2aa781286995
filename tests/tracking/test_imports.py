"""A sync in a thread imports nothing: in fresh processes with a new file, an old one, servers."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from relloc.tracking import add_artifact, write_status

NewRun = Callable[..., Path]
# Notes which modules are imported before and after a thread sends a run and samples the load.
CODE = """
import json, pathlib, sys, threading
from relloc.tracking.imports import import_for
from relloc.tracking.mlflow import sync
from relloc.tracking.store import StoreError
from relloc.tracking.system import SystemMetrics

run_dir, uri, result = pathlib.Path(sys.argv[1]), sys.argv[2], {}
import_for(uri)
samples = SystemMetrics(run_dir, every_s=0.01)
before = set(sys.modules)

def send():
    try:
        result["points"] = sync(run_dir, uri).points
    except StoreError as error:
        result["error"] = str(error)

sender = threading.Thread(target=send)
sender.start()
sender.join()
samples.stop()
result["imported"] = sorted(set(sys.modules) - before)
print(json.dumps(result))
"""


def sent_by_a_fresh_process(run_dir: Path, uri: str) -> dict[str, Any]:
    (run_dir / "notes.txt").write_text("notes")
    add_artifact(run_dir, "notes.txt")
    write_status(run_dir, "RUNNING")
    command = [sys.executable, "-c", CODE, str(run_dir), uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class MLflow(BaseHTTPRequestHandler):
    """As much of MLflow's REST API as sending a run takes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        run = {
            "info": {
                "run_id": "1" * 32,
                "experiment_id": "1",
                "lifecycle_stage": "active",
                "status": "RUNNING",
            },
            "data": {},
        }
        run["info"]["artifact_uri"] = "mlflow-artifacts:/1/1/artifacts"
        experiment = {"experiment_id": "1", "name": "relloc", "lifecycle_stage": "active"}
        answers = {
            "experiments/get-by-name": {"experiment": experiment},
            "runs/search": {},
            "runs/create": {"run": run},
            "runs/get": {"run": run},
            "runs/update": {"run_info": run["info"]},
        }
        asked = self.path.partition("?")[0].partition("/mlflow/")[2]
        body = json.dumps(answers.get(asked, {})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), MLflow) as serving:
        threading.Thread(target=serving.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.slow
def test_sending_to_a_server_imports_nothing_in_the_thread(server: str, new_run: NewRun) -> None:
    assert sent_by_a_fresh_process(new_run(), server) | {"points": 6} == {
        "points": 6,
        "imported": [],
    }


@pytest.mark.slow
def test_a_server_that_is_down_imports_nothing_in_the_thread(new_run: NewRun) -> None:
    done = sent_by_a_fresh_process(new_run(), "http://127.0.0.1:9")
    assert "no answer" in done["error"]
    assert done["imported"] == []


@pytest.mark.slow
def test_sending_to_a_file_imports_nothing_in_the_thread(
    uri: str, new_run: NewRun, tmp_path: Path
) -> None:
    for number, address in enumerate((f"sqlite:///{tmp_path}/fresh/mlflow.db", uri)):
        done = sent_by_a_fresh_process(new_run(f"run{number}"), address)
        assert done["points"] >= 6
        assert done["imported"] == []


@pytest.mark.slow
def test_sending_to_a_folder_of_files_imports_nothing_in_the_thread(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = sent_by_a_fresh_process(new_run(), f"file://{tmp_path}/mlruns")
    assert done["points"] >= 6
    assert done["imported"] == []
