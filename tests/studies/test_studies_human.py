import contextlib
import csv
import dataclasses
import http.client
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked_networks import (
    GRID,
    STILL,
    Certain,
    Constant,
    Linear,
    asked_context,
    image_files,
    pretext,
)
from contexts import MadeContext
from made_questions import made_questions
from omegaconf import OmegaConf
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from relloc.errors import DamagedFile, DataError, UsageError
from relloc.features.source import EncodeConfig
from relloc.geometry import NEIGHBORS, PatchGrid, ShortSide
from relloc.patches.color import Drop, Gray, Keep, Project
from relloc.pretext.held_out import accuracy
from relloc.pretext.questions import POSITIONS
from relloc.results import Score
from relloc.runs.settings import conf_dir
from relloc.studies.human.comparison import compare, kappa, replies_of
from relloc.studies.human.questions import Question, make_questions, network_answers
from relloc.studies.human.server import PageTexts, QuestionServer, serving
from relloc.studies.human.session import GivenAnswer, Session, WrongAnswer
from relloc.studies.human.study import PUBLISHED_GRID, Human

CONFIG = EncodeConfig(
    batch=16, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0.5
)
STUDY = Human(
    person="anna",
    n_questions=12,
    split="held_out",
    grid=GRID,
    color=Keep(),
    feedback=False,
    port=0,
)


def made(images: Any, n: int = 10, **changes: Any) -> list[Question]:
    settings = {"grid": GRID, "color": Keep(), "seed": 3, "config": CONFIG}
    return make_questions(images, n, **settings | changes)


# Questions


def test_a_question_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    images = image_files(tmp_path, 7)
    questions = made(images, 20)
    assert [question.number for question in questions] == list(range(20))
    config = dataclasses.replace(CONFIG, workers=2)
    for other in (made(images, 20, config=config), made(images, 25)[:20]):
        for one, same in zip(questions, other, strict=True):
            assert (one.label, one.source) == (same.label, same.source)
            assert one.patches.equal(same.patches)
    # Each image once before any comes again, at another place
    first = [question.source for question in questions[:7]]
    assert sorted(first) == sorted(images.paths)
    assert sorted(question.source for question in questions[7:14]) == sorted(images.paths)
    assert first != sorted(first)
    assert len({question.label for question in questions}) > 4
    others = made(images, 20, seed=4)
    assert [question.label for question in others] != [question.label for question in questions]


def test_patches_are_cut_as_the_grid_says(tmp_path: Path) -> None:
    images = image_files(tmp_path, 1)
    # The image keeps its size, so that patches can be found in it.
    grid = dataclasses.replace(STILL, resize=None)
    [question] = made(images, 1, grid=grid)
    pixels = torch.from_numpy(np.array(images.read(0))).permute(2, 0, 1)
    windows = pixels.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)
    corners = []
    for patch in question.patches:
        [corner] = (windows == patch).all(dim=(2, 3, 4)).nonzero().tolist()
        corners.append(corner)
    top, left = corners[0]
    assert corners == [
        [top + 12 * row, left + 12 * column] for row in range(3) for column in range(3)
    ]
    assert question.center.equal(question.patches[4])
    assert question.neighbor.equal(question.patches[NEIGHBORS[question.label]])


def test_a_color_treatment_changes_what_the_person_sees_and_nothing_else(tmp_path: Path) -> None:
    images = image_files(tmp_path, 4)
    plain = made(images)
    assert all(question.shown.equal(question.patches) for question in plain)
    for color in (Gray(p=1, weights="luma"), Project(), Drop(noise="gaussian")):
        treated = made(images, color=color)
        for one, other in zip(plain, treated, strict=True):
            assert one.patches.equal(other.patches)
            assert one.label == other.label
            assert not other.shown.equal(other.patches)
    gray = made(images, color=Gray(p=1, weights="luma"))[0].shown
    assert gray[:, 0].equal(gray[:, 2])


