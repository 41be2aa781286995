"""Measures everything that the study of shortcuts reports, in one pass over each split."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc.data.image_set import ImageSet, Role
from relloc.data.subsets import evenly_spaced
from relloc.data.views import View
from relloc.errors import DataError
from relloc.evaluation.contract import Context, PretextModel
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import Color
from relloc.seeds import Use, seed_for
from relloc.studies.shortcuts import distortions
from relloc.studies.shortcuts.findings import NETWORK, NOISE, PHOTOGRAPHS, Findings
from relloc.studies.shortcuts.network import NetworkPositions
from relloc.studies.shortcuts.position import MapPositions, PatchPositions, held_back_sources
from relloc.studies.shortcuts.questions import (
    NOISE_BLOCK,
    Kind,
    Question,
    Strengths,
    ask,
    noise_images,
    questions,
)
from relloc.studies.shortcuts.reading import (
    MakeStudiedImage,
    SinglePatches,
    StudiedImage,
    read_images,
)

# Of the noise that cells of maps are found in, one image of so many is held back.
_HELD_BACK_EVERY = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured; the fields are settings of `relloc.studies.shortcuts.study.Shortcuts`."""

    layers: Sequence[str]
    view: View
    batch: int
    n_images: int
    train_images: int
    noise_images: int
    single: SinglePatches
    network_epochs: int
    colors: Mapping[str, Color]
    strengths: Strengths

    def measure(self, context: Context) -> Findings:
        """Fits regressors on training images, tests them, and asks the pretext network.

        Raises:
            DataError: too many images can't be read, or none of a split.
        """
        regressors = self._regressors(context)
        view_px = self._learn(regressors, context)
        asked = []
        if context.pretext and context.asks_pretext:
            asked = questions(context.pretext, self.colors, self.strengths)
        answers: dict[str, list[Tensor]] = {question.name: [] for question in asked}
        sources = self._test(regressors, asked, answers, context)
        for block, n in _blocks(self.noise_images // 2):
            pixels = _noise_views(block, n, view_px, context, split=1)
            regressors.noise.test(context.encode_config.to_device(pixels))
        self._ask_about_noise(asked, answers, context)

        patch_errors = regressors.patches.errors()
        if regressors.network:
            for color, errors in regressors.network.errors().items():
                patch_errors[color, NETWORK] = errors
        return Findings(
            asked=tuple(asked),
            right={name: torch.cat(parts) for name, parts in answers.items()},
            patch_errors=patch_errors,
            map_errors={
                PHOTOGRAPHS: regressors.maps.errors(),
                NOISE: regressors.noise.errors(),
            },
            sources=tuple(sources),
            single=self.single,
        )

    def _regressors(self, context: Context) -> "_Regressors":
        device = context.encode_config.device
        bf16 = context.encode_config.bf16
        # Patches are normalized as the network was trained on them.
        normalize = context.pretext.patches.normalize if context.pretext else ByDataset()
        network = None
        if self.network_epochs:
            network = NetworkPositions(
                self.colors,
                normalize,
                epochs=self.network_epochs,
                seed=context.seed,
                device=device,
            )
        return _Regressors(
            patches=PatchPositions(
                context.backbone,
                self.layers,
                self.colors,
                normalize,
                bf16=bf16,
                seed=context.seed,
                device=device,
            ),
            network=network,
            maps=MapPositions(context.backbone, self.layers, bf16=bf16, device=device),
            noise=MapPositions(context.backbone, self.layers, bf16=bf16, device=device),
        )

    def _learn(self, regressors: "_Regressors", context: Context) -> int:
        """Fits all regressors, and returns the side of a view in pixels."""
        images = context.splits.train
        indices = evenly_spaced(len(images), self.train_images)
        held_back = held_back_sources(images.source(index) for index in indices)
        view_px = 0
        # The network is not asked about training images.
        for read in self._read("train", images, indices, None, context):
            is_held_back = np.array([image.source in held_back for image in read])
            regressors.patches.learn(read, is_held_back)
            if regressors.network:
                regressors.network.learn(read)
            regressors.maps.learn(_views(read, context), is_held_back)
            view_px = len(read[0].view)
        if not view_px:
            raise _none_readable(images)
        for block, n in _blocks(self.noise_images // 2):
            pixels = _noise_views(block, n, view_px, context, split=0)
            is_held_back = np.arange(n) % _HELD_BACK_EVERY == 0
            regressors.noise.learn(context.encode_config.to_device(pixels), is_held_back)
        regressors.finish()
        return view_px

    def _test(
        self,
        regressors: "_Regressors",
        asked: Sequence[Question],
        answers: Mapping[str, list[Tensor]],
        context: Context,
    ) -> list[str]:
        """Tests regressors and asks about held-out images, whose sources it returns."""
        images = context.splits.held_out
        indices = evenly_spaced(len(images), self.n_images)
        device = context.encode_config.device
        sources = []
        pretext = context.pretext if asked else None
        for read in self._read("held_out", images, indices, pretext, context):
            sources += [image.source for image in read]
            regressors.patches.test(read)
            if regressors.network:
                regressors.network.test(read)
            regressors.maps.test(_views(read, context))
            if pretext is None:
                continue
            seeds = []
            for image in read:
                seeds.append(seed_for(Use.SHORTCUT_QUESTIONS, context.seed, image.index))
            squares: dict[Kind, Tensor] = {
                "photograph": _stacked([image.crop for image in read], device),
                "corner": _stacked([image.corner for image in read], device),
            }
            self._ask(pretext, asked, squares, seeds, answers, context)
        if not sources:
            raise _none_readable(images)
        return sources

    def _ask_about_noise(
        self, asked: Sequence[Question], answers: Mapping[str, list[Tensor]], context: Context
    ) -> None:
        pretext = context.pretext
        if pretext is None or not asked:
            return
        grid = pretext.patches.grid
        side = grid.span_px + 2 * self.strengths.margin_px(grid)
        config = context.encode_config
        # A GPU is asked about many images at once.
        images_at_once = _images_at_once(config.device)
        starts = range(0, self.noise_images, images_at_once)
        for start in config.progress(starts, "shortcuts, noise", len(starts)):
            end = min(start + images_at_once, self.noise_images)
            parts = []
            for block, n in _blocks(end)[start // NOISE_BLOCK :]:
                drawn = noise_images(
                    block,
                    n,
                    side,
                    self.strengths.smooth_px,
                    seed=context.seed,
                    device=config.device,
                )
                parts.append(drawn)
            images: dict[Kind, Tensor] = {}
            for kind in parts[0]:
                images[kind] = torch.cat([drawn[kind] for drawn in parts])
            seeds = []
            for number in range(start, end):
                seeds.append(seed_for(Use.SHORTCUT_NOISE_QUESTIONS, context.seed, number))
            self._ask(pretext, asked, images, seeds, answers, context)

    def _ask(
        self,
        pretext: PretextModel,
        asked: Sequence[Question],
        images: Mapping[Kind, Tensor],
        seeds: Sequence[int],
        answers: Mapping[str, list[Tensor]],
        context: Context,
    ) -> None:
        """Asks the questions about these kinds of images, and adds the answers."""
        about_these = [question for question in asked if question.kind in images]
        config = context.encode_config
        size = _images_at_once(config.device)
        for start in range(0, len(seeds), size):
            part = slice(start, start + size)
            of_part: dict[Kind, Tensor] = {}
            for kind, batch in images.items():
                of_part[kind] = batch[part]
            right = ask(pretext, about_these, of_part, seeds[part], bf16=config.bf16)
            for name, of_images in right.items():
                answers[name].append(of_images)

    def _read(
        self,
        role: Role,
        images: ImageSet,
        indices: Sequence[int],
        pretext: PretextModel | None,
        context: Context,
    ) -> Iterator[list[StudiedImage]]:
        grid = pretext.patches.grid if pretext else None
        make = MakeStudiedImage(
            images=images,
            view=self.view,
            single=self.single,
            grid=grid,
            margin_px=self.strengths.margin_px(grid) if grid else 0,
        )
        config = context.encode_config
        return read_images(images, indices, role, make, config, batch=self.batch, seed=context.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Regressors:
    """What finds positions: in single patches, in maps of photographs, and in maps of noise."""

    patches: PatchPositions
    network: NetworkPositions | None
    maps: MapPositions
    noise: MapPositions

    def finish(self) -> None:
        """Fits all of them to what they have learned."""
        self.patches.finish()
        if self.network:
            self.network.finish()
        self.maps.finish()
        self.noise.finish()


def _images_at_once(device: torch.device) -> int:
    """Returns how many images the network is asked about at once, a multiple of `NOISE_BLOCK`.

    A GPU needs many to be busy. On a CPU tensors as large as those of 64 images are given back to
    the system each time, and getting them anew took a third of the time.
    """
    return NOISE_BLOCK if device.type == "cpu" else 8 * NOISE_BLOCK


def _stacked(squares: Sequence[np.ndarray], device: torch.device) -> UInt8[Tensor, "b 3 s s"]:
    pixels = torch.from_numpy(np.stack(squares)).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).contiguous()


def _views(images: Sequence[StudiedImage], context: Context) -> Float[Tensor, "b 3 s s"]:
    config = context.encode_config
    return config.to_device(_stacked([image.view for image in images], config.device))


def _blocks(n_images: int) -> list[tuple[int, int]]:
    """Returns the numbers of blocks of noise, and of how many images each is."""
    blocks = []
    for start in range(0, n_images, NOISE_BLOCK):
        blocks.append((start // NOISE_BLOCK, min(NOISE_BLOCK, n_images - start)))
    return blocks


def _noise_views(
    block: int, n: int, side_px: int, context: Context, *, split: int
) -> UInt8[Tensor, "n 3 s s"]:
    """Returns white noise as large as a view; `split`: 0 to learn from, 1 to test on."""
    device = context.encode_config.device
    seed = seed_for(Use.SHORTCUT_NOISE_VIEWS, context.seed, split, block)
    generator = torch.Generator(device).manual_seed(seed)
    return distortions.white_noise(NOISE_BLOCK, side_px, generator)[:n]


def _none_readable(images: ImageSet) -> DataError:
    return DataError(
        f"study.shortcuts: none of the images of {images.name} {images.split} can be read"
    )
