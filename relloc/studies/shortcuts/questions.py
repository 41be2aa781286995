"""What the network of the pretext task is asked, of photographs and of noise.

Noise shows nothing: patches of it that are alike in all positions are answered right in one of
eight cases by any network. A network that is right more often, or less often, sees something of the
shortcut that a change of the noise has opened.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from relloc.evaluation.contract import PretextModel
from relloc.geometry import PatchGrid
from relloc.patches.pipeline import Color, PatchPipeline
from relloc.pretext.questions import CENTER_PAIRS
from relloc.seeds import Use, seed_for
from relloc.studies.shortcuts import distortions

# What a question is about: the central square of a photograph, a corner of it, white noise, smooth
# noise, or the field that noise through a lens is made of.
Kind = Literal["photograph", "corner", "white", "smooth", "field"]
# Images of noise that are drawn at once: a fixed number, since one generator draws them all.
NOISE_BLOCK = 16
AS_TRAINED = "as trained"
# The interpolation of the lens reaches so many pixels beyond the point that it samples.
_INTERPOLATION_PX = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strengths:
    """How strongly each shortcut is opened.

    Attributes:
        lens: lateral chromatic aberrations, in parts of the distance from the center of the image.
        shift_px: the largest shift between the color channels, at the middle of a side.
        border_px: the width of a black or mirrored border.
        jpeg_quality: of the compressed noise, 1 to 100.
        jpeg_shift_px: by how much the grid of the blocks is moved the second time, 1 to 7.
        smooth_px: the deviation of the Gaussian window that makes noise smooth.
    """

    lens: Sequence[float]
    shift_px: int
    border_px: int
    jpeg_quality: int
    jpeg_shift_px: int
    smooth_px: float

    def margin_px(self, grid: PatchGrid) -> int:
        """Returns how far a crop has to reach beyond the grid that the network was trained on."""
        # For what moves into the grid
        from_lens = max(self.lens) * grid.span_px / 2
        moved = math.ceil(max(self.shift_px, from_lens)) + _INTERPOLATION_PX
        # Patches with a small gap between them span more than those that were trained to adjoin.
        wider = math.ceil((_close(grid, _small_gap(grid)).span_px - grid.span_px) / 2)
        return max(moved, wider)


def _unchanged(images: Tensor) -> Tensor:
    return images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One way to make patches, whose positions the network is asked.

    Attributes:
        name: without spaces, for metrics.
        title: the same in words.
        kind: of the images.
        change: what is done to the images before patches are cut out of their center.
        color: the name of the color treatment.
        patches: how they are cut, treated and normalized.
        strength: on the axis of a picture, where the question is one of a series.
    """

    name: str
    title: str
    kind: Kind
    patches: PatchPipeline
    change: Callable[[Tensor], Tensor] = _unchanged
    color: str = AS_TRAINED
    strength: float = 0.0

    @property
    def is_about_photographs(self) -> bool:
        """Whether its images are photographs, and no noise."""
        return self.kind in ("photograph", "corner")

    @property
    def view(self) -> str:
        """Where the patches lie, in words."""
        if self.kind == "photograph":
            return "grids of patches at the center"
        return "grids of patches in a corner" if self.kind == "corner" else "grids of patches"

    def has_images_of(self, other: "Question") -> bool:
        """Whether both are about the same images, changed in the same way."""
        return self.kind == other.kind and self.change is other.change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """The number that decides whether a network uses a shortcut: a difference of two accuracies.

    Attributes:
        shortcut: its name, for metrics. title: in words.
        question: the name of the question whose accuracy counts.
        control: the question whose accuracy is subtracted, or None for that of guessing.
        only_above: whether a lower accuracy than that of the control tells nothing.
    """

    shortcut: str
    title: str
    question: str
    control: str | None
    only_above: bool = False


def questions(
    pretext: PretextModel, colors: Mapping[str, Color], strengths: Strengths
) -> list[Question]:
    """Returns all questions; those about the same images stand together."""
    return [
        *_about_photographs(pretext.patches, colors, strengths),
        *_about_lenses(pretext.patches, colors, strengths),
        *_about_noise(pretext.patches, strengths),
    ]


def contrasts(strengths: Strengths, patches: PatchPipeline) -> list[Contrast]:
    """Returns the differences that the verdicts are about, one for each shortcut."""
    shift = strengths.shift_px
    lens = max(strengths.lens)
    return [
        Contrast(
            shortcut="lens",
            title=f"chromatic aberration of {100 * lens:g} % in noise",
            question=lens_noise(lens),
            control=None,
        ),
        Contrast(
            shortcut="channel_shift",
            title=f"green {shift} px inward against {shift} px outward",
            question=radial_shift(shift),
            control=radial_shift(-shift),
        ),
        Contrast(
            shortcut="black_border",
            title=f"black border of {strengths.border_px} px on noise",
            question="noise_black_border",
            control=None,
        ),
        Contrast(
            shortcut="mirrored_border",
            title=f"mirrored border of {strengths.border_px} px on noise",
            question="noise_mirrored_border",
            control=None,
        ),
        Contrast(
            shortcut="jpeg_grid",
            title=f"blocks of JPEG (quality {strengths.jpeg_quality}) in smooth noise",
            question="noise_jpeg",
            # Smooth noise may be continued from one patch to the next.
            control="noise_smooth",
        ),
        Contrast(
            shortcut="continuity_noise",
            title="smooth noise in adjoining patches",
            question="noise_smooth_gap_0",
            control=None,
        ),
        Contrast(
            shortcut="continuity",
            title=f"adjoining patches against {_small_gap(patches.grid)} px apart",
            question="gap_0",
            control=small_gap_name(patches),
            only_above=True,
        ),
    ]


