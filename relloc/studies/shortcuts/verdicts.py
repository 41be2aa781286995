"""Whether a network uses a shortcut, in words, with the number that says so."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from relloc.evaluation.contract import PretextModel
from relloc.studies.shortcuts.estimates import (
    Estimate,
    above_chance,
    difference_estimate,
    explained_percent,
)
from relloc.studies.shortcuts.findings import Findings
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a network uses a shortcut, and the number that says so.

    Attributes:
        shortcut: its name, for metrics. title: in words.
        effect: the number; 0 where the shortcut is not used.
        unit: of the number.
        meaning: what the number is, in words.
        layer: the layer that it was measured at, or "".
        words: one of the constants of this module.
    """

    shortcut: str
    title: str
    effect: Estimate
    unit: str
    meaning: str
    layer: str = ""
    words: str = CANNOT_TELL

    @property
    def sentence(self) -> str:
        """The verdict as a line for people."""
        return f"{self.title}: {self.verdict_text} ({self.number_text})"

    @property
    def verdict_text(self) -> str:
        """The words, and of how many images nothing could be told."""
        if self.words != CANNOT_TELL:
            return self.words
        text = f"{self.words} with {quantity(self.effect.n, 'image')}"
        if self.effect.sources < self.effect.n:
            text += f" of {quantity(self.effect.sources, 'source')}"
        return text

    @property
    def number_text(self) -> str:
        """The number with its interval and meaning."""
        effect = self.effect
        text = f"{effect.value:+.1f} {self.unit}"
        if math.isfinite(effect.half_width):
            text += f", 95 % interval {effect.low:+.1f} to {effect.high:+.1f}"
        return f"{text}; {self.meaning}"


def judge(effect: Estimate, negligible: float, *, verdicts: int, only_above: bool = False) -> str:
    """Returns whether a shortcut is used: its effect is 0 for a network that does not.

    A shortcut is used if an interval leaves out 0 that is widened for the number of verdicts, so
    that a network that uses none is accused of any in one of twenty studies at most. It is not used
    if the 95 % interval lies within `negligible` of 0. Otherwise the images are too few to tell.
    A network that reacts to a shortcut, but is wrong by it more often than not, has an effect
    below 0.

    Args:
        verdicts: how many there are in the study.
        only_above: whether an effect below 0 speaks against the shortcut too.
    """
    widened = effect.wider(verdicts)
    if widened.low > 0:
        return USES
    if widened.high < 0 and not only_above:
        return USES_WRONGLY
    is_small = effect.high < negligible
    if not only_above:
        is_small = is_small and effect.low > -negligible
    return DOES_NOT if is_small else CANNOT_TELL


def judge_features(effect: Estimate, negligible: float, *, verdicts: int) -> str:
    """Returns whether features hold a position, by the share of the variance that they explain."""
    words = judge(effect, negligible, verdicts=verdicts, only_above=True)
    return {USES: HOLDS, DOES_NOT: HOLDS_NOT}.get(words, words)


def make_verdicts(
    findings: Findings, pretext: PretextModel | None, strengths: Strengths, *, negligible: float
) -> list[Verdict]:
    """Returns the verdicts: on positions in features, and on what the network answers by.

    `negligible`: see `judge`.
    """
    about_features = list(_features(findings))
    about_answers = []
    if pretext is not None:
        about_answers = list(_answers(findings, pretext, strengths))
    count = len(about_features) + len(about_answers)
    verdicts = []
    for verdict in about_features:
        words = judge_features(verdict.effect, negligible, verdicts=count)
        verdicts.append(dataclasses.replace(verdict, words=words))
    for verdict, only_above in about_answers:
        words = judge(verdict.effect, negligible, verdicts=count, only_above=only_above)
        verdicts.append(dataclasses.replace(verdict, words=words))
    return verdicts


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
            title=f"place of a patch in its image, {layer}, colors {color}",
            effect=effect,
            unit="%",
            meaning="of the squared error of always answering the center is explained",
            layer=layer,
        )
    for images, by_layer in findings.map_errors.items():
        layer = _best_layer(by_layer)
        effect = explained_percent(by_layer[layer], findings.sources_of_maps(images))
        yield Verdict(
            shortcut=f"padding_{images}",
            title=f"place of a cell in maps of {images}, {layer}",
            effect=effect,
            unit="%",
            meaning="of the variance of the place is explained (R²)",
            layer=layer,
        )


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
        )
        yield verdict, contrast.only_above
