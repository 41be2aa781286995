"""Times each row of the card by the package's own loops, over few batches of its full size.

Each rate is taken three times: as the row runs, with samples in memory (computing alone), and
without networks (reading alone: by the worker processes, and with decode=device by the device that
decodes, too). Networks have random weights, images are few and come
again and again, and files come from the page cache: the disk is not measured.
"""

import collections
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from card_work import Rate
from clock import Clock
from knn import random_rows
from report import once_s
from torch import Tensor

from relloc.data.image_set import ImageSet, Splits
from relloc.data.lists import NOT_THERE, THERE
from relloc.data.loader import ImageBatch, Unreadable, collate
from relloc.data.subsets import Subset
from relloc.data.views import RandomResized, View, Views
from relloc.evals.knn import Knn
from relloc.evals.linear import Linear
from relloc.evals.training import count_hits, draw_held_back
from relloc.evals.voc07 import Voc07
from relloc.evaluation.contract import Context, Evaluation, NullState
from relloc.evaluation.run import NO_FEATURES
from relloc.features.bank import Bank, bank_device, bank_gib, fill_bank
from relloc.features.source import ColorAugmentation, EncodeConfig, FeatureSource, LiveFeatures
from relloc.models.backbone import Backbone
from relloc.pretext import loop
from relloc.pretext.stopping import StopRequest
from relloc.runs import engine
from relloc.runs.build import Pretraining
from relloc.runs.pretraining import make_plan, make_task
from relloc.runs.training import Training, _feed
from relloc.transfer.classifier import count_top_hits
from relloc.transfer.iterations import IterativeFineTuning
from relloc.transfer.semisup import SemiSupervised

# Classes of ImageNet, Places205 and iNaturalist 2018 (docs/protocols.md 3.3, 3.5 and 3.6), which
# the data sets' lists tell where they are at hand.
N_CLASSES = {"in1k": 1000, "places205": 205, "inat18": 8142}
_VOC_CLASSES = 20
# An image of VOC2007 shows 1.5 of its 20 classes on average.
_SHARE_POSITIVE = 0.075
# A low rate keeps the losses of random weights finite, and changes no time.
_LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is written and timed.

    Attributes:
        photographs: JPEGs that stand for those of ImageNet and of VOC2007.
        warm_up, batches: batches of the pretraining and of frozen evaluations, not counted and
            counted. Together they are a multiple of ten, as one batch in ten is held back; each is
            a multiple of the 16 steps that heads take together on a GPU.
        first_steps, steps: the same of fine-tuning.
        annotated, tested: images with boxes and class maps to train on, and to test on.
        most_classes, most_kept: the most classes of linear heads, and of images whose features SVMs
            and nearest neighbors work on; None for those of the published sets.
    """

    photographs: int
    warm_up: int
    batches: int
    first_steps: int
    steps: int
    annotated: int
    tested: int
    most_classes: int | None = None
    most_kept: int | None = None

    def n_classes(self, data: str) -> int:
        """Returns the number of classes of linear heads on a data set."""
        return min(N_CLASSES[data], self.most_classes or N_CLASSES[data])

    def n_kept(self, n_images: int) -> int:
        """Returns of how many images features are kept, where a protocol has `n_images`."""
        return min(n_images, self.most_kept or n_images)


class Repeated(Subset):
    """`n` images that are few ones again and again, in `n_classes` classes in turn."""

    def __init__(self, images: ImageSet, n: int, n_classes: int) -> None:
        super().__init__(images=images, indices=[place % len(images) for place in range(n)])
        self.classes = tuple(map(str, range(n_classes)))
        self.labels = [place % n_classes for place in range(n)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidentConfig(EncodeConfig):
    """Reads one batch of views, and gives it again and again, as if readers took no time."""

    def _load(
        self,
        images: ImageSet,
        view: View,
        batches: Iterable[list[Any]],
        color: ColorAugmentation | None = None,
    ) -> Iterator[ImageBatch]:
        read = Views(images, view, color.draw if color else None)
        first = None
        for keys in batches:
            first = first or collate([read[key] for key in keys], pin=self.device.type == "cuda")
            drawn = None if first.drawn is None else first.drawn[: len(keys)]
            yield ImageBatch(
                pixels=first.pixels[: len(keys)],
                indices=torch.tensor([key[0] for key in keys]),
                unreadable={},
                drawn=drawn,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows are timed with.

    Attributes:
        backbone: the network, on the device.
        images: the photographs.
        config: how images are read and encoded.
        sizes: how much is timed.
    """

    backbone: Backbone
    images: ImageSet
    config: EncodeConfig
    sizes: Sizes

    @property
    def device(self) -> torch.device:
        return self.config.device

    def context(
        self,
        config: EncodeConfig,
        splits: Splits,
        train: FeatureSource = NO_FEATURES,
        held_out: FeatureSource = NO_FEATURES,
    ) -> Context:
        """Returns what the runner would give an evaluation."""
        return Context(
            backbone=self.backbone,
            splits=splits,
            train=train,
            held_out=held_out,
            encode_config=config,
            seed=0,
            state=NullState(),
            folder=Path(),
        )

    def rate(
        self,
        work: Callable[[EncodeConfig], object],
        images: ImageSet,
        view: View,
        *,
        batch: int,
        warm_up: int,
    ) -> Rate:
        """Returns the images a second of `work`, which goes once through `images` in `view`."""
        clock = Clock(self.device, warm_up=warm_up)
        timed = dataclasses.replace(self.config, progress=clock.progress)
        fields = {each.name: getattr(timed, each.name) for each in dataclasses.fields(timed)}
        resident = ResidentConfig(**fields)
        # First with samples in memory: what is compiled or chosen once is so before readers start,
        # which would have batches ready by its end.
        computing = clock.per_s(lambda: work(resident))
        running = clock.per_s(lambda: work(timed))
        indices = torch.arange(len(images)).split(batch)
        keys = [[(index, index) for index in of_batch.tolist()] for of_batch in indices]
        reading = clock.per_s(lambda: exhaust(timed.read(images, view, keys, len(keys), "reading")))
        return Rate(
            running=running * batch,
            computing=computing * batch,
            reading=reading * batch,
            decodes_on_device=self.config.decode == "device",
        )

    def features(self, view: View, layers: Sequence[str], batch: int) -> Rate:
        """Returns the images a second whose features are computed and kept."""
        images = self.repeated(batch, self.sizes.warm_up + self.sizes.batches)

        def keep(config: EncodeConfig) -> None:
            source = LiveFeatures(self.backbone, images, config, view)
            kept_on = bank_device(bank_gib(source, layers), self.device)
            fill_bank(source, layers, batch, kept_on)

        return self.rate(keep, images, view, batch=batch, warm_up=self.sizes.warm_up)

    def repeated(self, batch: int, n_batches: int, n_classes: int = 1) -> Repeated:
        """Returns the photographs again and again, as many as the batches need."""
        return Repeated(self.images, n_batches * batch, n_classes)


