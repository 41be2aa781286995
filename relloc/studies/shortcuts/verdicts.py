"""Whether a network uses a shortcut, in words, with the number that says so."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from relloc.evaluation.contract import PretextModel
from relloc.results import known_interval
from relloc.studies.shortcuts.estimates import (
    Estimate,
    above_chance,
    difference_estimate,
    explained_percent,
)
from relloc.studies.shortcuts.findings import PHOTOGRAPHS, Findings, Origin
from relloc.studies.shortcuts.position import Errors
from relloc.studies.shortcuts.questions import Strengths, contrasts
from relloc.terminal import quantity

# The words of a verdict about what a network does, and about what its features hold
USES = "uses it"
USES_WRONGLY = "reacts to it, wrongly"
DOES_NOT = "does not use it"
HOLDS = "has it"
HOLDS_NOT = "does not have it"
CANNOT_TELL = "can't be told"
# Why nothing can be told, where more images would not help
FIT_FAILED = "the fit failed"
NEGATIVE = "the effect is negative"
AT_CHANCE = "the network is at chance on photographs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a network uses a shortcut, and the number that says so.

    Attributes:
        shortcut: its name, for metrics.
        title: in words, the same for all networks.
        effect: the number; 0 where the shortcut is not used.
        unit: of the number.
        meaning: what the number is, in words.
        layer: the layer that it was measured at, or "".
        choice: how this layer was chosen, or "".
        origin: what it was measured on.
        words: what was found, such as `USES`; one of the constants of this module.
        reason: why nothing can be told, such as `AT_CHANCE`, or "" if the images are too few.
    """

    shortcut: str
    title: str
    effect: Estimate
    unit: str
    meaning: str
    layer: str = ""
    choice: str = ""
    origin: Origin
    words: str = CANNOT_TELL
    reason: str = ""

    @property
    def full_title(self) -> str:
        """The title with the layer, which was chosen for this network."""
        return f"{self.title}, {self.layer}" if self.layer else self.title

    @property
    def sentence(self) -> str:
        """The verdict as a line for people."""
        return f"{self.full_title}: {self.verdict_text} ({self.number_text})"

    @property
    def verdict_text(self) -> str:
        """The words, and why or of how many images nothing could be told."""
        if self.words != CANNOT_TELL:
            return self.words
        if self.reason:
            return f"{self.words}: {self.reason}"
        text = f"{self.words} with {quantity(self.effect.n, 'image')}"
        if self.effect.sources < self.effect.n:
            text += f" of {quantity(self.effect.sources, 'source')}"
        return text

    @property
    def number_text(self) -> str:
        """The number with its interval and meaning."""
        effect = self.effect
        text = f"{effect.value:+.1f} {self.unit}"
        is_known = math.isfinite(effect.half_width)
        # Where all images gave the same number, the interval has no width and tells nothing.
        if is_known and known_interval(effect.low, effect.high, self.unit):
            text += f", 95 % interval {effect.low:+.1f} to {effect.high:+.1f}"
        return f"{text}; {self.meaning}"


def judge(
    effect: Estimate, negligible: float, *, verdicts: int, only_above: bool = False
) -> tuple[str, str]:
    """Returns whether a shortcut is used, and why nothing can be told, or "".

    The effect is 0 for a network that does not use it. A shortcut is used if an interval leaves out
    0 that is widened for the number of verdicts, so that a network that uses none is accused of any
    in one of twenty studies at most. It is not used if the 95 % interval lies within `negligible`
    of 0. Otherwise the images are too few to tell. A network that reacts to a shortcut, but is
    wrong by it more often than not, has an effect below 0.

    Args:
        verdicts: how many there are in the study.
        only_above: whether an effect below 0 tells nothing about the shortcut.
    """
    widened = effect.wider(verdicts)
    if widened.low > 0:
        return USES, ""
    if widened.high < 0 and not only_above:
        return USES_WRONGLY, ""
    if -negligible < effect.low and effect.high < negligible:
        return DOES_NOT, ""
    # More images would not bring such an effect back to 0.
    is_negative = only_above and effect.high < -negligible
    return CANNOT_TELL, NEGATIVE if is_negative else ""


