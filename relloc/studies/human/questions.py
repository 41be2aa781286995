"""Pairs of patches that a person is asked about, and a network may be asked about as well.

A question is decided by the run's seed and its number: who stops and goes on later is asked the
same questions, and so is a network.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.errors import DataError
from relloc.evaluation.contract import PretextModel
from relloc.features.source import EncodeConfig
from relloc.geometry import CELLS, CENTER, NEIGHBORS, PatchGrid
from relloc.patches.cut import cut_patches
from relloc.patches.pipeline import Color
from relloc.patches.sample import sample_places
from relloc.seeds import Use, seed_for
from relloc.studies.asking import ImageGrids, ReadGrids, network_logits
from relloc.studies.image_reading import read_counted

Patch = UInt8[Tensor, "3 p p"]
_QUESTIONS_AT_ONCE = 8  # that a worker process reads and hands over together


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Which of eight places does the neighbor have?

    Attributes:
        number: of the question, from 0.
        label: the right answer, 0 to 7.
        source: the source of the image.
        patches: all nine patches of the grid, in original colors and row by row.
        shown: the same in the colors that the person sees.
    """

    number: int
    label: int
    source: str
    patches: UInt8[Tensor, "9 3 p p"]
    shown: UInt8[Tensor, "9 3 p p"]

    @property
    def center(self) -> Patch:
        """The patch in the middle, as the person sees it."""
        return self.shown[CENTER]

    @property
    def neighbor(self) -> Patch:
        """The patch whose place is asked for, as the person sees it."""
        return self.shown[NEIGHBORS[self.label]]


def make_questions(
    images: ImageSet,
    n: int,
    *,
    grid: PatchGrid,
    color: Color,
    seed: int,
    config: EncodeConfig,
) -> list[Question]:
    """Returns `n` questions about images in random order, at random places of them.

    Images are taken again where they are fewer. A question about an image that can't be read is
    left out, and one more is asked.

    Raises:
        DataError: more images can't be read than `config.unreadable_share` allows, or none can.
    """
    unreadable = config.unreadable_of(len(images))
    read = ReadGrids(images=images, grid=grid, places=1)
    questions: list[Question] = []
    first_number = 0
    while len(questions) < n:
        # Once each image was tried in vain, others will not come.
        if not questions and first_number >= len(images):
            raise DataError(f"none of the images of {images.name} {images.split} can be read")
        numbers = range(first_number, first_number + n - len(questions))
        first_number = numbers.stop
        keys = []
        for number in numbers:
            index = _image_of(number, len(images), seed)
            keys.append((index, seed_for(Use.PERSON_PLACE, seed, number)))
        batches = read_counted(
            images,
            read,
            keys,
            "questions",
            config=config,
            at_once=_QUESTIONS_AT_ONCE,
            unreadable=unreadable,
        )
        for batch in batches:
            for sample, place in zip(batch.samples, batch.places, strict=True):
                number = numbers.start + place
                source = images.source(sample.index)
                questions.append(_question(sample, number, source, grid, color, seed))
    return questions


def _question(
    sample: ImageGrids, number: int, source: str, grid: PatchGrid, color: Color, seed: int
) -> Question:
    """Cuts the patches of a question, and treats the colors of those that the person sees."""
    generator = torch.Generator().manual_seed(seed_for(Use.PERSON_PATCHES, seed, number))
    places = sample_places(grid, 1, generator)
    crop = torch.from_numpy(sample.crops).permute(0, 3, 1, 2)
    patches = cut_patches(crop, grid, *places)
    drawn = color.draw(1, CELLS, grid.patch_px, generator)
    shown = color(patches, *drawn)
    rng = random.Random(seed_for(Use.PERSON_LABEL, seed, number))
    return Question(
        number=number,
        label=rng.randrange(len(NEIGHBORS)),
        source=source,
        patches=_as_bytes(patches[0]),
        shown=_as_bytes(shown[0]),
    )


def _as_bytes(patches: Float[Tensor, "9 3 p p"]) -> UInt8[Tensor, "9 3 p p"]:
    return patches.clamp(0, 255).round().to(torch.uint8)


def _image_of(number: int, n_images: int, seed: int) -> int:
    """Returns the image of a question: each image comes once before any comes again."""
    order = _order_of_round(number // n_images, n_images, seed)
    return order[number % n_images]


@functools.lru_cache(maxsize=2)
def _order_of_round(round_number: int, n_images: int, seed: int) -> Sequence[int]:
    rng = random.Random(seed_for(Use.PERSON_IMAGES, seed, round_number))
    return rng.sample(range(n_images), n_images)


def network_answers(
    pretext: PretextModel,
    questions: Sequence[Question],
    *,
    seed: int,
    batch: int,
    config: EncodeConfig,
) -> Float[Tensor, "n 8"]:
    """Returns the probabilities that a network gives each of the eight places, on the CPU.

    It gets the very pixels that the questions are cut from, in the colors that it was trained on,
    without the chroma blur or the aperture of its training.

    Raises:
        UsageError: an answer is not finite.
    """
    color = pretext.patches.color
    answers = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        treated = []
        for question in part:
            patches = question.patches[None].float()
            colors_seed = seed_for(Use.PERSON_NETWORK, seed, question.number)
            generator = torch.Generator().manual_seed(colors_seed)
            drawn = color.draw(1, CELLS, patches.shape[-1], generator)
            treated.append(color(patches, *drawn))
        normalized = pretext.patches.normalize(torch.cat(treated).to(config.device))
        logits = network_logits(pretext, normalized, config)
        labels = torch.tensor([question.label for question in part])
        # Of each grid only the pair that was asked about.
        of_pairs = logits[torch.arange(len(part)), labels]
        answers.append(of_pairs.softmax(dim=1))
    return torch.cat(answers)