def exhaust(items: Iterable[Any]) -> None:
    """Takes all items and keeps none."""
    collections.deque(items, maxlen=0)


def evaluation_rates(
    evaluation: Evaluation, bench: Bench, data: str, n_images: tuple[int, int], splits: Splits
) -> dict[str, Rate]:
    """Returns the rates of an evaluation by the names of its work (`card_work`).

    `data` is the name of its data set, whose published splits have `n_images`. `splits` are the
    images with boxes or class maps that stand for them.
    """
    if isinstance(evaluation, Linear):
        rates = linear_rates(evaluation, bench, bench.sizes.n_classes(data))
    elif isinstance(evaluation, Knn):
        rates = knn_rates(evaluation, bench, n_images)
    elif isinstance(evaluation, Voc07):
        rates = svm_rates(evaluation, bench, n_images)
    elif isinstance(evaluation, SemiSupervised):
        rates = semi_supervised_rates(evaluation, bench, bench.sizes.n_classes(data))
    elif isinstance(evaluation, IterativeFineTuning):
        rates = fine_tuning_rates(evaluation, bench, splits)
    else:
        raise TypeError(f"{type(evaluation).__name__} can't be timed: add it here")
    # Networks and their optimizers refer to themselves.
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def linear_rates(linear: Linear, bench: Bench, n_classes: int) -> dict[str, Rate]:
    """Times an epoch of all heads, and the test of all of them."""
    sizes = bench.sizes
    n_batches = sizes.warm_up + sizes.batches
    images = bench.repeated(linear.batch, n_batches, n_classes)
    training = linear._training()
    tenth = draw_held_back(len(images), seed=0)
    view = linear.augment or linear.view

    def source(config: EncodeConfig, view: View, color: Any = None) -> LiveFeatures:
        return LiveFeatures(bench.backbone, images, config, view, color=color)

    unread = source(bench.config, view)
    heads = {}
    for layer in linear.layers:
        heads[layer] = training._new_heads(unread, layer, 0, bench.device)

    def train(config: EncodeConfig) -> None:
        for of_layer in heads.values():
            of_layer.train()
        augmented = source(config, view, linear.color)
        training._train_epoch(heads, augmented, tenth, 0, bench.device, 0)

    def test(config: EncodeConfig) -> None:
        indices = torch.arange(len(images))
        count_hits(heads, source(config, linear.view), indices, linear.batch, bench.device)

    of_batches = {"batch": linear.batch, "warm_up": sizes.warm_up}
    return {
        "training": bench.rate(train, images, view, **of_batches),
        "test": bench.rate(test, images, linear.view, **of_batches),
    }