def lens_noise(fraction: float) -> str:
    """Returns the name of the question about noise through a lens, colors as trained."""
    return f"noise_lens_{fraction:g}"


def radial_shift(shift_px: int) -> str:
    """Returns the name of the question about photographs whose green lies further inward."""
    return f"shift_inward_{shift_px}_px"


def horizontal_shift(shift_px: int) -> str:
    """Returns the name of the question about photographs whose green lies further right."""
    return f"shift_right_{shift_px}_px"


def small_gap_name(patches: PatchPipeline) -> str:
    """Returns the name of the question about photographs with a gap of an eighth of a patch."""
    return f"gap_{_small_gap(patches.grid)}"


def shifts(strengths: Strengths) -> list[int]:
    """Returns the shifts between channels in pixels, in increasing order and without 0."""
    most = strengths.shift_px
    return [shift for shift in range(-most, most + 1) if shift]


def _about_photographs(
    patches: PatchPipeline, colors: Mapping[str, Color], strengths: Strengths
) -> list[Question]:
    plain = Question(
        name="photographs", title="photographs as trained", kind="photograph", patches=patches
    )
    half_side = patches.grid.span_px / 2

    # A lens, with each color treatment
    strongest = max(strengths.lens)
    through_lens = dataclasses.replace(
        plain,
        name="lens",
        title=f"photographs through a further lens of {100 * strongest:g} %",
        change=functools.partial(distortions.through_lens, fraction=strongest),
    )
    asked = []
    for question in (plain, through_lens):
        asked.append(question)
        for color in colors:
            asked.append(_with_color(question, color, colors))

    # Shifted channels
    for shift in shifts(strengths):
        inward = functools.partial(distortions.through_lens, fraction=shift / half_side)
        radial = dataclasses.replace(
            plain,
            name=radial_shift(shift),
            title=f"green {shift} px further inward at the middle of a side",
            change=inward,
            strength=shift,
        )
        right = functools.partial(distortions.shifted_to_the_right, shift_px=shift)
        horizontal = dataclasses.replace(
            plain,
            name=horizontal_shift(shift),
            title=f"green {shift} px further right everywhere",
            change=right,
            strength=shift,
        )
        asked += [radial, horizontal]

    # The border of the photograph
    corner = dataclasses.replace(
        plain, name="corner", title="patches at a corner of the photograph", kind="corner"
    )
    asked.append(corner)

    # Patches that adjoin, and patches nearly as close that do not
    for gap in (0, _small_gap(patches.grid)):
        close = dataclasses.replace(
            plain,
            name=f"gap_{gap}",
            title=f"gap of {gap} px without jitter",
            patches=_with_gap(patches, gap),
            strength=gap,
        )
        asked.append(close)
    return asked


def _about_lenses(
    patches: PatchPipeline, colors: Mapping[str, Color], strengths: Strengths
) -> list[Question]:
    asked = []
    for fraction in (0.0, *strengths.lens):
        question = Question(
            name=lens_noise(fraction),
            title=f"gray noise through a lens of {100 * fraction:g} %",
            kind="field",
            change=functools.partial(distortions.field_through_lens, fraction=fraction),
            patches=patches,
            strength=fraction,
        )
        asked.append(question)
    strongest = max(asked, key=lambda question: question.strength)
    for color in colors:
        asked.append(_with_color(strongest, color, colors))
    return asked


