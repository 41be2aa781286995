"""Detection and segmentation tasks at full size beside torchvision's reference models.

Each task is trained as `python -m relloc.evaluate` trains it: at the batch of its protocol, from
files that its worker processes decode. Images are made (see written_data.py), at the sizes of the
real ones and in their layouts. Beside it torchvision's network of the same kind takes the same
images at the same sizes, in the plain loop of torchvision's own scripts, from the same readers.
Both begin with random weights, and all weights and batch norms are trained.

"ms" is the time of an iteration, the median of several spans, each with all that it waits for.
"waiting" is the share of time in which the training process waited for samples; "read/s" is how
many iterations a second the worker processes read when nothing is trained. "TFLOP" are those
of convolutions and matrix products, forward and backward, of one iteration; networks that differ in
them are to be compared by "TFLOP/s". Nothing is compiled, but for a side "relloc compiled" that
`--compile` adds where all images have one size.

Networks of torchvision: fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn and fcn_resnet50, whose head
is smaller than ours. It has no Faster R-CNN C4, so that beside the pyramid, another architecture,
stands a C4 put together from its parts. Nor has it a Fast R-CNN on given proposals, so that
voc07_fast_rcnn, of the AlexNet-like network and 2,000 random proposals an image, stands alone.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from report import arguments, tell
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.segmentation import fcn_resnet50
from torchvision.ops import MultiScaleRoIAlign
from written_data import write_cityscapes, write_coco, write_voc, write_voc_with_proposals

from relloc.data.annotations import VOID
from relloc.evaluation.contract import Context, NamedEvaluation, NullState
from relloc.evaluation.run import NO_FEATURES
from relloc.models.backbone import Backbone
from relloc.runs import build, engine
from relloc.runs.command_settings import Evaluating
from relloc.runs.settings import conf_dir
from relloc.transfer.detection.anchors import RATIOS
from relloc.transfer.detection.batch import Targets
from relloc.transfer.detection.faster_rcnn_c4 import ANCHOR_SIZES
from relloc.transfer.detection.proposals import C4_TRAINING
from relloc.transfer.detection.samples import DetectionSample, moved_targets
from relloc.transfer.iterations import IterativeFineTuning
from relloc.transfer.loop import MicroBatch

# Longest side of the images of both detection protocols.
_LONGEST_PX = 1333
_PRECISIONS = ("bf16", "tf32", "fp32")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuned evaluation and what it stands beside.

    Attributes:
        write: writes its data set of so many images into a folder.
        twins: torchvision's networks by their names, made for a number of classes.
        model: the member of conf/model that is trained.
        proposals: the folder of proposals below that of the images; empty where there are none.
    """

    write: Callable[[Path, int], None]
    twins: Mapping[str, Callable[[int], nn.Module]]
    model: str = "resnet50"
    proposals: str = ""


def _pyramid(make: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    # Background is one more class. Without weights all layers are trained, with batch norm.
    return lambda n_classes: make(
        weights=None,
        weights_backbone=None,
        num_classes=n_classes + 1,
        trainable_backbone_layers=5,
        max_size=_LONGEST_PX,
    )


def _c4(n_classes: int) -> nn.Module:
    """Returns Faster R-CNN C4 put together from the parts that torchvision has for it.

    Numbers of anchors and proposals are those of `relloc.transfer.detection.faster_rcnn_c4`.
    """
    network = resnet50(weights=None)
    trunk: Any = nn.Sequential(
        nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool),
        network.layer1,
        network.layer2,
        network.layer3,
    )
    trunk.out_channels = 1024
    head = nn.Sequential(network.layer4, nn.BatchNorm2d(2048), nn.AdaptiveAvgPool2d(1))
    return FasterRCNN(
        trunk,
        max_size=_LONGEST_PX,
        rpn_anchor_generator=AnchorGenerator((ANCHOR_SIZES,), (RATIOS,)),
        rpn_pre_nms_top_n_train=C4_TRAINING.before_nms,
        rpn_post_nms_top_n_train=C4_TRAINING.after_nms,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=head,
        box_predictor=FastRCNNPredictor(2048, n_classes + 1),
    )


def _fcn(n_classes: int) -> nn.Module:
    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=n_classes, aux_loss=True)