def knn_rates(knn: Knn, bench: Bench, n_images: tuple[int, int]) -> dict[str, Rate]:
    """Times features, and the vote on all queries by a whole bank of random vectors."""
    device = bench.device
    n_classes = bench.sizes.n_classes("in1k")
    one_image = bench.repeated(1, 1, n_classes)
    source = LiveFeatures(bench.backbone, one_image, bench.config, knn.view)
    generator = torch.Generator(device).manual_seed(0)
    banks = []
    for n in map(bench.sizes.n_kept, n_images):
        kept_on = bank_device(bank_gib(source, knn.layers, n), device)
        features = {}
        for layer in knn.layers:
            # As features after a ReLU none is below zero.
            features[layer] = random_rows(n, source.dims[layer], generator, kept_on, relu=True)
        labels = torch.randint(n_classes, (n,))
        banks.append(Bank(features=features, labels=labels, n_classes=n_classes, channels={}))
    train, queries = banks
    context = bench.context(bench.config, _splits(one_image), train, queries)
    # Once on few queries, so that kernels are loaded.
    few = {layer: rows[:64] for layer, rows in queries.features.items()}
    few_queries = dataclasses.replace(queries, features=few, labels=queries.labels[:64])
    exhaust(knn.run(dataclasses.replace(context, held_out=few_queries)))
    seconds = once_s(lambda: exhaust(knn.run(context)), device)
    search = Rate(running=queries.n / seconds)
    # The banks of ImageNet fill much of a GPU, and are not needed for the features.
    del train, queries, banks, features, context, few, few_queries
    return {"features": bench.features(knn.view, knn.layers, knn.batch), "search": search}


def svm_rates(svm: Voc07, bench: Bench, n_images: tuple[int, int]) -> dict[str, Rate]:
    """Times features, and the whole of solving on features of as many random views."""
    view: Any = svm.view
    random_view = RandomResized(crop_px=view.side_px)
    generator = torch.Generator().manual_seed(0)
    teacher = None
    banks = []
    for n in map(bench.sizes.n_kept, n_images):
        images = Repeated(bench.images, n, _VOC_CLASSES)
        source = LiveFeatures(bench.backbone, images, bench.config, random_view)
        kept_on = bank_device(bank_gib(source, svm.layers), bench.device)
        bank = fill_bank(source, svm.layers, svm.batch, kept_on)
        # Classes are recognized by the last layer in part, as those of real photographs.
        rows = bank.features[svm.layers[-1]].cpu()
        if teacher is None:
            teacher = torch.randn(rows.shape[1], _VOC_CLASSES, generator=generator)
        labels = _presence(rows @ teacher, generator)
        banks.append(dataclasses.replace(bank, labels=labels))
    train, held_out = banks
    splits = _splits(Repeated(bench.images, 1, _VOC_CLASSES))
    context = bench.context(bench.config, splits, train, held_out)
    seconds = once_s(lambda: exhaust(svm.run(context)), bench.device)
    return {
        "features": bench.features(svm.view, svm.layers, svm.batch),
        "solving": Rate(running=len(svm.layers) / seconds),
    }


