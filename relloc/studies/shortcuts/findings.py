"""Everything that the study of shortcuts measured, before it is summed up."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from relloc.studies.shortcuts.estimates import Estimate, accuracy_estimate
from relloc.studies.shortcuts.position import Errors
from relloc.studies.shortcuts.questions import Question

# What the maps show whose cells are to be found
PHOTOGRAPHS = "photographs"
NOISE = "noise"
# In place of a layer, for the small network that finds positions of patches
NETWORK = "network"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Answers and errors, image by image.

    Attributes:
        asked: the questions to the network of the pretext task; none for weights without it.
        right: right answers (0 to 8) of each image, by the name of the question.
        patch_errors: of single patches, by color treatment and layer, or `NETWORK`.
        map_errors: of cells in maps, by what the images show (`PHOTOGRAPHS`, `NOISE`) and layer.
        sources: of the held-out photographs, in the order of their answers and errors.
    """

    asked: Sequence[Question]
    right: Mapping[str, Int[Tensor, "n"]]
    patch_errors: Mapping[tuple[str, str], Errors]
    map_errors: Mapping[str, Mapping[str, Errors]]
    sources: Sequence[str]

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
