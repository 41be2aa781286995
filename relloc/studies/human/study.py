"""Measures how well a person solves the pretext task, beside chance and beside a network."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from relloc import checks
from relloc.data.image_set import ROLES, ImageSet, Role, hash_lines
from relloc.errors import UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.geometry import CHANCE_PERCENT, PatchGrid, ShortSide
from relloc.patches.pipeline import Color
from relloc.pretext.confusion_picture import draw_confusion
from relloc.pretext.questions import POSITIONS
from relloc.results import Score
from relloc.studies.accuracies import Share
from relloc.studies.asking import check_grid, grid_to_ask
from relloc.studies.csv_tables import write_table
from relloc.studies.human.comparison import Replies, compare, network_replies, replies_of
from relloc.studies.human.questions import Question, make_questions, network_answers
from relloc.studies.human.server import PageTexts, serving, wait_until_over
from relloc.studies.human.session import GivenAnswer, Session
from relloc.terminal import quantity

SETTING = "study.human"
# The grid of mmselfsup 0.x (docs/protocols.md 1.1), where no network says which it learned on
PUBLISHED_GRID = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=ShortSide(px=292))
_LONGEST_NAME = 60
_LAST_PORT = 65535
_BATCH = 64  # questions that pass a network at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Human(Evaluation):
    """Accuracy of a person who answers on a page that this command serves on this machine.

    The answers belong to the person, the questions and the run folder, and not to a network: they
    are asked for once, whatever checkpoints are named, and rows of other runs are never taken over.
    Rows of the person have the checkpoint `PERSON`, also where a network was asked the same.
    Networks with the pretext head are asked about the same pixels, in the colors that they were
    trained on.

    Attributes:
        person: name or number of the person.
        n_questions: after so many answers the session ends by itself.
        split: "held_out" or "train".
        grid: geometry of the patches; None for that of the checkpoint's network, and for the
            published one where there is none.
        color: color treatment of what the person sees.
        feedback: whether the page tells the right answer after each.
        port: of the page; 0 for any free one.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "study"
    labels = "none"
    version = 1
    wants_pretext = True
    needs_network = False
    repeatable = False
    layers = ()
    view = "pairs of patches at random places"
    batch = _BATCH

    person: str | int
    n_questions: int
    split: Role
    grid: PatchGrid | None
    color: Color
    feedback: bool
    port: int = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        name = str(self.person)
        is_name = isinstance(self.person, str | int) and not isinstance(self.person, bool)
        if not is_name or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise UsageError(
                f"{SETTING}.person is {self.person!r}: give a name or number of up to "
                f"{_LONGEST_NAME} characters in one line"
            )
        checks.whole(f"{SETTING}.n_questions", self.n_questions)
        checks.one_of(f"{SETTING}.split", self.split, ROLES)
        check_grid(SETTING, self.grid)
        if not isinstance(self.color, Color):
            raise UsageError(
                f"{SETTING}.color is {self.color}: choose a member of conf/color by "
                f"color@{SETTING}.color=NAME, such as none"
            )
        checks.true_or_false(f"{SETTING}.feedback", self.feedback)
        checks.whole(f"{SETTING}.port", self.port, at_least=0)
        if self.port > _LAST_PORT:
            raise UsageError(f"{SETTING}.port is {self.port}: give 0 to {_LAST_PORT}")

    def batch_norms(self, of_run: Sequence[str]) -> Sequence[str]:
        """Returns "as_trained", as networks are asked as they were trained."""
        return ("as_trained",)

    def run(self, context: Context) -> Iterator[Score]:
        """Serves the page until the session is over, and yields what was measured.

        Raises:
            UsageError: the port can't be used, or the grid has other patches than the network.
            DataError: too many images can't be read.
            DamagedFile: the file of answers is not one.
        """
        images = context.splits.of(self.split)
        grid = self._grid(context)
        questions = make_questions(
            images,
            self.n_questions,
            grid=grid,
            color=self.color,
            seed=context.seed,
            config=context.encode_config,
        )
        file = self._answers_file(images, grid, context)
        session = Session(questions, file, person=str(self.person), seed=context.seed)
        if not session.is_over:
            self._serve(session, images, context)
        yield from self._scores(session, images, context)

    def _grid(self, context: Context) -> PatchGrid:
        if context.pretext is not None:
            return grid_to_ask(SETTING, self.grid, context.pretext)
        return self.grid or PUBLISHED_GRID

    def _answers_file(self, images: ImageSet, grid: PatchGrid, context: Context) -> Path:
        """Returns the file of answers, which is the same for all checkpoints.

        The number of questions does not count, so that a person may go on to answer more.
        """
        facts = (str(self.person), self.split, repr(grid), repr(self.color), self.feedback)
        digest = hash_lines([repr(facts), str(context.seed), images.digest()])
        # Beside the folders that belong to one checkpoint each
        return context.folder.parent / f"answers_{digest}.jsonl"

    def _serve(self, session: Session, images: ImageSet, context: Context) -> None:
        texts = PageTexts(
            person=str(self.person),
            images=f"{images.name} {images.split}".replace("_", " "),
            feedback=self.feedback,
        )
        try:
            with serving(session, texts, self.port, f"{SETTING}.port") as server:
                done = len(session.answers)
                context.print_line(
                    f"human   open {server.address} in a browser of this machine: "
                    f"{done} of {quantity(self.n_questions, 'question')} answered; Ctrl-C pauses"
                )
                wait_until_over(server)
        finally:
            # Without an answer there is nothing to go on with, as the run folder says itself.
            if session.answers and not session.is_over:
                context.print_line(
                    f"human   {quantity(len(session.answers), 'answer')} saved in {session.file}: "
                    "the same command with the same hydra.run.dir= goes on"
                )

    def _scores(self, session: Session, images: ImageSet, context: Context) -> Iterator[Score]:
        given = session.answers
        person = replies_of(given)
        network = self._network_replies(session, person, context)
        yield from self._of_person(person, given, context)
        if network is not None:
            yield from _of_network(person, network, context)
        about = f"{images.name} {images.split}"
        _save(person, f"{self.person}, {about}", "", context)
        if network is not None:
            _save(network, f"network, {about}", "network_", context)
        _write_positions(person, network, context)
        _write_answers(given, network, context)

    def _network_replies(
        self, session: Session, person: Replies, context: Context
    ) -> Replies | None:
        if context.pretext is None:
            return None
        answered = {each.question for each in session.answers}
        asked: list[Question] = []
        for question in session.questions:
            if question.number in answered:
                asked.append(question)
        probabilities = network_answers(
            context.pretext,
            asked,
            seed=context.seed,
            batch=self.batch,
            config=context.encode_config,
        )
        return network_replies(person, probabilities)

    def _of_person(
        self, person: Replies, given: Sequence[GivenAnswer], context: Context
    ) -> Iterator[Score]:
        overall = _share_of_all(person)
        context.print_line(f"human   {self.person}: {overall.in_words}")
        told = "told" if self.feedback else "not told"
        # Whose grid it was says which pairs were asked about.
        asked = ()
        if context.pretext is not None:
            asked = (f"the network of {context.checkpoint} was asked about the same pairs",)
        details = (
            quantity(overall.pairs, "pair", commas=True),
            f"person {self.person}; colors {type(self.color).__name__}; right answers {told}",
            *asked,
            f"95 % t interval, clustered by source image; chance is {CHANCE_PERCENT} %",
        )
        score = overall.score("accuracy")
        yield dataclasses.replace(
            score,
            of_person=True,
            table="Pretext accuracy of people",
            column="accuracy",
            variant=f"person {self.person}",
            headline=True,
            protocol="3.12",
            details=details,
        )
        for position, share in person.by_position().items():
            of_position = share.score(f"accuracy_{position}", asked)
            yield dataclasses.replace(of_position, of_person=True)
        seconds = float(np.median([each.seconds for each in given]))
        yield Score(
            metric="median_seconds",
            value=seconds,
            unit="s",
            higher_is_better=None,
            n=person.n_images,
            details=(f"of {quantity(len(given), 'answer')}", *asked),
            of_person=True,
        )