def judge_features(effect: Estimate, negligible: float, *, verdicts: int) -> tuple[str, str]:
    """Returns whether features hold a position, by the share of the variance that they explain.

    A regression that is worse than always answering the center has failed to generalize, which
    tells nothing about the features. The second value says why nothing can be told, as of `judge`.
    """
    words, reason = judge(effect, negligible, verdicts=verdicts, only_above=True)
    words = {USES: HOLDS, DOES_NOT: HOLDS_NOT}.get(words, words)
    return words, FIT_FAILED if reason == NEGATIVE else reason


def make_verdicts(
    findings: Findings, pretext: PretextModel | None, strengths: Strengths, *, negligible: float
) -> list[Verdict]:
    """Returns the verdicts: on positions in features, and on what the network answers by.

    Nothing is told about the answers of a network that is not surely better than guessing on
    photographs: what it does with noise is then no trick that solves its task.

    `negligible`: see `judge`.
    """
    about_features = list(_features(findings))
    about_answers = []
    if pretext is not None and findings.asked:
        about_answers = list(_answers(findings, pretext, strengths))
    count = len(about_features) + len(about_answers)
    verdicts = []
    for verdict in about_features:
        words, reason = judge_features(verdict.effect, negligible, verdicts=count)
        verdicts.append(dataclasses.replace(verdict, words=words, reason=reason))
    is_at_chance = bool(about_answers) and not knows_photographs(findings)
    for verdict, only_above in about_answers:
        words, reason = judge(verdict.effect, negligible, verdicts=count, only_above=only_above)
        if is_at_chance:
            words, reason = CANNOT_TELL, AT_CHANCE
        verdicts.append(dataclasses.replace(verdict, words=words, reason=reason))
    return verdicts


def knows_photographs(findings: Findings) -> bool:
    """Whether the 95 % interval of the accuracy on photographs as trained lies above guessing."""
    [question] = [each for each in findings.asked if each.name == PHOTOGRAPHS]
    return above_chance(findings.accuracy(question)).low > 0


def _features(findings: Findings) -> Iterator[Verdict]:
    """Yields, without words, what is about each color treatment, and maps of each kind of image.

    Each is about the layer that was best on training images held back.
    """
    for color in findings.colors:
        by_layer = findings.patch_errors_by_layer(color)
        layer = _best_layer(by_layer)
        effect = explained_percent(by_layer[layer], findings.sources)
        yield Verdict(
            shortcut=f"position_{color}",
            title=f"place of a patch in its image, colors {color}",
            effect=effect,
            unit="%",
            meaning="of the squared error of always answering the center is explained",
            origin=findings.origin_of_patches,
            layer=layer,
            choice=_choice(layer, by_layer),
        )
    for images, by_layer in findings.map_errors.items():
        layer = _best_layer(by_layer)
        effect = explained_percent(by_layer[layer], findings.sources_of_maps(images))
        yield Verdict(
            shortcut=f"padding_{images}",
            title=f"place of a cell in maps of {images}",
            effect=effect,
            unit="%",
            meaning="of the variance of the place is explained (R²)",
            origin=findings.origin_of_maps(images),
            layer=layer,
            choice=_choice(layer, by_layer),
        )


def _choice(layer: str, by_layer: Mapping[str, Errors]) -> str:
    return f"{layer}, best of {len(by_layer)} layers, chosen on training images held back"


def _best_layer(by_layer: Mapping[str, Errors]) -> str:
    """Returns the layer with the smallest error, relative to the center's, when it was chosen."""

    def error(layer: str) -> float:
        return by_layer[layer].when_chosen

    return min(by_layer, key=error)


def _answers(
    findings: Findings, pretext: PretextModel, strengths: Strengths
) -> Iterator[tuple[Verdict, bool]]:
    """Yields, without words, each shortcut that the network was asked about.

    The second value is whether an effect below 0 speaks against the shortcut.
    """
    by_name = {question.name: question for question in findings.asked}
    for contrast in contrasts(strengths, pretext.patches):
        question = by_name[contrast.question]
        if contrast.control is None:
            effect = above_chance(findings.accuracy(question))
            meaning = "accuracy above that of guessing"
        else:
            effect = difference_estimate(
                findings.right[contrast.question],
                findings.right[contrast.control],
                findings.sources_of(question),
            )
            meaning = "difference of the two accuracies"
        verdict = Verdict(
            shortcut=contrast.shortcut,
            title=contrast.title,
            effect=effect,
            unit="points",
            meaning=meaning,
            origin=findings.origin_of(question),
        )
        yield verdict, contrast.only_above
