"""The command that asks a person: killed, gone on with, ended, and what it leaves."""

import http.client
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from commands import Command, start

from relloc.results import read_results

LINE = ("study=human", "data.source.tiles=[0.4]", "data.source.stride=0.5")


def started(tmp_path: Path, environment: dict[str, str], folder: str, *more: str) -> Command:
    words = (*LINE, "tracking=none", f"hydra.run.dir={folder}", "workers=0", *more)
    return start("relloc.study", *words, folder=tmp_path, environment=environment)


def send(command: Command, path: str, content: dict[str, Any] | None) -> dict[str, Any]:
    """What the page of a running command answers to a request, once it is there."""
    assert command.wait_for(lambda: re.search(r"http://\S+/ in", command.text)), command.text
    found = re.search(r"http://([^/]+)/([^/]+)/ in", command.text)
    assert found is not None
    connection = http.client.HTTPConnection(found[1], timeout=60)
    method = "GET" if content is None else "POST"
    body = None if content is None else json.dumps(content)
    connection.request(method, f"/{found[2]}/{path}", body, {"Content-Type": "application/json"})
    reply = json.loads(connection.getresponse().read())
    connection.close()
    return reply


def answer(command: Command, place: int) -> dict[str, Any]:
    number = send(command, "state", None)["question"]
    return send(command, "answer", {"question": number, "answer": place, "seconds": 1})


def test_a_person_is_killed_goes_on_and_is_measured(tmp_path, environment):
    killed = started(tmp_path, environment, "asked", "study.human.n_questions=5")
    first_pair = send(killed, "state", None)
    answer(killed, 0)
    answer(killed, 1)
    assert killed.kill() == -signal.SIGKILL
    assert read_results(tmp_path / "asked") == []

    # The same command asks what is left, and pauses at Ctrl-C.
    paused = started(tmp_path, environment, "asked", "study.human.n_questions=5")
    third_pair = send(paused, "state", None)
    assert (third_pair["answered"], third_pair["total"]) == (2, 5)
    assert third_pair["center"] != first_pair["center"]
    answer(paused, 2)
    os.kill(paused.pid, signal.SIGINT)
    assert paused.wait() == 130
    assert "3 answers saved" in paused.text
    assert "to resume" in paused.text
    assert "nothing had been saved" not in paused.text

    finishing = started(tmp_path, environment, "asked", "study.human.n_questions=5")
    assert answer(finishing, 3)["answered"] == 4
    assert answer(finishing, 4)["over"]
    assert finishing.wait() == 0, finishing.text
    rows = {row.metric: row for row in read_results(tmp_path / "asked")}
    assert {"accuracy", "median_seconds"} <= set(rows)
    assert {(row.eval, row.kind, row.checkpoint) for row in rows.values()} == {
        ("human", "study", "person")
    }
    folder = tmp_path / "asked" / "evaluations"
    [file] = folder.glob("answers_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["answer"] for line in lines] == [0, 1, 2, 3, 4]
    right = [line["answer"] == line["label"] for line in lines]
    assert rows["accuracy"].value == 100 * sum(right) / 5
    assert (folder / f"human_{rows['accuracy'].fingerprint}" / "confusion.png").is_file()

    # What was measured in this folder is not asked again; in another folder it is.
    again = started(tmp_path, environment, "asked", "study.human.n_questions=5")
    assert again.wait() == 0
    assert "http://" not in again.text
    other = started(tmp_path, environment, "other", "study.human.n_questions=5")
    assert send(other, "state", None)["answered"] == 0
    answer(other, 7)
    assert send(other, "finish", {})["over"]
    assert other.wait() == 0
    assert "1 pair right" in other.text


def test_a_person_is_asked_once_for_several_checkpoints(tmp_path, environment):
    first = started(tmp_path, environment, "asked", "study.human.n_questions=1")
    assert answer(first, 5)["over"]
    assert first.wait() == 0
    words = ("study.human.n_questions=1", "checkpoint=random", "model=small")
    second = started(tmp_path, environment, "asked", *words)
    assert second.wait() == 0
    assert "http://" not in second.text
    rows = [row for row in read_results(tmp_path / "asked") if row.metric == "accuracy"]
    # Random weights have no head that answers: these are the person's answers once more.
    assert [(row.checkpoint, row.model) for row in rows] == [("person", "")] * 2
    assert len({row.value for row in rows}) == 1
    # A third time nothing is added.
    third = started(tmp_path, environment, "asked", *words)
    assert third.wait() == 0
    again = [row for row in read_results(tmp_path / "asked") if row.metric == "accuracy"]
    assert again == rows