TASKS = {
    "voc0712_detection": Task(
        write=write_voc,
        twins={"torchvision C4": _c4, "torchvision FPN": _pyramid(fasterrcnn_resnet50_fpn)},
    ),
    "coco_mask_rcnn_fpn_1x": Task(
        write=write_coco, twins={"torchvision": _pyramid(maskrcnn_resnet50_fpn)}
    ),
    "voc12aug_fcn": Task(write=write_voc, twins={"torchvision": _fcn}),
    "cityscapes_fcn": Task(write=write_cityscapes, twins={"torchvision": _fcn}),
    "voc07_fast_rcnn": Task(
        write=write_voc_with_proposals, twins={}, model="alexnet", proposals="proposals"
    ),
}


# Our side where compile=true.
_COMPILED = "relloc compiled"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One of the two networks that are timed.

    Attributes:
        iterations: takes iterations without end, one for each `next`.
        waited: seconds that were waited for samples, one number for each iteration.
    """

    iterations: Generator[None]
    waited: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What does not depend on the precision, by the task: its TFLOP of each side, and reading."""

    tflop: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    read_per_s: dict[str, float] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Times each task at each precision and memory format."""
    options = _options()
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    measured = Measured()
    with tempfile.TemporaryDirectory(prefix="relloc_transfer_") as folder:
        for precision, memory_format, name in itertools.product(
            options.precision, options.memory_format, options.tasks
        ):
            root = (options.root or Path(folder)) / name
            if not root.exists():
                TASKS[name].write(root, options.images)
            found = _timed_task(name, root, precision, memory_format, measured, options)
            rows += found
            ratios |= _ratios(found)
    tell(
        "fine-tuning, images read from files",
        rows,
        ratios,
        options.json,
        settings=vars(options),
    )


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--precision", nargs="+", choices=_PRECISIONS, default=list(_PRECISIONS))
    parser.add_argument(
        "--memory-format",
        nargs="+",
        choices=("channels_last", "contiguous"),
        default=["channels_last"],
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        help="relloc, relloc compiled, torchvision, torchvision C4, torchvision FPN; default: all",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help=f"time our side of tasks of one image size once more, as {_COMPILED!r}",
    )
    parser.add_argument("--images", type=int, default=96, help="to write for each task")
    parser.add_argument("--root", type=Path, help="where to write them, or where they are already")
    parser.add_argument("--seconds", type=float, default=5, help="of each span that is timed")
    parser.add_argument("--spans", type=int, default=3, help="of which the median counts")
    parser.add_argument("--warm-up", type=int, default=6, help="iterations before the first span")
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels and calls that take most time"
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings such as workers=8, device=cpu or eval.NAME.batch=2"
    )
    return parser.parse_args()


def _timed_task(
    name: str,
    root: Path,
    precision: str,
    memory_format: str,
    measured: Measured,
    options: argparse.Namespace,
) -> list[Row]:
    """Returns a row for each side, and notes in `measured` what was not measured yet."""
    engine_settings = [
        f"precision={precision}",
        f"memory_format={memory_format}",
        # Where nothing is compiled nobody need find out whether it could be.
        f"compile={str(options.compile).lower()}",
    ]
    settings = _evaluating(name, root, [*engine_settings, *options.overrides])
    how = engine.resolve_engine(settings.engine)
    (named,), _ = settings.named_evaluations(None)
    evaluation = named.evaluation
    if not isinstance(evaluation, IterativeFineTuning):
        raise TypeError(f"eval={name} does not train for a number of iterations")
    # Those of COCO are counted in epochs of the whole set.
    evaluation = dataclasses.replace(evaluation, iterations=evaluation.published["iterations"])
    backbone = build.model_of_conf(TASKS[name].model).backbone(0)
    how.place(backbone)
    context = _context(settings, how, backbone, named)

    makers: dict[str, Callable[[Context], Side]] = {"relloc": functools.partial(_ours, evaluation)}
    if options.compile and evaluation.one_size:
        makers[_COMPILED] = functools.partial(_ours, evaluation)
    for twin, make_network in TASKS[name].twins.items():
        makers[twin] = functools.partial(_torchvision, make_network, evaluation, how)
    words = precision
    if memory_format == "contiguous":
        words += ", contiguous"
    if name not in measured.read_per_s:
        measured.read_per_s[name] = _read_per_s(evaluation, context)
    rows = []
    for side_name, make in makers.items():
        if options.sides and side_name not in options.sides:
            continue
        is_compiled = side_name == _COMPILED
        side = make(context if is_compiled else _not_compiled(context))
        if is_compiled:
            # The same network; what is compiled can't be counted.
            measured.tflop[name, side_name] = measured.tflop.get((name, "relloc"), float("nan"))
        elif (name, side_name) not in measured.tflop:
            measured.tflop[name, side_name] = _tflop(side)
        seconds, waiting, gigabytes = _timed(side, how.device, options)
        # Networks and their optimizers refer to themselves.
        del side
        gc.collect()
        row = {
            "task": name,
            "side": side_name,
            "engine": words,
            "ms": 1000 * seconds,
            "it/s": 1 / seconds,
            "hours": seconds * evaluation.published["iterations"] / 3600,
            "waiting %": 100 * waiting,
            "read/s": measured.read_per_s[name],
            "GB": gigabytes,
            "TFLOP": measured.tflop[name, side_name],
            "TFLOP/s": measured.tflop[name, side_name] / seconds,
        }
        rows.append(row)
        # Whoever stops a long run has what was measured by then.
        print(row, file=sys.stderr, flush=True)
    return rows


def _read_per_s(evaluation: IterativeFineTuning, context: Context) -> float:
    """Returns how many iterations a second worker processes read when nothing is trained."""
    workers = max(1, context.encode_config.workers)
    steps = evaluation.micro_batches(context, 0, 3 * workers)
    # Each worker's first batch comes with its start.
    for _ in range(workers):
        next(steps)
    started = time.perf_counter()
    n_read = sum(1 for _ in steps)
    return n_read / (time.perf_counter() - started)


def _evaluating(name: str, root: Path, overrides: Sequence[str]) -> Evaluating:
    data = f"eval.{name}.data"
    task = TASKS[name]
    words = [
        "checkpoint=random",
        f"model={task.model}",
        f"eval=[{name}]",
        f"{data}.root={root}",
        # The written sets have other numbers of images than the real ones.
        f"{data}.source.published_images=null",
        *overrides,
    ]
    if task.proposals:
        words.append(f"{data}.proposals={root / task.proposals}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.evaluating(compose("evaluate", words))


def _context(
    settings: Evaluating, how: engine.Engine, backbone: Backbone, named: NamedEvaluation
) -> Context:
    return Context(
        backbone=backbone,
        splits=named.splits,
        train=NO_FEATURES,
        held_out=NO_FEATURES,
        encode_config=settings.encode_config(how, shown=False),
        seed=0,
        state=NullState(),
        folder=Path(),
    )


def _not_compiled(context: Context) -> Context:
    """Returns the context of a run with compile=false."""
    encode_config = dataclasses.replace(context.encode_config, compile=lambda function: function)
    return dataclasses.replace(context, encode_config=encode_config)


def _ours(evaluation: IterativeFineTuning, context: Context) -> Side:
    """Returns the training that `python -m relloc.evaluate` runs."""
    training = evaluation.training(context)
    waited: list[float] = []
    source = training.micro_batches

    def timed(first: int, end: int) -> Iterator[Sequence[MicroBatch[Any]]]:
        return _waited(source(first, end), waited)

    training.micro_batches = timed

    def iterations() -> Generator[None]:
        # A report for each iteration would have the process wait for the GPU.
        steps = training.micro_batches(0, training.length)
        training.network.train()
        for step, micro_batches in enumerate(steps):
            training._take_step(step, micro_batches)
            yield

    return Side(iterations=iterations(), waited=waited)


def _torchvision(
    make: Callable[[int], nn.Module],
    evaluation: IterativeFineTuning,
    how: engine.Engine,
    context: Context,
) -> Side:
    """Returns torchvision's network in the loop of torchvision's references/*/train.py."""
    network = make(len(context.splits.train.classes))
    how.place(network)
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=1e-4,  # the rate changes no time; a low one keeps losses finite
        momentum=evaluation.momentum,
        weight_decay=evaluation.weight_decay,
    )
    find_loss = _detection_loss if hasattr(network, "roi_heads") else _segmentation_loss
    waited: list[float] = []

    def iterations() -> Generator[None]:
        length = evaluation.length(context.splits.train)
        steps = evaluation.micro_batches(context, 0, length)
        for micro_batches in _waited(steps, waited):
            samples = list(itertools.chain(*(each.content.samples for each in micro_batches)))
            with torch.autocast(how.device.type, torch.bfloat16, enabled=how.bf16):
                value = find_loss(network, evaluation, samples, how.device)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            yield

    return Side(iterations=iterations(), waited=waited)


def _detection_loss(
    network: Any,
    evaluation: IterativeFineTuning,
    samples: Sequence[DetectionSample],
    device: torch.device,
) -> Tensor:
    """Returns the loss of torchvision's detector, which resizes and normalizes images itself."""
    # Its transform draws the shorter side of each image from a list; here that is ours.
    short_sides = iter([min(sample.size) for sample in samples])
    network.transform.torch_choice = lambda _sizes: next(short_sides)
    images = []
    targets = []
    for sample, moved in zip(samples, _mirrored_targets(samples, device), strict=True):
        pixels = torch.from_numpy(sample.image).to(device, non_blocking=True)
        image = pixels.permute(2, 0, 1).float() / 255
        images.append(image.flip(-1) if sample.flip else image)
        # 0 is background.
        target = {"boxes": moved.boxes, "labels": moved.classes + 1}
        if moved.masks is not None:
            target["masks"] = moved.masks
        targets.append(target)
    losses = network(images, targets)
    return torch.stack(list(losses.values())).sum()


def _mirrored_targets(samples: Sequence[DetectionSample], device: torch.device) -> list[Targets]:
    """Returns the objects of each sample in pixels of its original image, mirrored as that is."""
    at_own_size = []
    for sample in samples:
        height, width = sample.image.shape[:2]
        at_own_size.append(dataclasses.replace(sample, size=(height, width)))
    return moved_targets(at_own_size, device)


def _segmentation_loss(
    network: nn.Module, evaluation: Any, samples: Sequence[Any], device: torch.device
) -> Tensor:
    batch = evaluation.augment.batch(samples, device)
    logits = network(batch.images)
    # As `criterion` of torchvision's references/segmentation/train.py.
    decode = cross_entropy(logits["out"], batch.class_maps, ignore_index=VOID)
    auxiliary = cross_entropy(logits["aux"], batch.class_maps, ignore_index=VOID)
    return decode + 0.5 * auxiliary


def _waited(steps: Iterator[Any], seconds: list[float]) -> Iterator[Any]:
    """Yields the steps, and adds the seconds that each was waited for."""
    while True:
        started = time.perf_counter()
        step = next(steps, None)
        seconds.append(time.perf_counter() - started)
        if step is None:
            return
        yield step


def _timed(
    side: Side, device: torch.device, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Returns seconds an iteration, the share waited, and peak GB. Ends the side."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    # The first iteration of a process starts workers and loads kernels.
    _take(side, 1, device)
    warm_up_s = _take(side, options.warm_up, device)
    n_iterations = max(2, round(options.seconds * options.warm_up / warm_up_s))
    seconds = []
    shares = []
    for _ in range(options.spans):
        n_before = len(side.waited)
        spent = _take(side, n_iterations, device)
        seconds.append(spent / n_iterations)
        shares.append(sum(side.waited[n_before:]) / spent)
    gigabytes = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else float("nan")
    if options.profile:
        _profile(side, 4, device)
    side.iterations.close()
    return statistics.median(seconds), statistics.median(shares), gigabytes


def _tflop(side: Side) -> float:
    """Returns the TFLOP of the first iteration."""
    with FlopCounterMode(display=False) as counter:
        next(side.iterations)
    return counter.get_total_flops() / 1e12


def _take(side: Side, n: int, device: torch.device) -> float:
    """Returns the seconds that `n` iterations take until the device is done with them."""
    started = time.perf_counter()
    for _ in range(n):
        next(side.iterations)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _profile(side: Side, n: int, device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds = _take(side, n, device)
    averages = profile.key_averages()
    busy = sum(event.self_device_time_total for event in averages) / 1e6
    print(f"{n} iterations, profiled: {seconds:.2f} s, of which kernels {busy:.2f} s")
    for key in ("self_device_time_total", "self_cpu_time_total"):
        print(averages.table(sort_by=key, row_limit=22, max_name_column_width=60))


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    ratios = {}
    if not rows or rows[0]["side"] != "relloc":
        return ratios
    ours, *twins = rows
    for twin in twins:
        where = f"{ours['task']}, {ours['engine']}, to {twin['side']}"
        ratios[f"{where}: iterations/s"] = ours["it/s"] / twin["it/s"]
        ratios[f"{where}: TFLOP/s"] = ours["TFLOP/s"] / twin["TFLOP/s"]
    return ratios


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    main()