def _of_network(person: Replies, network: Replies, context: Context) -> Iterator[Score]:
    overall = _share_of_all(network)
    context.print_line(f"human   network: {overall.in_words}")
    # A network is asked as at the end of its curriculum, if it had one.
    changed = context.pretext is not None and context.pretext.changed
    when = "the end of its training" if changed else "its training"
    yield overall.score("network_accuracy", (f"the same pairs, in the colors of {when}",))
    for score in compare(person, network):
        if score.metric == "agreement":
            context.print_line(f"human   both answer the same in {score.value:.1f} %")
        yield score


def _share_of_all(replies: Replies) -> Share:
    share = replies.share("all")
    if share is None:
        raise ValueError("there are no answers")
    return share


def _save(replies: Replies, heading: str, prefix: str, context: Context) -> None:
    """Saves picture and table of the confusions."""
    counts = replies.confusion()
    draw_confusion(
        counts,
        context.folder / f"{prefix}confusion.png",
        heading=heading,
        top1=_share_of_all(replies).percent,
        pairs="pairs",
    )
    lines = [[name, *row] for name, row in zip(POSITIONS, counts.tolist(), strict=True)]
    header = ["true position", *POSITIONS]
    write_table(header, lines, context.folder / f"{prefix}confusion.csv")


def _write_positions(person: Replies, network: Replies | None, context: Context) -> None:
    header = ["position", "pairs", "person_percent", "low", "high"]
    of_network = {}
    if network is not None:
        header += ["network_percent", "network_low", "network_high"]
        of_network = network.by_position()
    lines = []
    for position, share in person.by_position().items():
        line: list[object] = [position, share.pairs]
        shares = [share, of_network[position]] if of_network else [share]
        for each in shares:
            line += [round(value, 3) for value in (each.percent, each.low, each.high)]
        lines.append(line)
    write_table(header, lines, context.folder / "by_position.csv")


def _write_answers(given: Sequence[GivenAnswer], network: Replies | None, context: Context) -> None:
    header = ["question", "image", "position", "answer", "right", "seconds", "at"]
    if network is not None:
        header.append("network_answer")
    lines = []
    for place, each in enumerate(given):
        line: list[object] = [each.question, each.image]
        line += [POSITIONS[each.label], POSITIONS[each.answer], int(each.is_right)]
        line += [each.seconds, each.at]
        if network is not None:
            line.append(POSITIONS[int(network.answers[place])])
        lines.append(line)
    write_table(header, lines, context.folder / "answers.csv")
