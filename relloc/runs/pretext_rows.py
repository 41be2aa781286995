"""Measures the pretext accuracy of a finished training on held-out images, as rows of results.

Every network is asked about the eight pairs with the center, so that networks are compared on the
same questions (`pretext/top1`). One that was trained on other questions is also asked these
(`pretext/top1_trained`), whose chance may be another one.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from relloc.checkpoints import backbone_files
from relloc.files import path_as_text
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.held_out import accuracy, answers
from relloc.pretext.questions import CENTER_PAIRS, Questions
from relloc.pretext.relative_location import about_center
from relloc.results import Result, append_results, read_results
from relloc.runs.evaluated_models import name_of_model
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import held_out_crops
from relloc.runs.training import Training


def measure_pretext(training: Training, folder: RunFolder) -> None:
    """Measures the pretext accuracy on held-out images, unless an earlier start did.

    An image gives several questions. The interval (95 %) is a t interval over source images, since
    the answers about one image depend on each other.
    """
    if any(row.kind == "pretext" for row in read_results(folder.path)):
        return
    network = training.task.model
    center = about_center(network)
    # A network is asked as at the end of its curriculum.
    curriculum = training.settings.training_patches.curriculum
    as_asked = "as in training" if curriculum is None else "as at the end of training"
    rows = []
    if center is not None:
        patches = training.settings.patches.about_center
        row = _measure(training, folder, center, CENTER_PAIRS, patches)
        how = f"center crop, eight pairs with the center, jitter and colors {as_asked}"
        rows.append(dataclasses.replace(row, headline=True, details=(how, *row.details)))
    if center is not network:
        questions = network.questions
        row = _measure(training, folder, network, questions, training.settings.patches)
        chance = f"chance is {questions.chance_percent:.1f} %"
        how = f"center crop, {questions.n_questions} questions, jitter and colors {as_asked}"
        of_trained = dataclasses.replace(
            row,
            metric="top1_trained",
            column="held out, questions as trained",
            # The number that a training is known by, where no other can be measured
            headline=center is None,
            details=(chance, how, *row.details),
        )
        rows.append(of_trained)
    append_results(folder.path, rows)


def _measure(
    training: Training,
    folder: RunFolder,
    network: nn.Module,
    questions: Questions,
    patches: PatchPipeline,
) -> Result:
    """Returns the accuracy of a network on the questions about the held-out images."""
    settings = training.settings
    images = training.data.held_out
    # Batches as large as the ghost batches of training, which are known to fit the device.
    config = dataclasses.replace(
        settings.encode_config(training.engine), batch=settings.images_per_batch_norm
    )
    loaded = held_out_crops(images, range(len(images)), patches.grid, settings.seed, config)
    unreadable = config.unreadable_of(len(images))
    n_batches = math.ceil(len(images) / config.batch)
    # Images that can't be read give no answers: these are the indices of those that do.
    indices: list[int] = []

    def pixels() -> Iterator[Tensor]:
        for batch in config.progress(loaded, "held-out pretext", n_batches):
            unreadable.add_full(batch, images=1)
            indices.extend(batch.indices.tolist())
            yield batch.pixels

    answered = answers(
        network,
        questions,
        pixels(),
        patches,
        seed=settings.seed,
        device=config.device,
        bf16=config.bf16,
    )
    hits = [questions.hits(outputs, truth).cpu() for outputs, truth in answered]
    folder.unreadable |= unreadable.reasons
    sources = [images.source(index) for index in indices]
    backbone = training.task.model.backbone
    strides = (f"network with {backbone.own_strides}",) if backbone.own_strides else ()
    top1 = accuracy(torch.cat(hits), sources, n_questions=questions.n_questions)
    # Every fact about the number has a field of its own, so that reports need not parse words.
    return Result(
        eval="pretext",
        dataset=images.name,
        split=images.split,
        kind="pretext",
        table="Pretext accuracy, top-1",
        column="held out",
        metric="top1",
        value=top1.percent,
        low=top1.low,
        high=top1.high,
        n=top1.n_questions,
        seed=settings.seed,
        protocol="1.1",
        details=("95 % t interval, clustered by source image", *strides),
        checkpoint=path_as_text(folder.path / backbone_files.BACKBONE_FILE),
        model=name_of_model(settings.model.name, backbone),
    )