def test_questions_about_broken_images_are_left_out(tmp_path: Path) -> None:
    images = image_files(tmp_path, 6, broken=(1, 4))
    questions = made(images, 9)
    assert len(questions) == 9
    assert not {images.paths[1], images.paths[4]} & {question.source for question in questions}
    numbers = [question.number for question in questions]
    assert numbers == sorted(set(numbers))
    assert [question.number for question in made(images, 4)] == numbers[:4]
    every = dataclasses.replace(CONFIG, unreadable_share=1.0)
    with pytest.raises(DataError):
        made(image_files(tmp_path, 2, broken=(0, 1)), 3, config=every)


def test_a_network_is_asked_about_the_same_pixels(tmp_path: Path) -> None:
    images = image_files(tmp_path, 5)
    questions = made(images, 6)
    model = pretext(Linear())
    found = network_answers(model, questions, seed=3, batch=4, config=CONFIG)
    for question, answers in zip(questions, found, strict=True):
        patches = model.patches.normalize(question.patches[None].float())
        logits = model.network(patches)[0, question.label]
        assert torch.allclose(answers, logits.softmax(dim=0), atol=1e-5)
    # Its colors are those of its training, drawn for each question by itself.
    dropping = pretext(Linear(), color=Drop(noise="gaussian"))
    one = network_answers(dropping, questions, seed=3, batch=4, config=CONFIG)
    alone = network_answers(dropping, questions[4:5], seed=3, batch=1, config=CONFIG)
    assert torch.allclose(one[4], alone[0], atol=1e-5)
    assert not torch.allclose(one, found, atol=1e-3)
    right = network_answers(pretext(Certain()), questions, seed=3, batch=4, config=CONFIG)
    assert right.argmax(dim=1).tolist() == [question.label for question in questions]


# The session


