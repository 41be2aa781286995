"""Batch norm by kernels in a network that is not compiled, beside the compiled network.

Each side trains in a process of its own, with empty caches of compiled code, by
`benchmarks/pretext_step.py`. The first step holds all compiling. Loss, gradients and running
statistics of the first step at the first `--patch-px` are compared with those of a network in
float32 that is not compiled and has ordinary batch norms, which pass one ghost batch after the
other. A difference is the norm of the difference over that of the float32 side, tensor by tensor.

`--passes` times single batch norms of a ResNet-50 instead, and tells how fast they move memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import REPOSITORY, arguments, median_s, tell
from torch import Tensor, nn

from relloc.models.ghost_batch_norm import GhostBatchNorm, Groups, kernels_take

_SIDES = ("kernels", "compiled")
_EXACT = ("compile=false", "cuda_graphs=false", "precision=fp32")

# A batch norm takes away what this bias adds, so that its gradient is rounding alone.
_WITHOUT_GRADIENT = "head.neck.0.bias"

# Batch norms of a ResNet-50: channels, pixels of a patch for each of a map, and whether a shortcut
# is added
_NORMS = (
    (64, 2, False),
    (64, 4, False),
    (256, 4, True),
    (128, 8, False),
    (512, 8, True),
    (256, 16, False),
    (1024, 16, True),
    (512, 32, False),
    (2048, 32, True),
)
# How often maps are read or written, by whether a shortcut is added
_MAPS_OF_FORWARD = {False: 3, True: 4}
_MAPS_OF_BACKWARD = {False: 5, True: 8}
_REPEATED = 10

# kind, such as "gradients" -> name of a tensor -> tensor
Saved = dict[str, dict[str, Tensor]]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--patch-px", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--images", type=int, default=512, help="images of a step")
    parser.add_argument("--seconds", type=float, default=5, help="how long each side is timed")
    parser.add_argument("overrides", nargs="*", help="settings of relloc.train")
    parser.add_argument("--passes", action="store_true", help="time single batch norms instead")
    options = parser.parse_args()
    if options.passes:
        _tell_passes(options)
        return
    timed = ["--seconds", str(options.seconds)]
    first_px, *other_px = options.patch_px
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        saved = {}
        for side in _SIDES:
            file = Path(scratch, f"{side}.pt")
            how = ["--batch-norm", side, *timed]
            rows += _run(options, Path(scratch, side), first_px, how, file)
            for patch_px in other_px:
                rows += _run(options, Path(scratch, f"{side}_{patch_px}"), patch_px, how)
            saved[side] = torch.load(file, map_location="cpu")
        file = Path(scratch, "exact.pt")
        _run(options, Path(scratch, "exact"), first_px, ["--seconds", "0.01"], file, _EXACT)
        exact = torch.load(file, map_location="cpu")
    ratios = {}
    for patch_px in options.patch_px:
        kernels, compiled = [row for row in rows if row["patch px"] == patch_px]
        for name in ("images/s", "peak GB", "first step s"):
            if compiled[name]:
                ratios[f"{name} at {patch_px} px, kernels over compiled"] = (
                    kernels[name] / compiled[name]
                )
    tell("batch norm by kernels, and compiled", rows, ratios, options.json, settings=vars(options))
    rows, ratios = _compare(saved, exact)
    differences_json = options.json and options.json.with_suffix(".differences.json")
    tell("difference to float32", rows, ratios, differences_json, settings=vars(options))


def _run(
    options: Any,
    folder: Path,
    patch_px: int,
    how: list[str],
    gradients: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Returns the row of one side; `folder` is new, and holds what it compiles."""
    folder.mkdir()
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "pretext_step.py"), "--ours-only"]
    command += ["--patch-px", str(patch_px), "--images", str(options.images), *how]
    if gradients:
        command += ["--gradients", str(gradients)]
    command += ["--json", str(folder / "rows.json"), *options.overrides, *overrides]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    seconds = time.monotonic() - started
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    side = how[1] if how[0] == "--batch-norm" else "float32"
    return [{**row, "side": side, "whole process s": seconds} for row in rows]


