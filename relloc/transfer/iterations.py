"""Base class of the evaluations that fine-tune for a number of iterations, such as detectors.

It deals images to steps, trains, saves, resumes, evaluates every so often, and says in results how
a training differs from the published one. What is trained and how it is tested is up to the classes
that derive from it.
"""

import abc
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relloc import checks, ranks
from relloc.data.image_set import ImageSet, Splits
from relloc.data.samples import MakeSample, read_samples
from relloc.errors import DataError
from relloc.evaluation.calibration import calibration_keys
from relloc.evaluation.contract import BATCH_NORMS, Context, Evaluation
from relloc.features.source import EncodeConfig, SeededIndex, no_progress
from relloc.results import Score
from relloc.seeds import Use, seed_for
from relloc.transfer import order
from relloc.transfer.loop import FineTuning, MicroBatch, forward_conditions, split_for_rank
from relloc.transfer.schedule import Schedule

# Steps between reports of the loss. States are saved at reports, if the last one is old enough.
_REPORT_EVERY = 20

S = TypeVar("S")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardSamples(Generic[S]):
    """The samples of one forward, as many of them as could be read.

    `groups` are the numbers of their groups: one GPU of the published training had the samples of a
    group. So a group may have fewer samples than others, or none.
    """

    samples: Sequence[S]
    groups: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterativeFineTuning(Evaluation):
    """A training of weights by SGD with momentum, followed by a test on the held-out images.

    All weights are trained, with weight decay, unless `parameter_groups` says otherwise.

    Attributes:
        iterations: optimizer steps; see `length`.
        batch: images of a step, over all processes.
        images_per_gpu: images that one GPU of the published training had in a step.
        images_per_forward: images in one forward, whose gradients are added up to those of a step;
            None for a process's whole share of the step. Batch norm sees the images of one forward
            of all processes, so fewer images change its statistics.
        learning_rate, momentum, weight_decay: of SGD.
        evaluate_every: iterations between tests; the last one is always after the training.
        batch_norm: whether the backbone begins with batch-norm statistics "as_trained" or
            "recalibrated" on training images, or both in a list for a training of each. They have
            an effect where batch norm is not trained, as a training uses those of its batches.
    """

    kind = "fine-tuned"
    labels = "own"
    across_ranks = True
    calibrates_in_shared_batches = False
    layers = ()
    # Whether all training samples have one size, so that a network is compiled once for them all.
    one_size: ClassVar[bool] = False
    # The order in which images are dealt to steps: one of `relloc.transfer.order`.
    deal = staticmethod(order.steps)
    # The published values of fields; other values are named in results.
    published: ClassVar[Mapping[str, float]]

    iterations: int | None
    batch: int
    images_per_gpu: int
    images_per_forward: int | None
    learning_rate: float
    momentum: float
    weight_decay: float
    evaluate_every: int = dataclasses.field(repr=False)  # decides no number
    # Results are told apart by it anyway, as those of frozen evaluations are.
    batch_norm: str | Sequence[str] = dataclasses.field(default="as_trained", repr=False)

    @abc.abstractmethod
    def make_network(self, context: Context) -> nn.Module:
        """Returns the network to train, made of a copy of the backbone."""

    @abc.abstractmethod
    def schedule(self, length: int) -> Schedule:
        """Returns the schedule of the learning rate of a training of `length` iterations."""

    @abc.abstractmethod
    def training_indices(self, images: ImageSet) -> Sequence[int]:
        """Returns the images to train on, as the protocol may leave out some."""

    @abc.abstractmethod
    def make_sample(self, images: ImageSet) -> MakeSample[Any]:
        """Returns the function that makes a training sample, in a worker process."""

    @abc.abstractmethod
    def batch_of(self, forward: ForwardSamples[Any], device: torch.device) -> Any:
        """Returns the samples of a forward on the device, of which there may be none.

        `images` of what is returned are the network's input.
        """

    @abc.abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Returns the mean loss of what `batch_of` returned."""

    @abc.abstractmethod
    def test(self, network: nn.Module, context: Context, *, final: bool) -> list[Score]:
        """Returns the scores of the network on the held-out images; all processes call it together.

        After the last iteration (`final`) it also draws pictures into `context.folder`.
        """

    def length(self, images: ImageSet) -> int:
        """Returns the number of iterations of the training on `images`.

        A class whose `iterations` may be None says here how many that are.
        """
        if self.iterations is None:
            raise TypeError(f"{type(self).__name__} needs a number of iterations")
        return self.iterations

    def training_images(self, images: ImageSet) -> ImageSet:
        """Returns what the training goes through, such as each image and its mirror image.

        `training_indices`, `kind_of` and `make_sample` are given this set.
        """
        return images

    def before_forward(self, network: nn.Module) -> None:
        """Puts parts of a network that is in training mode into another mode."""

    def kind_of(self, images: ImageSet, index: int) -> Hashable:
        """Returns the kind of an image; images of one kind are put together on a GPU."""
        return None

    def unusable(self, images: ImageSet) -> Mapping[int, str]:
        """Returns why images can't be trained on that `training_indices` leaves out, by index.

        They count as images that can't be read.
        """
        return {}

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Returns the parameters as torch's optimizers take them; others are not trained."""
        return [{"params": list(network.parameters())}]

    def gradient_limit(self) -> float | None:
        """Returns the largest norm of the gradient of a step; None for no limit."""
        return None

    def check_settings(self, setting: str) -> None:
        """Checks the fields of the training configured at `setting`, in `__post_init__`.

        Raises:
            UsageError: a field is out of range, or the batch is not a whole number of groups.
        """
        self.check_length(setting)
        checks.whole(f"{setting}.batch", self.batch)
        checks.whole(f"{setting}.images_per_gpu", self.images_per_gpu)
        checks.whole(f"{setting}.evaluate_every", self.evaluate_every)
        # Groups stay whole, as losses may be normalized over the images of a group.
        checks.multiple(f"{setting}.batch", self.batch, self.images_per_gpu)
        if self.images_per_forward is not None:
            checks.whole(f"{setting}.images_per_forward", self.images_per_forward)
            checks.multiple(
                f"{setting}.images_per_forward", self.images_per_forward, self.images_per_gpu
            )
        checks.some_of(f"{setting}.batch_norm", self.batch_norms(()), BATCH_NORMS)
        checks.number(f"{setting}.learning_rate", self.learning_rate, above=0)
        checks.number(f"{setting}.momentum", self.momentum, at_least=0, at_most=1)
        checks.number(f"{setting}.weight_decay", self.weight_decay, at_least=0)

    def check_length(self, setting: str) -> None:
        """Checks what `length` computes with. Raises `UsageError` if it is out of range."""
        checks.whole(f"{setting}.iterations", self.iterations)

    def batch_norms(self, of_run: Sequence[str]) -> Sequence[str]:
        return [self.batch_norm] if isinstance(self.batch_norm, str) else self.batch_norm

    def calibration_batches(
        self, images: ImageSet, *, n_images: int, seed: int, config: EncodeConfig
    ) -> Iterator[Any]:
        """Yields training samples as a forward of the training takes them, unlabeled.

        There are as many at once as in the largest forward of a single process, so that statistics
        are the same in any number of processes.
        """
        n_groups = self.batch // self.images_per_gpu
        n_forwards = 1
        if self.images_per_forward is not None:
            n_forwards = math.ceil(self.batch / self.images_per_forward)
        size = math.ceil(n_groups / n_forwards) * self.images_per_gpu
        sampled = self.training_images(images)
        batches = calibration_keys(
            self.training_indices(sampled), n_images=n_images, size=size, seed=seed
        )
        read = read_samples(
            sampled,
            self.make_sample(sampled),
            batches,
            workers=config.workers,
            stopping=config.stopping,
        )
        unreadable = config.unreadable_of(len(images))
        what = f"recalibrating batch norm on {images.name} {images.split}"
        for batch in config.progress(read, what, len(batches)):
            unreadable.add(batch.unreadable)
            if batch.samples:
                # Groups have an effect on losses alone.
                forward = ForwardSamples(samples=batch.samples, groups=batch.places)
                yield self.calibration_input(self.batch_of(forward, config.device))

    def calibration_input(self, batch: Any) -> Any:
        """Returns what `calibration_forward` is given of what `batch_of` returned."""
        return batch.images

    def check(self, splits: Splits) -> None:
        """Checks that there are images to train on, and that the batch fits the processes.

        Raises:
            DataError: the protocol leaves no image to train on.
        """
        # Known before the training, as no step could be made of no image.
        if not self.training_indices(self.training_images(splits.train)):
            raise DataError(
                f"{splits.train.name} {splits.train.split} has no image to train on: none of its "
                f"{len(splits.train)} images shows an object of a class of this evaluation"
            )

    def run(self, context: Context) -> Iterator[Score]:
        """Yields the scores on the held-out images after the last iteration.

        The state is saved every so often. On a CPU a resumed training ends with the same bits as
        one that was never stopped.

        Raises:
            DataError: too many images can't be read.
            Diverged: loss or weights are not finite.
        """
        training = self.training(context)
        network = training.network
        # A training that was stopped goes on where its last state was saved.
        saved = context.state.load()
        if saved:
            training.load_state_dict(saved)
        # Only one progress bar can be shown at a time, and that of the training is open.
        encode_config = dataclasses.replace(context.encode_config, progress=no_progress)
        quiet_context = dataclasses.replace(context, encode_config=encode_config)
        # Reports lie at multiples of this, so tests do too.
        report_every = math.gcd(_REPORT_EVERY, self.evaluate_every)
        for report in training.reports(every=report_every):
            logged = {"loss": report.loss, "lr": report.lr}
            context.log(logged, report.step)
            context.state.save(training.state_dict())
            is_due = report.step % self.evaluate_every == 0
            # After the last step comes the final test.
            if is_due and report.step < training.length:
                scores = self.test(network, quiet_context, final=False)
                context.log(_by_metric(scores), report.step)
        scores = self.test(network, context, final=True)
        context.log(_by_metric(scores), training.length)

        # What the test says of its settings comes first, then the training's.
        for score in scores:
            deviations = (*score.deviations, *self.deviations(training.length))
            details = (*score.details, *self._details(network, training.length))
            yield dataclasses.replace(score, deviations=deviations, details=details)

    def training(self, context: Context) -> FineTuning[ForwardSamples[Any]]:
        """Returns the training from its beginning, of a network that is on the device."""
        length = self.length(context.splits.train)
        network = self.make_network(context).to(context.device)
        groups = self.parameter_groups(network)
        # What the optimizer does not get needs no gradients.
        network.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        _match_memory_format(network, context.backbone)
        optimizer = torch.optim.SGD(
            groups,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return FineTuning(
            network,
            optimizer,
            micro_batches=lambda first, end: self.micro_batches(context, first, end),
            loss=self._loss_function(network, context),
            length=length,
            steps_per_unit=1,
            schedule=self.schedule(length),
            synchronized=True,
            seed=context.seed,
            device=context.device,
            bf16=context.encode_config.bf16,
            name=f"fine-tuning on {context.splits.train.name}",
            gradient_limit=self.gradient_limit(),
        )

    def _loss_function(
        self, network: nn.Module, context: Context
    ) -> Callable[[ForwardSamples[Any]], Tensor]:
        """Returns a function that returns the mean loss of the samples of a forward."""
        compiled_loss = self.loss
        # Synchronized batch norm waits for other processes, which nothing compiled can do.
        if self.one_size and ranks.world_size() == 1:
            compiled_loss = context.encode_config.compile(self.loss)
        full_forwards = self.forward_images()

        def loss_of(forward: ForwardSamples[Any]) -> Tensor:
            self.before_forward(network)
            batch = self.batch_of(forward, context.device)
            # Where images could not be read, another number would be compiled anew.
            is_full = len(forward.samples) in full_forwards
            loss = compiled_loss if is_full else self.loss
            return loss(network, batch)

        return loss_of

    @torch.no_grad()
    def forward_training_batches(
        self, network: nn.Module, context: Context, n_batches: int, *, what: str
    ) -> None:
        """Runs the forwards of the first `n_batches` steps as the training does, without learning.

        For what networks gather in training mode, in which it leaves the network. `what` is the
        text beside the progress bar.
        """
        network.train()
        config = context.encode_config
        for step, micro_batches in enumerate(self.micro_batches(context, 0, n_batches, what=what)):
            first_number = ranks.rank() * len(micro_batches)
            for number, micro_batch in enumerate(micro_batches, start=first_number):
                # Of no image there is nothing to gather. But where batch norm is synchronized, the
                # other processes wait in it for this one.
                if not micro_batch.samples and ranks.world_size() == 1:
                    continue
                seed = seed_for(Use.FINE_TUNING_FORWARD, context.seed, step, number)
                with forward_conditions(context.device, bf16=config.bf16, seed=seed):
                    self.before_forward(network)
                    self.loss(network, self.batch_of(micro_batch.content, context.device))

    def micro_batches(
        self, context: Context, first: int, end: int, *, what: str | None = None
    ) -> Iterator[list[MicroBatch[ForwardSamples[Any]]]]:
        """Yields this process's micro-batches of the steps from `first` to before `end`.

        `what` is the text beside the progress bar; None for that of the training.
        """
        images = context.splits.train
        config = context.encode_config
        unreadable = config.unreadable_of(len(images))
        # Images that are left out for a wrong annotation are never read, so they are counted here.
        unusable = {}
        for index, reason in self.unusable(images).items():
            unusable[images.source(index)] = reason
        unreadable.add(unusable)
        sampled = self.training_images(images)
        keys = self._keys(sampled, context.seed, first, end)
        accumulation = self.forwards_in_step()
        # Workers read micro-batches, which are smaller than steps, one after the other.
        batches = read_samples(
            sampled,
            self.make_sample(sampled),
            itertools.chain.from_iterable(keys),
            workers=config.workers,
            stopping=config.stopping,
        )
        what = what or f"fine-tuning on {images.name} {images.split}"
        shown = config.progress(_in_steps(batches, accumulation), what, end - first)
        for step_batches in shown:
            micro_batches = []
            for batch in step_batches:
                unreadable.add(batch.unreadable)
                # Unreadable images are missing, so samples are counted after reading, and those
                # behind them stay in their groups.
                groups = [place // self.images_per_gpu for place in batch.places]
                content = ForwardSamples(samples=batch.samples, groups=groups)
                micro_batches.append(MicroBatch(content=content, samples=len(batch.samples)))
            yield micro_batches

    def read_held_out(
        self,
        context: Context,
        make: MakeSample[S],
        *,
        doing: str,
        batch: int,
        kind_of: Callable[[int], Hashable] = lambda _index: None,
    ) -> Iterator[list[S]]:
        """Yields the samples of this process's part of the held-out images, of those it can read.

        Args:
            context: where the images are, and how they are read.
            make: makes the sample of an image, in a worker process.
            doing: what is shown beside the progress bar before the name of the images.
            batch: most images at once.
            kind_of: only images of one kind are in a batch, given their index.

        Raises:
            DataError: too many images can't be read.
        """
        images = context.splits.held_out
        config = context.encode_config
        keys_of_kind: dict[Hashable, list[SeededIndex]] = defaultdict(list)
        for index in own_part(images):
            # A sample is the same in any batch and in any process.
            key = (index, seed_for(Use.TEST_CROPS, context.seed, index))
            keys_of_kind[kind_of(index)].append(key)
        batches = []
        for keys in keys_of_kind.values():
            for start in range(0, len(keys), batch):
                batches.append(keys[start : start + batch])
        read = read_samples(images, make, batches, workers=config.workers, stopping=config.stopping)
        unreadable = config.unreadable_of(len(images))
        what = f"{doing} {images.name} {images.split}"
        for each in config.progress(read, what, len(batches)):
            unreadable.add(each.unreadable)
            # None is left of a batch whose images are all unreadable.
            if each.samples:
                yield each.samples

    def _keys(
        self, images: ImageSet, seed: int, first: int, end: int
    ) -> Iterator[list[list[SeededIndex]]]:
        """Yields the images of each step as this process's micro-batches, with a seed for each.

        A seed depends on the number of the sample in the whole training alone, so that processes
        and accumulation change no sample.
        """
        # The same order on all processes, each of which takes its part of every step.
        steps = self.deal(
            self.training_indices(images),
            lambda index: self.kind_of(images, index),
            gpus=self.batch // self.images_per_gpu,
            images_per_gpu=self.images_per_gpu,
            seed=seed,
        )
        accumulation = self.forwards_in_step()
        for step, groups in enumerate(itertools.islice(steps, end)):
            # A resumed training passes over the steps that are done.
            if step < first:
                continue
            # Seeds are given before the groups are dealt to processes.
            keyed_groups = []
            position = step * self.batch
            for group in groups:
                keyed = []
                for index in group:
                    sample_seed = seed_for(Use.FINE_TUNING_SAMPLE, seed, position)
                    keyed.append((index, sample_seed))
                    position += 1
                keyed_groups.append(keyed)
            # Groups stay whole, as losses may be normalized over the images of a group.
            micro_batches = []
            for own_groups in split_for_rank(keyed_groups, accumulation):
                keys = list(itertools.chain.from_iterable(own_groups))
                micro_batches.append(keys)
            yield micro_batches

    def forward_images(self) -> tuple[int, int]:
        """Returns the smallest and the largest number of images in a forward of any process."""
        n_groups = self.batch // self.images_per_gpu
        n_forwards = ranks.world_size() * self.forwards_in_step()
        # `split_for_rank` cuts the groups of a step as evenly as possible.
        smallest = n_groups // n_forwards
        largest = math.ceil(n_groups / n_forwards)
        return smallest * self.images_per_gpu, largest * self.images_per_gpu

    def forward_text(self) -> str:
        """Returns the number of images in a forward, such as "4" or "4 to 6"."""
        smallest, largest = self.forward_images()
        if smallest == largest:
            return str(largest)
        return f"{smallest} to {largest}"

    def forwards_in_step(self) -> int:
        """Returns the number of forwards of each process in a step."""
        if self.images_per_forward is None:
            return 1
        images_at_once = ranks.world_size() * self.images_per_forward
        return math.ceil(self.batch / images_at_once)

    def deviations(self, length: int) -> Iterator[str]:
        """Yields how the training, of `length` iterations, differs from the published one."""
        for name, value in self.published.items():
            own = length if name == "iterations" else getattr(self, name)
            if own != value:
                words = name.replace("_", " ")
                yield f"{words} {own:g} instead of {value:g}"

    def _details(self, network: nn.Module, length: int) -> Iterator[str]:
        """Yields the settings of the training, as results have them."""
        yield f"{length} iterations of {self.batch} images"
        yield f"learning rate {self.learning_rate:g}, momentum {self.momentum:g}"
        yield f"weight decay {self.weight_decay:g}"
        if not _trains_batch_norm(network):
            return
        n_processes = ranks.world_size()
        n_images = self.forward_text()
        if n_processes > 1:
            yield f"batch norm synchronized over {n_processes} processes of {n_images} images"
        else:
            yield f"batch norm of one process, over the {n_images} images of a forward"


def own_part(images: ImageSet) -> Sequence[int]:
    """Returns the indices of the images that this process tests."""
    (indices,) = split_for_rank(range(len(images)))
    return indices


def left_out_of_test(images: ImageSet, n_tested: int) -> Iterator[str]:
    """Yields how many of the held-out images were tested, if some can't be read."""
    if n_tested < len(images):
        yield f"tested on {n_tested:,} of {len(images):,} images, as the others can't be read"


def _by_metric(scores: Sequence[Score]) -> dict[str, float]:
    """Returns the values of scores by the names of their metrics."""
    return {score.metric: score.value for score in scores}


def _in_steps(batches: Iterator[Any], accumulation: int) -> Iterator[list[Any]]:
    """Yields the micro-batches of one step after the other."""
    while step_batches := list(itertools.islice(batches, accumulation)):
        yield step_batches


def _trains_batch_norm(network: nn.Module) -> bool:
    """Returns whether a batch norm has weights that are trained, or none at all."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and all(p.requires_grad for p in module.parameters()):
            return True
    return False


def _match_memory_format(network: nn.Module, backbone: nn.Module) -> None:
    """Brings the weights of the network into the memory format that those of the backbone have."""
    # Only convolutions have weights of four axes, to which the memory format applies.
    kernels = [parameter for parameter in backbone.parameters() if parameter.dim() == 4]
    are_channels_last = []
    for kernel in kernels:
        is_channels_last = kernel.is_contiguous(memory_format=torch.channels_last)
        are_channels_last.append(is_channels_last)
    if all(are_channels_last):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