def session_of(folder: Path, n: int = 4, **more: Any) -> Session:
    return Session(made_questions(n), folder / "answers.jsonl", person="anna", seed=7, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "answers.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_on_disk_one_by_one_and_another_session_goes_on(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    assert session.current is not None
    session.answer(0, 5, 1.25)
    assert lines(tmp_path) == [
        {
            "question": 0,
            "label": 0,
            "answer": 5,
            "seconds": 1.25,
            "at": lines(tmp_path)[0]["at"],
            "person": "anna",
            "seed": 7,
            "image": "0.jpg",
        }
    ]
    session.answer(1, 3, 2)
    # A killed process may leave half a line, which counts for nothing.
    with open(session.file, "a") as file:
        file.write('{"question": 2')
    again = session_of(tmp_path)
    assert [each.answer for each in again.answers] == [5, 3]
    assert again.current is again.questions[2]
    again.answer(2, 0, 0.5)
    again.answer(3, 0, 0.5)
    assert again.is_over
    assert len(lines(tmp_path)) == 4
    assert session_of(tmp_path).is_over
    # More questions go on; fewer leave the later answers out.
    assert not session_of(tmp_path, n=5).is_over
    assert len(session_of(tmp_path, n=3).answers) == 3


@pytest.mark.parametrize(
    ("number", "answer", "seconds"),
    [
        (1, 0, 1.0),
        (0, 8, 1.0),
        (0, -1, 1.0),
        (0, 0, -1.0),
        (0, 0, math.nan),
        (0, 0, math.inf),
        (0, 0, 1e9),
    ],
)
def test_what_is_no_answer_is_not_taken(
    tmp_path: Path, number: int, answer: int, seconds: float
) -> None:
    session = session_of(tmp_path)
    with pytest.raises(WrongAnswer):
        session.answer(number, answer, seconds)
    assert not session.file.exists()
    assert session.current is session.questions[0]


def test_a_session_is_finished_only_with_an_answer(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    with pytest.raises(WrongAnswer):
        session.finish()
    session.answer(0, 0, 1)
    session.finish()
    assert session.is_over
    with pytest.raises(WrongAnswer):
        session.answer(1, 0, 1)


@pytest.mark.parametrize(
    "changes", [{"label": 1}, {"answer": 8}, {"answer": "1"}, {"seed": None}, {"more": 1}]
)
def test_a_file_of_other_answers_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    session_of(tmp_path).answer(0, 5, 1)
    [line] = lines(tmp_path)
    (tmp_path / "answers.jsonl").write_text(json.dumps(line | changes) + "\n")
    with pytest.raises(DamagedFile, match="answers.jsonl line 1"):
        session_of(tmp_path)


def test_of_answers_that_arrive_together_one_is_taken(tmp_path: Path) -> None:
    session = session_of(tmp_path, n=1)
    taken: list[int] = []

    def try_to_answer(answer: int) -> None:
        try:
            session.answer(0, answer, 1)
        except WrongAnswer:
            return
        taken.append(answer)

    threads = [threading.Thread(target=try_to_answer, args=(each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert [each["answer"] for each in lines(tmp_path)] == taken


# The server


TEXTS = PageTexts(person="anna", images="photos held_out", feedback=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QuestionServer]:
    with serving(session_of(tmp_path), TEXTS, 0, "study.human.port") as started:
        yield started


def ask_server(
    server: QuestionServer,
    path: str,
    content: Any = None,
    *,
    token: str | None = None,
    raw: bytes | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of the reply; a POST where content is given."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    own = server.token if token is None else token
    body = raw if raw is not None else None if content is None else json.dumps(content).encode()
    kinds = {"Content-Type": "application/json"} if body is not None else {}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", f"/{own}/{path}", body, kinds | names)
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return found


def test_the_state_has_the_pair_and_never_the_right_answer(server: QuestionServer) -> None:
    status, headers, content = ask_server(server, "state")
    state = json.loads(content)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert set(state) == {
        *("person", "images", "feedback", "answered", "total", "over"),
        *("question", "center", "neighbor"),
    }
    assert state["center"].startswith("data:image/png;base64,")
    assert "label" not in ask_server(server, "answer", answer_to(0))[2].decode()


def answer_to(number: int, answer: Any = 2, seconds: Any = 1.5) -> dict[str, Any]:
    return {"question": number, "answer": answer, "seconds": seconds}


def test_answers_are_taken_in_order_and_the_last_one_ends_the_session(
    server: QuestionServer,
) -> None:
    for number in range(4):
        assert not server.over.is_set()
        status, _, content = ask_server(server, "answer", answer_to(number))
        assert (status, json.loads(content)["answered"]) == (200, number + 1)
    assert json.loads(content)["over"]
    assert server.over.wait(60)
    status, _, content = ask_server(server, "answer", answer_to(3))
    assert (status, json.loads(content)["answered"]) == (409, 4)


def test_a_session_can_be_ended_before(server: QuestionServer) -> None:
    assert ask_server(server, "finish", {})[0] == 409
    assert not server.over.is_set()
    ask_server(server, "answer", answer_to(0))
    assert ask_server(server, "finish", {})[0] == 200
    assert server.over.wait(60)


def test_right_answers_are_told_where_that_is_set(tmp_path: Path) -> None:
    texts = dataclasses.replace(TEXTS, feedback=True)
    with serving(session_of(tmp_path), texts, 0, "port") as server:
        content = json.loads(ask_server(server, "answer", answer_to(0))[2])
    assert (content["label"], content["answer"]) == (0, 2)


@pytest.mark.parametrize(
    "content",
    [
        answer_to(1),
        answer_to(0, answer=8),
        answer_to(0, answer=True),
        answer_to(0, answer="2"),
        answer_to(0, answer=2.0),
        answer_to(0, seconds=None),
        answer_to(0, seconds=10**400),
        {},
    ],
)
def test_wrong_answers_are_refused_and_leave_the_question(
    server: QuestionServer, content: dict[str, Any]
) -> None:
    assert ask_server(server, "answer", content)[0] == 409
    assert server.session.answers == []


@pytest.mark.parametrize(
    "raw", [b"", b"no json", b"[1]", b"nan", b'{"a":' * 900, b'{"a": "' + b"a" * 5000 + b'"}']
)
def test_what_is_no_json_object_of_a_page_is_refused(server: QuestionServer, raw: bytes) -> None:
    assert ask_server(server, "answer", raw=raw)[0] == 400
    assert ask_server(server, "answer", answer_to(0), Content_Type="text/plain")[0] == 400
    assert server.session.answers == []


def test_only_who_knows_the_address_is_served(server: QuestionServer, tmp_path: Path) -> None:
    port = server.server_address[1]
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 20
    for token in ("", "x", server.token[:-1], server.token + "x"):
        for path in ("", "state"):
            assert ask_server(server, path, token=token)[0] == 404
        assert ask_server(server, "answer", answer_to(0), token=token)[0] == 404
    # Another name for this machine, which a page of another site may have
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}", ""):
        assert ask_server(server, "state", Host=host)[0] == 403
    assert ask_server(server, "state", Host=f"localhost:{port}")[0] == 200
    for path in ("other", "../state", "state/", "page.html"):
        assert ask_server(server, path)[0] == 404
    assert ask_server(server, "state", {})[0] == 404
    assert server.session.answers == []
    with serving(session_of(tmp_path), TEXTS, 0, "port") as other:
        assert other.token != server.token


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_other_script(
    server: QuestionServer,
) -> None:
    status, headers, content = ask_server(server, "")
    page = content.decode()
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert (headers["Referrer-Policy"], headers["Cache-Control"]) == ("no-referrer", "no-store")
    assert "//" not in page.replace("// ", "")  # no address
    assert "innerHTML" not in page
    assert "{nonce}" not in page
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2
    assert nonce not in ask_server(server, "")[2].decode()


def test_a_full_disk_is_told_and_the_question_stays(
    server: QuestionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("relloc.studies.human.session.append_lines", no_room)
        status, _, content = ask_server(server, "answer", answer_to(0))
    assert status == 507
    assert "No space left" in json.loads(content)["problem"]
    assert ask_server(server, "answer", answer_to(0))[0] == 200


def test_a_port_that_is_taken_is_refused_by_its_setting(
    server: QuestionServer, tmp_path: Path
) -> None:
    port = server.server_address[1]
    with (
        pytest.raises(UsageError, match=rf"study\.human\.port is {port}"),
        serving(session_of(tmp_path), TEXTS, port, "study.human.port"),
    ):
        pass


def test_a_connection_opened_in_advance_gives_no_answer_after_the_end(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    with serving(session, TEXTS, 0, "port") as server:
        port = server.server_address[1]
        early = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        early.connect()
        # Connections are accepted in order: once another one is answered, the first has a thread.
        assert ask_server(server, "state")[0] == 200
    body = json.dumps(answer_to(0))
    with contextlib.closing(early), pytest.raises(ConnectionError):
        early.request("POST", f"/{server.token}/answer", body, {"Content-Type": "application/json"})
        early.getresponse()
    assert session.answers == []


# Comparison


def given(labels: list[int], answers: list[int]) -> list[GivenAnswer]:
    found = []
    for number, (label, answer) in enumerate(zip(labels, answers, strict=True)):
        one = GivenAnswer(
            question=number,
            label=label,
            answer=answer,
            seconds=1.0,
            at="",
            person="a",
            seed=0,
            image=f"{number // 3}.jpg",
        )
        found.append(one)
    return found


def test_accuracy_agreement_and_confusions_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=90)
    answers = np.where(rng.uniform(size=90) < 0.4, labels, rng.integers(8, size=90))
    of_network = np.where(rng.uniform(size=90) < 0.5, answers, rng.integers(8, size=90))
    person = replies_of(given(labels.tolist(), answers.tolist()))
    network = dataclasses.replace(person, answers=of_network)
    assert person.confusion().tolist() == confusion_matrix(labels, answers).tolist()
    assert kappa(answers, of_network) == pytest.approx(cohen_kappa_score(answers, of_network))
    share = person.share("all")
    assert share is not None
    assert share.percent == pytest.approx(100 * (labels == answers).mean())
    assert (share.pairs, share.images) == (90, 30)
    assert share.low < share.percent < share.high
    by_position = person.by_position()
    assert by_position["up"].percent == pytest.approx(100 * (answers == 1)[labels == 1].mean())
    found = {score.metric: score for score in compare(person, network)}
    right = 100 * ((labels == answers).mean() - (labels == of_network).mean())
    assert found["accuracy_difference"].value == pytest.approx(right)
    assert found["agreement"].value == pytest.approx(100 * (answers == of_network).mean())
    assert found["kappa"].value == pytest.approx(kappa(answers, of_network))
    assert found["agreement"].low is not None


def test_intervals_of_whole_images_are_those_of_the_network_s_accuracy() -> None:
    # Eight questions an image, as the network's own interval counts them
    answers = [0] * 8 + [1] * 8 + [2] * 8
    sources = ["a"] * 8 + ["b"] * 8 + ["c"] * 8
    replies = dataclasses.replace(replies_of(given([0] * 24, answers)), sources=sources)
    share = replies.share("all")
    expected = accuracy(torch.tensor([8, 0, 0]), ["a", "b", "c"])
    assert share is not None
    assert (share.percent, share.low, share.high) == pytest.approx(
        (expected.percent, expected.low, expected.high)
    )


def test_kappa_is_not_defined_where_both_always_say_the_same() -> None:
    ones = np.ones(5, dtype=np.int64)
    assert math.isnan(kappa(ones, ones))
    person = replies_of(given([1] * 5, [1] * 5))
    assert "kappa" not in {score.metric for score in compare(person, person)}


# The study


def measured(
    study: Human, made_context: MadeContext, answer: Callable[[Question], int], stop_after: int = 99
) -> tuple[list[Score], list[str]]:
    """The scores and printed lines of a study whose person answers through the server."""
    printed: list[str] = []

    def respond(line: str) -> None:
        printed.append(line)
        if "http://" not in line:
            return
        address = line.partition("http://")[2].split()[0]
        host, token, _ = address.split("/")

        def send(path: str, content: dict[str, Any]) -> dict[str, Any]:
            connection = http.client.HTTPConnection(host, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"/{token}/{path}", json.dumps(content), headers)
            found = json.loads(connection.getresponse().read())
            connection.close()
            return found

        def play() -> None:
            state = send("answer", answer_to(-1))  # refused: it tells what is asked
            for _ in range(stop_after):
                if state["over"]:
                    return
                question = by_number[state["question"]]
                state = send("answer", answer_to(question.number, answer(question)))
            send("finish", {})

        threading.Thread(target=play).start()

    images = made_context.splits.held_out
    grid = study.grid or (made_context.pretext.patches.grid if made_context.pretext else GRID)
    questions = make_questions(
        images,
        study.n_questions,
        grid=grid,
        color=study.color,
        seed=made_context.seed,
        config=CONFIG,
    )
    by_number = {question.number: question for question in questions}
    with_printer = dataclasses.replace(made_context, print_line=respond)
    return list(study.run(with_printer)), printed


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_person_beside_chance_and_a_network(tmp_path: Path) -> None:
    images = image_files(tmp_path, 8)
    folder = tmp_path / "run" / "evaluations" / "human_1"
    network = Constant(9.0, *([0.0] * 7))  # always up left
    made_context = asked_context(images, pretext(network), folder)
    found, printed = measured(STUDY, made_context, lambda question: question.label // 4 * 7)
    by_metric = {score.metric: score for score in found}
    labels = [question.label for question in made(images, 12, seed=0)]
    answers = [label // 4 * 7 for label in labels]
    right = [label == answer for label, answer in zip(labels, answers, strict=True)]
    headline = by_metric["accuracy"]
    assert headline.headline
    assert headline.value == pytest.approx(100 * np.mean(right))
    assert headline.low is not None
    assert headline.variant == "person anna"
    assert "12 pairs" in headline.details
    # The network had no part in what the person answered, but says which pairs these are of.
    by_person = {name for name, score in by_metric.items() if score.of_person}
    by_position = {f"accuracy_{POSITIONS[label]}" for label in labels}
    assert by_person == {"accuracy", "median_seconds", *by_position}
    asked = f"the network of {made_context.checkpoint} was asked about the same pairs"
    assert by_person == {name for name, score in by_metric.items() if asked in score.details}
    assert "in the colors of its training" in by_metric["network_accuracy"].details[-1]
    assert by_metric["network_accuracy"].value == pytest.approx(100 * labels.count(0) / 12)
    assert by_metric["agreement"].value == pytest.approx(100 * answers.count(0) / 12)
    assert by_metric["median_seconds"].value == 1.5
    for position in {POSITIONS[label] for label in labels}:
        assert f"accuracy_{position}" in by_metric
    assert len([line for line in printed if "http://127.0.0.1:" in line]) == 1
    assert any("12.5 %" in line for line in printed)
    rows = table(folder / "answers.csv")
    assert [row["answer"] for row in rows] == [POSITIONS[answer] for answer in answers]
    assert {row["network_answer"] for row in rows} == {"up_left"}
    assert {path.name for path in folder.iterdir()} == {
        *("answers.csv", "by_position.csv", "confusion.csv", "confusion.png"),
        *("network_confusion.csv", "network_confusion.png"),
    }
    assert "network_percent" in table(folder / "by_position.csv")[0]


def test_answers_are_asked_for_once_for_all_checkpoints(tmp_path: Path) -> None:
    images = image_files(tmp_path, 8)
    evaluations = tmp_path / "run" / "evaluations"
    first = asked_context(images, None, evaluations / "human_1", checkpoint="person")
    alone, printed = measured(STUDY, first, lambda question: question.label)
    assert all(score.of_person for score in alone)
    assert not any("network" in detail for score in alone for detail in score.details)
    assert "network_accuracy" not in {score.metric for score in alone}
    assert "network_answer" not in table(evaluations / "human_1" / "answers.csv")[0]
    second = asked_context(images, pretext(Certain()), evaluations / "human_2")
    beside, printed = measured(STUDY, second, lambda question: 1 // 0)
    assert not any("http://" in line for line in printed)
    assert {score.metric: score.value for score in beside}["agreement"] == 100
    # Another person, and other questions, have answers of their own.
    for other in (
        dataclasses.replace(STUDY, person="ben"),
        dataclasses.replace(STUDY, color=Project()),
        dataclasses.replace(STUDY, feedback=True),
    ):
        _, printed = measured(other, second, lambda question: 0)
        assert any("http://" in line for line in printed)
    assert len(list(evaluations.glob("answers_*.jsonl"))) == 4


def test_who_ends_before_is_measured_on_what_was_answered(tmp_path: Path) -> None:
    images = image_files(tmp_path, 8)
    made_context = asked_context(images, pretext(Certain()), tmp_path / "a" / "b" / "c")
    found, _ = measured(STUDY, made_context, lambda question: question.label, stop_after=5)
    by_metric = {score.metric: score for score in found}
    assert "5 pairs" in by_metric["accuracy"].details
    assert by_metric["network_accuracy"].value == 100
    assert len(table(made_context.folder / "answers.csv")) == 5


def test_an_interrupted_session_goes_on(tmp_path: Path) -> None:
    images = image_files(tmp_path, 8)
    made_context = asked_context(images, None, tmp_path / "a" / "b" / "c")
    printed: list[str] = []

    def interrupt(line: str) -> None:
        printed.append(line)
        if "http://" not in line:
            return
        # One answer is given before the interruption.
        address = line.partition("http://")[2].split()[0]
        host, token, _ = address.split("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        headers = {"Content-Type": "application/json"}
        state_path = f"/{token}/answer"
        connection.request("POST", state_path, json.dumps(answer_to(-1)), headers)
        number = json.loads(connection.getresponse().read())["question"]
        connection.request("POST", state_path, json.dumps(answer_to(number)), headers)
        connection.getresponse().read()
        connection.close()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(STUDY.run(dataclasses.replace(made_context, print_line=interrupt)))
    assert "hydra.run.dir" in printed[-1]
    assert "1 answer " in printed[-1]
    found, _ = measured(STUDY, made_context, lambda question: 0)
    assert found[0].metric == "accuracy"


def test_an_interrupted_session_without_answers_names_no_file_of_answers(tmp_path: Path) -> None:
    made_context = asked_context(image_files(tmp_path, 8), None, tmp_path / "a" / "b" / "c")
    printed: list[str] = []

    def interrupt(line: str) -> None:
        printed.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(STUDY.run(dataclasses.replace(made_context, print_line=interrupt)))
    # That nothing is saved is said by the run folder.
    assert len(printed) == 1
    assert not list(tmp_path.rglob("answers_*"))


def test_the_grid_is_that_of_the_network_or_the_published_one(tmp_path: Path) -> None:
    conf = OmegaConf.load(conf_dir() / "grid" / "mmselfsup.yaml")
    resize = ShortSide(px=conf.resize.px)
    assert conf.resize._target_.endswith(".ShortSide")
    jitter = (conf.jitter_px[0], conf.jitter_px[1])
    published = PatchGrid(
        patch_px=conf.patch_px, gap_px=conf.gap_px, jitter_px=jitter, resize=resize
    )
    assert published == PUBLISHED_GRID
    images = image_files(tmp_path, 4)
    study = dataclasses.replace(STUDY, grid=None)
    own = asked_context(images, pretext(Certain()), tmp_path / "a" / "b" / "c")
    found, _ = measured(study, own, lambda question: question.label)
    assert found[0].value == 100
    wide = dataclasses.replace(
        study, grid=PatchGrid(patch_px=9, gap_px=0, jitter_px=0, resize=None)
    )
    with pytest.raises(UsageError, match="study.human.grid.patch_px is 9"):
        next(wide.run(own))


def test_what_decides_no_number_is_no_part_of_what_is_measured() -> None:
    assert repr(STUDY) == repr(dataclasses.replace(STUDY, port=8123))
    assert repr(STUDY) != repr(dataclasses.replace(STUDY, person="ben"))
    assert not STUDY.repeatable
    assert STUDY.batch_norms(["recalibrated"]) == ("as_trained",)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("person", ""),
        ("person", " "),
        ("person", None),
        ("person", True),
        ("person", "a\nb"),
        ("person", "a" * 61),
        ("n_questions", 0),
        ("split", "test"),
        ("grid", "wide"),
        ("color", "gray"),
        ("feedback", 1),
        ("port", -1),
        ("port", 65536),
        ("port", "any"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting: str, value: object) -> None:
    wrong = dataclasses.replace(STUDY)
    object.__setattr__(wrong, setting, value)  # the type checker of tests would be first
    with pytest.raises(UsageError, match=f"study.human.{setting} is "):
        wrong.__post_init__()


def test_a_name_of_a_person_that_looks_like_a_formula_is_drawn(tmp_path: Path) -> None:
    images = image_files(tmp_path, 4)
    study = dataclasses.replace(STUDY, person="$\\frac$", n_questions=2)
    made_context = asked_context(images, None, tmp_path / "a" / "b" / "c")
    measured(study, made_context, lambda question: 0)
    assert os.path.getsize(made_context.folder / "confusion.png") > 1000
