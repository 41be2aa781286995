"""Keeps the answers of a person, one by one in a file, and knows which question comes next."""

import dataclasses
import datetime
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from relloc.errors import DamagedFile
from relloc.files import append_lines, parse_json, path_as_text, read_lines
from relloc.geometry import NEIGHBORS
from relloc.studies.human.questions import Question

_LONGEST_S = 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenAnswer:
    """A line of the file of answers.

    `question`: its number. `label`, `answer`: the right place and the person's, 0 to 7. `seconds`:
    from when the pair was shown to the answer. `at`: when it arrived, in UTC. `seed`: of the run.
    """

    question: int
    label: int
    answer: int
    seconds: float
    at: str
    person: str
    seed: int
    image: str

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    @property
    def is_right(self) -> bool:
        return self.answer == self.label


class WrongAnswer(ValueError):
    """An answer that can't be taken: to another question than is asked, or no answer at all."""


def utc_now() -> datetime.datetime:
    """Returns the time."""
    return datetime.datetime.now(datetime.UTC)


class Session:
    """The questions to one person, and the answers, which are on disk as soon as they are taken.

    Threads may share it.

    Args:
        questions: what is asked, in this order.
        file: the file of answers; those that it has already are not asked for again.
        person: name of the person.
        seed: the run's seed.
        now: returns the time.

    Raises:
        DamagedFile: the file has lines that are no answers to these questions.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        file: Path,
        *,
        person: str,
        seed: int,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        self.questions = questions
        self.file = file
        self.person = person
        self.seed = seed
        self.is_finished = False
        self._now = now
        self._lock = threading.Lock()
        labels = {question.number: question.label for question in questions}
        self._answers = _read_answers(file, labels)

    @property
    def answers(self) -> list[GivenAnswer]:
        """The answers to the questions, in the order of these."""
        given = []
        for question in self.questions:
            answer = self._answers.get(question.number)
            if answer is not None:
                given.append(answer)
        return given

    @property
    def current(self) -> Question | None:
        """The first question that has no answer yet; None if all have one."""
        for question in self.questions:
            if question.number not in self._answers:
                return question
        return None

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be asked any more."""
        return self.is_finished or self.current is None

    def answer(self, number: int, answer: int, seconds: float) -> GivenAnswer:
        """Saves the answer to the current question and returns it.

        Raises:
            WrongAnswer: another question is asked, such as after a click in a second window; or
                the values are none that an answer can have.
            OSError: the answer can't be saved; the question stays the current one.
        """
        with self._lock:
            question = self.current
            if self.is_over or question is None or question.number != number:
                raise WrongAnswer("another question is being asked")
            if not 0 <= answer < len(NEIGHBORS):
                raise WrongAnswer(f"{answer} is none of the eight places")
            if not (math.isfinite(seconds) and 0 <= seconds <= _LONGEST_S):
                raise WrongAnswer(f"{seconds} is no time in seconds")
            given = GivenAnswer(
                question=number,
                label=question.label,
                answer=answer,
                seconds=round(seconds, 3),
                at=self._now().isoformat(timespec="milliseconds"),
                person=self.person,
                seed=self.seed,
                image=path_as_text(question.source),
            )
            self.file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(dataclasses.asdict(given), ensure_ascii=False)
            append_lines(self.file, [line])
            self._answers[number] = given
            return given

    def finish(self) -> None:
        """Ends the session before all questions have an answer.

        Raises:
            WrongAnswer: none has one yet.
        """
        with self._lock:
            if not self._answers:
                raise WrongAnswer("there is no answer yet")
            self.is_finished = True


def _read_answers(file: Path, labels: dict[int, int]) -> dict[int, GivenAnswer]:
    """Returns the answers in a file by the numbers of their questions.

    `labels` are the right answers by number. Answers to questions beyond them are left alone: more
    had been asked for then.
    """
    answers: dict[int, GivenAnswer] = {}
    advice = "Move the file away, and the questions are asked again"
    for line_number, text in enumerate(read_lines(file), start=1):
        problem = f"{file} line {line_number} is no answer"
        given: GivenAnswer = parse_json(text, GivenAnswer, problem, advice)
        label = labels.get(given.question, given.label)
        if label != given.label or not 0 <= given.answer < len(NEIGHBORS):
            raise DamagedFile(f"{problem} to the questions of this command. {advice}")
        if given.question in labels:
            answers[given.question] = given
    return answers
