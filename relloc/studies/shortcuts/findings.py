"""Everything that the study of shortcuts measured, before it is summed up."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from relloc.studies.shortcuts.estimates import Estimate, accuracy_estimate
from relloc.studies.shortcuts.position import Errors
from relloc.studies.shortcuts.questions import Question
from relloc.studies.shortcuts.reading import SinglePatches

# What the maps show whose cells are to be found
PHOTOGRAPHS = "photographs"
NOISE = "noise"
# In place of a layer, for the small network that finds positions of patches
NETWORK = "network"


# Noise is made by the study itself, so that it is of no split of the data set.
_NOISE_SPLIT = "generated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a number was measured on, in fields of a `Score`; "" stands for the evaluation's own."""

    dataset: str = ""
    split: str = ""
    view: str = ""
    batch_norm: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Answers and errors, image by image.

    Attributes:
        asked: the questions to the network of the pretext task; none for weights without it.
        right: right answers (0 to 8) of each image, by the name of the question.
        patch_errors: of single patches, by color treatment and layer, or `NETWORK`.
        map_errors: of cells in maps, by what the images show (`PHOTOGRAPHS`, `NOISE`) and layer.
        sources: of the held-out photographs, in the order of their answers and errors.
        single: how single patches were cut.
    """

    asked: Sequence[Question]
    right: Mapping[str, Int[Tensor, "n"]]
    patch_errors: Mapping[tuple[str, str], Errors]
    map_errors: Mapping[str, Mapping[str, Errors]]
    sources: Sequence[str]
    single: SinglePatches

    def accuracy(self, question: Question) -> Estimate:
        """Returns the accuracy of the answers to a question, in percent."""
        return accuracy_estimate(self.right[question.name], self.sources_of(question))

    def sources_of(self, question: Question) -> Sequence[str]:
        """Returns the sources of the images that a question is about."""
        if question.is_about_photographs:
            return self.sources
        return _independent(len(self.right[question.name]))

    def sources_of_maps(self, images: str) -> Sequence[str]:
        """Returns the sources of the images whose maps were tested."""
        if images == PHOTOGRAPHS:
            return self.sources
        first = next(iter(self.map_errors[images].values()))
        return _independent(len(first.all_error))

    def origin_of(self, question: Question) -> Origin:
        """Returns what a question is about; the network answers under batch norm as trained."""
        if question.is_about_photographs:
            return Origin(view=question.view, batch_norm="as_trained")
        return Origin(
            dataset=NOISE, split=_NOISE_SPLIT, view=question.view, batch_norm="as_trained"
        )

    @property
    def origin_of_patches(self) -> Origin:
        """What positions of single patches are measured on."""
        return Origin(view=str(self.single))

    def origin_of_maps(self, images: str) -> Origin:
        """Returns what positions of cells are measured on: `PHOTOGRAPHS` or `NOISE`."""
        if images == PHOTOGRAPHS:
            return Origin()
        return Origin(dataset=NOISE, split=_NOISE_SPLIT, view="images as large as a view")

    @property
    def colors(self) -> list[str]:
        """The names of the color treatments of single patches, in the order of the settings."""
        return list(dict.fromkeys(color for color, _ in self.patch_errors))

    def patch_errors_by_layer(self, color: str) -> dict[str, Errors]:
        """Returns the errors of ridge regressions under a color treatment, by layer."""
        by_layer = {}
        for (other, layer), errors in self.patch_errors.items():
            if other == color and layer != NETWORK:
                by_layer[layer] = errors
        return by_layer


def _independent(n: int) -> list[str]:
    # Each image of noise is a source of its own.
    return [str(number) for number in range(n)]
