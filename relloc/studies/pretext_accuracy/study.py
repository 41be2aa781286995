"""Measures what a trained network answers about any set of images."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped

from relloc import checks
from relloc.data.annotations import ObjectImages
from relloc.data.image_set import ROLES, ImageSet, Role
from relloc.data.lists import THERE, MultiLabeled
from relloc.data.subsets import evenly_spaced
from relloc.errors import UsageError
from relloc.evaluation.contract import Context, Evaluation
from relloc.geometry import CHANCE_PERCENT, PatchGrid
from relloc.pretext.confusion_picture import draw_confusion
from relloc.pretext.held_out import clustered_ratio, confusion
from relloc.pretext.questions import CENTER_PAIRS, POSITIONS
from relloc.results import Score
from relloc.studies.accuracies import Share, draw_shares, share_of, write_shares
from relloc.studies.asking import Answers, ask, check_grid, grid_to_ask
from relloc.studies.csv_tables import write_table
from relloc.studies.pretext_accuracy.boxes import PairPlaces, classes_with_pairs, places_of_pairs
from relloc.studies.pretext_accuracy.pictures import draw_reliability
from relloc.studies.pretext_accuracy.reliability import Reliability, reliability
from relloc.terminal import quantity

SETTING = "study.pretext"
# Sets with more classes have them in tables and pictures only: ImageNet's thousand would fill
# results.jsonl and MLflow.
_MOST_CLASS_ROWS = 100
_ALL = "all"
# Titles of tables in reports
_OVERALL = "Pretext accuracy of the study"
_BY_POSITION = "Pretext accuracy by position"
_BY_CLASS = "Pretext accuracy by class of the image"
_BY_BOX = "Pretext accuracy inside and outside of objects' boxes"
_CALIBRATION = "Pretext calibration"
_Mask = Bool[np.ndarray, "grids 8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretext(Evaluation):
    """Accuracy of the pretext task on any images: overall, by position, class and object boxes.

    The network is asked as it was trained, or as at the end of a curriculum, with its own
    batch-norm statistics, color treatment and normalization. It needs a checkpoint with the pretext
    head. Names of metrics begin with `accuracy`, as `pretext/top1` is the number that training
    itself ends with.

    Attributes:
        split: "held_out" or "train".
        n_images: images that are asked about, evenly spaced over the split; None for all.
        places: grids of an image at random places, with eight pairs each; None for one grid at its
            center, as held-out accuracy is measured on.
        grid: geometry of the patches; None for the one that the network was trained on.
        min_box_patches: least side of an object's box in sides of a patch, for pairs to count as
            inside of it.
        bins: bins of the reliability diagram, of equally many pairs.
        batch: grids that pass the network at once.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "study"
    labels = "none"
    version = 1
    wants_pretext = True
    needs_pretext = True
    layers = ()

    split: Role
    n_images: int | None
    places: int | None
    grid: PatchGrid | None
    min_box_patches: float
    bins: int
    batch: int = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        checks.one_of(f"{SETTING}.split", self.split, ROLES)
        if self.n_images is not None:
            checks.whole(f"{SETTING}.n_images", self.n_images)
        if self.places is not None:
            checks.whole(f"{SETTING}.places", self.places)
        check_grid(SETTING, self.grid)
        checks.number(f"{SETTING}.min_box_patches", self.min_box_patches, at_least=0)
        checks.whole(f"{SETTING}.bins", self.bins)
        checks.whole(f"{SETTING}.batch", self.batch)

    @property
    def view(self) -> str:
        """How images are cropped, in words."""
        if self.places is None:
            return "grids of patches at the center"
        return f"{quantity(self.places, 'grid')} of patches at random places"

    def batch_norms(self, of_run: Sequence[str]) -> Sequence[str]:
        """Returns "as_trained": the head was trained on what these statistics give."""
        return ("as_trained",)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields the accuracies and the calibration, and saves tables and pictures.

        Raises:
            UsageError: the checkpoint has no pretext head, or its patches have another side.
            DataError: too many images can't be read.
        """
        if context.pretext is None:
            raise UsageError(
                f"{SETTING} asks the network of the pretext task, and {context.checkpoint} has no "
                "head that answers: give a run folder, checkpoint=RUN_FOLDER"
            )
        images = context.splits.of(self.split)
        n_asked = len(images) if self.n_images is None else self.n_images
        answers = ask(
            context.pretext,
            images,
            evenly_spaced(len(images), n_asked),
            grid=grid_to_ask(SETTING, self.grid, context.pretext),
            places=self.places,
            seed=context.seed,
            batch=self.batch,
            config=context.encode_config,
        )
        findings = _Findings(answers=answers, images=images)
        for score in self._scores(findings, context):
            yield dataclasses.replace(score, on_train=self.split == "train")

    def _scores(self, findings: "_Findings", context: Context) -> Iterator[Score]:
        overall = findings.share(_ALL, findings.all_pairs)
        context.print_line(f"pretext {overall.in_words}")
        asked = ""
        if context.pretext is not None:
            colors = type(context.pretext.patches.color).__name__
            asked = f"jitter and colors ({colors}) {context.pretext.as_asked}"
        headline = dataclasses.replace(
            overall.score("accuracy", table=_OVERALL, column=self.view),
            headline=True,
            protocol="1.1" if self.places is None else "3.12",
        )
        headline = dataclasses.replace(
            headline,
            details=(
                *headline.details,
                "eight pairs a grid",
                f"{asked}, drawn image by image",
                f"95 % t interval, clustered by source image; chance is {CHANCE_PERCENT} %",
            ),
        )
        yield headline
        yield from self._by_position(findings, context)
        yield from self._calibration(findings, context)
        yield from self._by_class(findings, context)
        yield from self._by_box(findings, overall, context)

    def _by_position(self, findings: "_Findings", context: Context) -> Iterator[Score]:
        shares = []
        for label, position in enumerate(POSITIONS):
            chosen = np.zeros_like(findings.right)
            chosen[:, label] = True
            share = findings.share(position, chosen)
            shares.append(share)
            column = position.replace("_", " ")
            yield share.score(f"accuracy_{position}", table=_BY_POSITION, column=column)
        write_shares(shares, context.folder / "by_position.csv", of="position")
        predicted = findings.answers.logits.argmax(dim=2)
        counts = confusion(predicted)
        header = ["true position", *POSITIONS]
        lines = []
        for position, row in zip(POSITIONS, counts.tolist(), strict=True):
            lines.append([position, *row])
        write_table(header, lines, context.folder / "confusion.csv")
        draw_confusion(
            counts,
            context.folder / "confusion.png",
            heading=f"{findings.images.name} {findings.images.split}",
            top1=100 * float(findings.right.mean()),
            pairs="pairs",
        )

    def _calibration(self, findings: "_Findings", context: Context) -> Iterator[Score]:
        found = reliability(findings.confidences, findings.right.flatten(), self.bins)
        n_images = findings.n_images
        mean_confidence = float(findings.confidences.mean())
        nll, low, high = findings.negative_log_likelihood()
        of_bins = (
            f"{len(found.counts)} bins of about equally many of {findings.right.size:,} pairs",
        )
        yield Score(
            metric="mean_confidence",
            value=100 * mean_confidence,
            table=_CALIBRATION,
            column="mean probability of answers",
            higher_is_better=None,
            n=n_images,
        )
        yield Score(
            metric="calibration_error",
            value=100 * found.expected_error,
            table=_CALIBRATION,
            column="expected calibration error",
            higher_is_better=False,
            n=n_images,
            details=of_bins,
        )
        yield Score(
            metric="nll",
            value=nll,
            low=low,
            high=high,
            unit="nats",
            table=_CALIBRATION,
            column="negative log-likelihood",
            higher_is_better=False,
            n=n_images,
            details=(f"chance is log 8 = {CENTER_PAIRS.chance_loss:.3f}",),
        )
        _write_reliability(found, context)
        draw_reliability(
            found,
            findings.confidences,
            context.folder / "reliability.png",
            title=(
                f"{findings.images.name} {findings.images.split}: expected calibration error "
                f"{100 * found.expected_error:.1f} %"
            ),
        )

    def _by_class(self, findings: "_Findings", context: Context) -> Iterator[Score]:
        members = _classes_of_grids(findings.images, findings.answers.images)
        shares = []
        for name, of_class in members:
            chosen = findings.all_pairs & of_class[:, None]
            share = findings.share_or_none(name, chosen)
            if share is not None:
                shares.append(share)
        if not shares:
            return
        write_shares(shares, context.folder / "by_class.csv", of="class")
        title = f"{findings.images.name} {findings.images.split}, by class of the image"
        draw_shares(shares, context.folder / "by_class.png", title=title)
        if len(shares) <= _MOST_CLASS_ROWS:
            for share in shares:
                metric = f"accuracy_class_{_as_metric(share.name)}"
                yield share.score(metric, table=_BY_CLASS, variant=share.name)

    def _by_box(self, findings: "_Findings", overall: Share, context: Context) -> Iterator[Score]:
        images = findings.images
        if not isinstance(images, ObjectImages):
            return
        answers = findings.answers
        places = places_of_pairs(
            images,
            answers.images,
            answers.pair_boxes,
            answers.patch_sides,
            least_patches=self.min_box_patches,
        )
        details = (
            "a pair is inside where the box around both patches lies within an object's box",
            f"boxes count from {self.min_box_patches:g} sides of a patch on, which is our choice; "
            "difficult, occluded and crowd objects do not count where the annotation says so",
        )
        shares = [overall]
        for name, chosen in _pairs_by_place(places):
            share = findings.share_or_none(name, chosen)
            if share is not None:
                shares.append(share)
                yield share.score(f"accuracy_{name}", details, table=_BY_BOX, variant=name)
        for number, class_name in classes_with_pairs(places, images.classes):
            name = f"inside_{class_name}"
            share = findings.share(name, places.of_class[:, :, number])
            shares.append(share)
            metric = f"accuracy_{_as_metric(name)}"
            variant = f"inside {class_name}"
            yield share.score(metric, details, table=_BY_BOX, variant=variant)
        write_shares(shares, context.folder / "by_box.csv", of="place")
        title = f"{images.name} {images.split}, inside and outside objects' boxes"
        draw_shares(shares, context.folder / "by_box.png", title=title)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Findings:
    """The answers of a network, and what follows from them."""

    answers: Answers
    images: ImageSet

    @functools.cached_property
    def log_probabilities(self) -> Float[np.ndarray, "grids 8 8"]:
        """Logarithms of the probabilities that the network gives each label of each pair."""
        return self.answers.logits.double().log_softmax(dim=2).numpy()

    @functools.cached_property
    def right(self) -> _Mask:
        """Whether the answer about each pair is right: the right label of pair i is i."""
        predicted = self.answers.logits.argmax(dim=2)
        return (predicted == torch.arange(CENTER_PAIRS.n_questions)).numpy()

    @functools.cached_property
    def confidences(self) -> Float[np.ndarray, "pairs"]:
        """The probability of the answer about each pair, from 0 to 1."""
        return np.exp(self.log_probabilities.max(axis=2)).flatten()

    @functools.cached_property
    def sources(self) -> Shaped[np.ndarray, "grids"]:
        """The name of the source of the image of each grid."""
        names = {}
        for index in np.unique(self.answers.images).tolist():
            names[index] = self.images.source(index)
        # As objects: an array of texts would take the longest one's memory for each.
        return np.array([names[index] for index in self.answers.images.tolist()], dtype=object)

    @property
    def n_images(self) -> int:
        return len(np.unique(self.answers.images))

    @property
    def all_pairs(self) -> _Mask:
        return np.ones_like(self.right)

    def share_or_none(self, name: str, chosen: _Mask) -> Share | None:
        """Returns the accuracy over the chosen pairs; None if there are none."""
        return share_of(name, self.right, chosen, self.answers.images, self.sources)

    def share(self, name: str, chosen: _Mask) -> Share:
        """Returns the accuracy over the chosen pairs, of which there are some."""
        share = self.share_or_none(name, chosen)
        if share is None:
            raise ValueError(f"there are no pairs {name}")
        return share

    def negative_log_likelihood(self) -> tuple[float, float | None, float | None]:
        """Returns its mean over pairs in nats, and the ends of its 95 % interval."""
        of_right = self.log_probabilities.diagonal(axis1=1, axis2=2)
        pairs = np.full(len(of_right), CENTER_PAIRS.n_questions)
        mean, half_width = clustered_ratio(-of_right.sum(axis=1), pairs, self.sources.tolist())
        # With images of a single source nothing is known of others.
        if math.isinf(half_width):
            return mean, None, None
        return mean, mean - half_width, mean + half_width


def _pairs_by_place(places: PairPlaces) -> list[tuple[str, _Mask]]:
    return [
        ("inside", places.inside),
        ("outside", places.outside),
        ("across", places.across),
    ]


def _classes_of_grids(
    images: ImageSet, indices: Int64[np.ndarray, "grids"]
) -> Iterator[tuple[str, Bool[np.ndarray, "grids"]]]:
    """Yields each class with the grids whose images show it; none for images without labels."""
    if images.labels is not None:
        labels = np.asarray(images.labels)[indices]
        for number, name in enumerate(images.classes):
            yield name, labels == number
    elif isinstance(images, MultiLabeled):
        presence = np.asarray(images.presence())[indices]
        for number, name in enumerate(images.classes):
            yield name, presence[:, number] == THERE


def _as_metric(name: str) -> str:
    """Returns a name of which only characters are left that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _write_reliability(found: Reliability, context: Context) -> None:
    lines = []
    for bin_values in zip(found.counts, found.confidences, found.accuracies, strict=True):
        count, confidence, accuracy = bin_values
        lines.append([int(count), round(100 * confidence, 3), round(100 * accuracy, 3)])
    header = ["pairs", "mean_confidence_percent", "accuracy_percent"]
    write_table(header, lines, context.folder / "reliability.csv")
