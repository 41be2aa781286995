"""The whole optimizer step of pretraining with images on the device: the published form and ours.

The published form (mmselfsup 0.x) encodes each center eight times, in float32 with TF32, 64 images
at a time, and cuts no patches here: they are given to it. Ours begins with uint8 images: it draws,
cuts, treats and normalizes patches, encodes each once, and steps, by the same functions as
`python -m relloc.train`.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from report import arguments, once_s, tell
from torch import Tensor, nn

from relloc.pretext import loop
from relloc.runs import build, engine
from relloc.runs.command_settings import Pretraining
from relloc.runs.pretraining import make_task
from relloc.runs.settings import conf_dir

PUBLISHED_IMAGES = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--patch-px", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--images", type=int, default=512, help="images of a step of ours")
    parser.add_argument("--seconds", type=float, default=10, help="how long each side is timed")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument(
        "--batch-norm",
        choices=("auto", "kernels", "compiled"),
        default="auto",
        help="by kernels in a network that is not compiled, or compiled with it",
    )
    parser.add_argument(
        "--gradients",
        type=Path,
        metavar="FILE",
        help="write loss, gradients and running statistics of the first of our steps there",
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings of relloc.train for our side, such as color=drop"
    )
    options = parser.parse_args()
    rows, ratios, how = [], {}, None
    for patch_px in options.patch_px:
        settings = [
            f"grid.patch_px={patch_px}",
            "grid.resize.px=400",
            f"recipe.images_per_step={options.images}",
        ]
        config = _config([*settings, *options.overrides])
        how = engine.resolve_engine(config.engine)
        theirs = (
            None
            if options.ours_only
            else _side("published", patch_px, *_published(config, how), options)
        )
        with engine.training(how):
            step, task = _ours(config, how, options)
            first = functools.partial(_first_step, step, task, options.gradients)
            ours = _side("ours", patch_px, step, config.images_per_step, options, first)
        rows += [theirs, ours] if theirs else [ours]
        if theirs:
            ratios[f"ours over published at {patch_px} px"] = ours["images/s"] / theirs["images/s"]
    tell(
        f"pretext step, ResNet-50; ours: {how}", rows, ratios, options.json, settings=vars(options)
    )


def _config(overrides: list[str]) -> Pretraining:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.pretraining(
            compose("train", ["model=resnet50", "data=in1k", "data.root=nowhere", *overrides])
        )


def _ours(
    config: Pretraining, how: engine.Engine, options: argparse.Namespace
) -> tuple[Callable[[], Tensor], loop.Task]:
    n_images, side = config.images_per_step, config.patches.grid.span_px
    compile_network = {"auto": None, "kernels": False, "compiled": True}[options.batch_norm]
    task = make_task(
        config, how, steps_per_epoch=1000, accumulation=1, compile_network=compile_network
    )
    task.model.train()
    generator = torch.Generator(how.device).manual_seed(0)
    images = torch.randint(
        256,
        (n_images, side, side, 3),
        dtype=torch.uint8,
        device=how.device,
        generator=generator,
    ).permute(0, 3, 1, 2)
    stepper = loop.Stepper(task)  # as `loop.train` steps; the learning rate is the warm-up's
    return lambda: stepper.step(iter([images]), 0), task


def _first_step(step: Callable[[], Tensor], task: loop.Task, file: Path | None) -> None:
    sums = step()
    if file is None:
        return
    loss, _, asked = sums.tolist()
    model = task.model
    torch.save(
        {
            "loss": {"loss": torch.tensor(loss / asked)},
            "gradients": {name: value.grad for name, value in model.named_parameters()},
            "running statistics": {
                name: value for name, value in model.named_buffers() if "running_" in name
            },
        },
        file,
    )


def _published(config: Pretraining, how: engine.Engine) -> tuple[Callable[[], object], int]:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    trunk = config.model.make_backbone().to(how.device)
    neck = [
        nn.Linear(4096, 4096),
        nn.BatchNorm1d(4096, momentum=0.003),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 8),
    ]
    head = nn.Sequential(*neck).to(how.device)
    optimizer = torch.optim.SGD(
        [*trunk.parameters(), *head.parameters()], lr=0.02, momentum=0.9, weight_decay=1e-4
    )
    px = config.patches.grid.patch_px
    neighbors, centers = torch.randn(2, 8 * PUBLISHED_IMAGES, 3, px, px, device=how.device)
    right = torch.arange(8, device=how.device).repeat(PUBLISHED_IMAGES)

    def step() -> None:
        optimizer.zero_grad()
        pairs = torch.cat([trunk.embed(neighbors), trunk.embed(centers)], 1)
        nn.functional.cross_entropy(head(pairs), right).backward()
        optimizer.step()

    return step, PUBLISHED_IMAGES


def _side(
    name: str,
    patch_px: int,
    step: Callable[[], object],
    n_images: int,
    options: argparse.Namespace,
    first: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Images a second, memory, and the seconds of the first step, in which compiling happens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first_s = once_s(first or step, device)
    once_s(lambda: [step() for _ in range(5)], device)  # among them one that records a CUDA graph
    steps, spent_s = 0, 0.0
    while (
        spent_s < options.seconds
    ):  # ten steps queued at a time, as between two reports of a training
        spent_s += once_s(lambda: [step() for _ in range(10)], device)
        steps += 10
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {
        "side": name,
        "patch px": patch_px,
        "images": n_images,
        "images/s": steps * n_images / spent_s,
        "peak GB": peak,
        "first step s": first_s,
    }


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s in all")