def _presence(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Returns presence (n classes): of each class the images with the highest noisy scores."""
    standardized = (scores - scores.mean(dim=0)) / (scores.std(dim=0) + 1e-6)
    noisy = standardized + torch.randn(scores.shape, generator=generator)
    # A class has to have some images in each fold.
    n_positive = max(4, round(_SHARE_POSITIVE * len(scores)))
    highest = noisy.topk(n_positive, dim=0).indices
    presence = torch.full(scores.shape, NOT_THERE, dtype=torch.int64)
    return presence.scatter_(0, highest, THERE)


def semi_supervised_rates(
    evaluation: SemiSupervised, bench: Bench, n_classes: int
) -> dict[str, Rate]:
    """Times an epoch of one setting, and the test."""
    sizes = bench.sizes
    batch = evaluation.batch
    images = bench.repeated(batch, sizes.first_steps + sizes.steps, n_classes)
    once = dataclasses.replace(evaluation, epochs=1, milestone_epochs=())
    setting = dataclasses.replace(once.settings[0], learning_rate=_LEARNING_RATE)
    networks = []

    def train(config: EncodeConfig) -> None:
        context = bench.context(config, _splits(images))
        network, _ = once._fine_tune(context, images, setting, [], None)
        networks[:] = [network]

    training = bench.rate(train, images, once.augment, batch=batch, warm_up=sizes.first_steps)

    # Tests have as many images at once as features that are kept.
    test_batch = bench.config.batch
    tested = bench.repeated(test_batch, sizes.warm_up + sizes.batches, n_classes)

    def test(config: EncodeConfig) -> None:
        count_top_hits(networks[0], tested, evaluation.view, config)

    testing = bench.rate(test, tested, evaluation.view, batch=test_batch, warm_up=sizes.warm_up)
    return {"training": training, "test": testing}


def fine_tuning_rates(
    evaluation: IterativeFineTuning, bench: Bench, splits: Splits
) -> dict[str, Rate]:
    """Times iterations of a training, and its whole test on the images that are there."""
    sizes = bench.sizes
    clock = Clock(bench.device, warm_up=sizes.first_steps)
    n_steps = sizes.first_steps + sizes.steps
    timed = dataclasses.replace(bench.config, progress=clock.progress)
    context = bench.context(timed, splits)
    # Those of COCO are counted in epochs of the whole set.
    iterations = int(evaluation.published["iterations"])
    evaluation = dataclasses.replace(evaluation, iterations=iterations)

    training = evaluation.training(context)
    for group in training.optimizer.param_groups:
        group["lr"] = _LEARNING_RATE
    training.length = n_steps

    def train() -> None:
        training.step = 0
        exhaust(training.reports(every=n_steps))

    running = clock.per_s(train)
    reading = clock.per_s(lambda: exhaust(evaluation.micro_batches(context, 0, n_steps)))
    untimed = bench.context(bench.config, splits)
    in_memory = list(evaluation.micro_batches(untimed, 0, min(n_steps, 8)))
    training.micro_batches = lambda first, end: clock.progress(
        itertools.islice(itertools.cycle(in_memory), end - first)
    )
    computing = clock.per_s(train)

    def test() -> None:
        evaluation.test(training.network, untimed, final=False)

    # Once before, so that kernels are loaded.
    test()
    seconds = once_s(test, bench.device)
    return {
        "training": Rate(running=running, computing=computing, reading=reading),
        "test": Rate(running=len(splits.held_out) / seconds),
    }


def pretraining_rate(
    settings: Pretraining, how: engine.Engine, images: ImageSet, sizes: Sizes
) -> Rate:
    """Times optimizer steps of the pretraining, without monitors and checkpoints."""
    data = _splits(images)
    plan = make_plan(settings, data, how)
    task = make_task(
        settings, how, steps_per_epoch=plan.steps_per_epoch, accumulation=plan.accumulation
    )
    training = Training(
        settings=settings,
        engine=how,
        data=data,
        task=task,
        plan=plan,
        identity={},
        milestones={},
        run_dir=Path(),
        stop=StopRequest(),
    )
    n_steps = sizes.warm_up + sizes.batches
    clock = Clock(how.device, warm_up=sizes.warm_up)
    side = settings.patches.grid.span_px
    shape = (plan.forward_images, side, side, 3)
    resident = torch.randint(256, shape, dtype=torch.uint8, device=how.device)

    def forwards() -> Iterator[Tensor]:
        unreadable = Unreadable(n_images=len(images), most_share=1)
        return iter(_feed(training, 0, unreadable))

    stepper = loop.Stepper(task)
    task.model.train()

    def train(forwards: Iterator[Tensor]) -> None:
        for step in clock.progress(range(n_steps)):
            stepper.step(forwards, step)

    def read(forwards: Iterator[Tensor]) -> None:
        for _ in clock.progress(range(n_steps)):
            exhaust(itertools.islice(forwards, plan.accumulation))

    with engine.training(how):
        # First of all what is compiled.
        computing = clock.per_s(lambda: train(itertools.repeat(resident.permute(0, 3, 1, 2))))
        running = clock.per_s(lambda: train(forwards()))
        reading = clock.per_s(lambda: read(forwards()))
    n_images = settings.images_per_step
    return Rate(
        running=running * n_images,
        computing=computing * n_images,
        reading=reading * n_images,
        decodes_on_device=settings.decode == "device",
    )


def _splits(images: ImageSet) -> Splits:
    """Returns these images both to train on and to test on."""
    return Splits(train=images, held_out=images)