def _tell_passes(options: Any) -> None:
    """Prints milliseconds and TB/s of each batch norm in both directions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = Groups(images=min(64, options.images), rows_per_image=(8, 1))
    rows = []
    for patch_px in options.patch_px:
        for c, pixels, has_shortcut in _NORMS:
            norm = GhostBatchNorm(nn.BatchNorm2d(c), groups).to(device)
            shape = (9 * options.images, c, patch_px // pixels, patch_px // pixels)
            x, shortcut, *grads = (
                torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last)
                for _ in range(4)
            )
            x.requires_grad_()
            shortcut.requires_grad_()
            added = shortcut if has_shortcut else None
            wanted = [x, *norm.parameters()]
            if has_shortcut:
                wanted.append(shortcut)
            # In a ResNet two layers read a result with a shortcut.
            readers = 2 if has_shortcut else 1

            def forward(norm: GhostBatchNorm = norm, x: Tensor = x, added: Any = added) -> Any:
                return norm.with_relu(x, added)

            def both(
                forward: Callable[[], Any] = forward,
                wanted: list[Tensor] = wanted,
                grads: list[Tensor] = grads,
                readers: int = readers,
            ) -> None:
                torch.autograd.grad(forward()[:readers], wanted, grads[:readers])

            sides = {"forward": _repeated(forward, device), "both": _repeated(both, device)}
            seconds = median_s(sides, device=device, rounds=10)
            seconds["backward"] = seconds["both"] - seconds["forward"]
            row = {"patch px": patch_px, "c": c, "side": shape[-1], "shortcut": has_shortcut}
            maps = {
                "forward": _MAPS_OF_FORWARD[has_shortcut],
                "backward": _MAPS_OF_BACKWARD[has_shortcut],
            }
            for name in maps:
                of_one = seconds[name] / _REPEATED
                row[f"{name} ms"] = 1e3 * of_one
                row[f"{name} TB/s"] = maps[name] * 2 * x.numel() / of_one / 1e12
            row["kernels"] = kernels_take(x)
            rows.append(row)
    tell("batch norms by themselves", rows, {}, options.json, settings=vars(options))


def _repeated(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns a function that does `work` several times, on a GPU as a CUDA graph.

    To launch its kernels one by one would take the host longer than some of them need.
    """

    def repeat() -> None:
        for _ in range(_REPEATED):
            work()

    if device.type == "cpu":
        return repeat
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        repeat()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        repeat()
    return graph.replay


def _compare(
    saved: dict[str, Saved], exact: Saved
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Returns rows of the largest differences, and by how much those of kernels are larger."""
    rows: list[dict[str, Any]] = []
    ratios = {}
    for kind, tensors in exact.items():
        of_sides = {side: _differences(saved[side][kind], tensors) for side in _SIDES}
        of_sides["kernels to compiled"] = _differences(
            saved["kernels"][kind], saved["compiled"][kind]
        )
        for side, differences in of_sides.items():
            worst = max(differences, key=lambda name: differences[name])
            row = {
                "of": kind,
                "side": side,
                "largest": differences[worst],
                "median": torch.tensor(list(differences.values())).median().item(),
                "largest of": worst,
            }
            rows.append(row)
        of_kernels, of_compiled = of_sides["kernels"], of_sides["compiled"]
        if kind == "gradients":
            excess = {name: of_kernels[name] / max(of_compiled[name], 1e-9) for name in of_kernels}
            worst = max(excess, key=lambda name: excess[name])
            ratios[f"largest of kernels' differences over compiled ones' ({worst})"] = excess[worst]
    return rows, ratios


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((found[name] - value).norm() / value.norm().clamp(min=1e-12)).item()
        for name, value in expected.items()
        if name != _WITHOUT_GRADIENT
    }


if __name__ == "__main__":
    main()