def _about_noise(patches: PatchPipeline, strengths: Strengths) -> list[Question]:
    span = patches.grid.span_px
    border = {"border_px": strengths.border_px, "side_px": span}
    jpeg = {"quality": strengths.jpeg_quality, "side_px": span}
    compressed = functools.partial(distortions.jpeg, offset_px=0, **jpeg)
    plain = Question(name="noise", title="white noise", kind="white", patches=patches)
    black = dataclasses.replace(
        plain,
        name="noise_black_border",
        title="white noise with a black border",
        change=functools.partial(distortions.with_black_border, **border),
    )
    mirrored = dataclasses.replace(
        plain,
        name="noise_mirrored_border",
        title="white noise with a mirrored border",
        change=functools.partial(distortions.with_mirrored_border, **border),
    )
    # In white noise blocks would hardly show.
    smooth = Question(name="noise_smooth", title="smooth noise", kind="smooth", patches=patches)
    in_blocks = dataclasses.replace(
        smooth, name="noise_jpeg", title="smooth noise as JPEG", change=compressed
    )
    # Without jitter each patch meets the blocks at a phase of its own.
    without_jitter = dataclasses.replace(
        in_blocks,
        name="noise_jpeg_without_jitter",
        title="smooth noise as JPEG, patches without jitter",
        patches=_with_gap(patches, patches.grid.gap_px),
    )
    shifted = dataclasses.replace(
        smooth,
        name="noise_jpeg_shifted",
        title=f"smooth noise as JPEG, grid moved by {strengths.jpeg_shift_px} px",
        change=functools.partial(distortions.jpeg, offset_px=strengths.jpeg_shift_px, **jpeg),
    )
    adjoining = dataclasses.replace(
        smooth,
        name="noise_smooth_gap_0",
        title="smooth noise, gap of 0 px without jitter",
        patches=_with_gap(patches, 0),
    )
    return [plain, black, mirrored, smooth, adjoining, in_blocks, without_jitter, shifted]


def _with_color(question: Question, name: str, colors: Mapping[str, Color]) -> Question:
    """Returns the question with another color treatment than that of the training."""
    return dataclasses.replace(
        question,
        name=f"{question.name}_{name}",
        title=f"{question.title}, colors {name}",
        color=name,
        patches=dataclasses.replace(question.patches, color=colors[name]),
    )


def _with_gap(patches: PatchPipeline, gap_px: int) -> PatchPipeline:
    return dataclasses.replace(patches, grid=_close(patches.grid, gap_px))


def _close(grid: PatchGrid, gap_px: int) -> PatchGrid:
    # It may span more than images are resized to. Its patches are cut out of squares that are
    # large enough already (see `Strengths.margin_px`), so it resizes nothing.
    # Patches of one size, between which there is the gap that is asked about
    unscaled = dataclasses.replace(grid, scale=None, yoked_scale=False, resize=None)
    return dataclasses.replace(unscaled, gap_px=gap_px, jitter_px=0)


def _small_gap(grid: PatchGrid) -> int:
    """Returns an eighth of a patch: lines are interrupted, and the content is nearly as close."""
    return max(1, grid.patch_px // 8)


@torch.no_grad()
def ask(
    pretext: PretextModel,
    asked: Sequence[Question],
    images: Mapping[Kind, Tensor],
    seeds: Sequence[int],
    *,
    bf16: bool,
) -> dict[str, Int[Tensor, "b"]]:
    """Returns the right answers (0 to 8) of each image to each question, by the question's name.

    Args:
        images: a batch of bytes (b 3 s s) of each kind, or of fields (b 1 t t), all of the same b.
        seeds: one for each image. Questions that differ in their images alone get the same jitter
            and the same random colors, so that differences of accuracies are paired.
    """
    [device, *_] = {batch.device for batch in images.values()}
    drawn_before: dict[str, tuple[Tensor, ...]] = {}
    answers = {}
    changed = images[asked[0].kind]
    made_for: Question | None = None
    for question in asked:
        patches = question.patches
        key = f"{patches.grid} {patches.color}"
        if key not in drawn_before:
            drawn_before[key] = _draw(patches, seeds, device)
        # Several questions in a row may be about the same changed images.
        if made_for is None or not question.has_images_of(made_for):
            changed = question.change(images[question.kind])
            made_for = question
        squares = distortions.central(changed, patches.grid.span_px)
        made = patches.make(squares, *drawn_before[key])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = pretext.network(made)
        right = CENTER_PAIRS.truth(*drawn_before[key])
        answers[question.name] = CENTER_PAIRS.hits(logits, right)
    # Copied to the CPU at the end, so that the device is not waited for between questions.
    return {name: right.cpu() for name, right in answers.items()}


def _draw(patches: PatchPipeline, seeds: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """Returns the random numbers of a batch, which are each image's own, whatever the batch is."""
    generator = torch.Generator(device)
    of_images = []
    for seed in seeds:
        generator.manual_seed(seed)
        of_images.append(patches.draw(1, generator))
    return tuple(torch.cat(parts) for parts in zip(*of_images, strict=True))


def noise_images(
    block: int, n: int, side_px: int, smooth_px: float, *, seed: int, device: torch.device
) -> dict[Kind, Tensor]:
    """Returns noise of each kind, the first `n` images of a block of `NOISE_BLOCK`."""
    generator = torch.Generator(device).manual_seed(seed_for(Use.SHORTCUT_NOISE, seed, block))
    # Whole blocks are drawn, so that an image does not depend on how many there are.
    white = distortions.white_noise(NOISE_BLOCK, side_px, generator)
    smooth = distortions.smooth_noise(NOISE_BLOCK, side_px, smooth_px, generator)
    field = distortions.gray_field(NOISE_BLOCK, side_px, generator)
    return {"white": white[:n], "smooth": smooth[:n], "field": field[:n]}
