"""How a run computes: device, precision, and all that makes it fast without changing results."""

import contextlib
import dataclasses
import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from relloc import checks, machine, ranks
from relloc.errors import UsageError
from relloc.runs import console

_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# A gradient that flows into a batch norm is read by several kernels and made from many values. By default the
# compiler then keeps it, in float32; made anew each time it costs a third less memory traffic.
_FUSION: dict[str, Any] = {"realize_acc_reads_threshold": 14}
# Features of all evaluations come from one compiled function, in a variant for each architecture, set of layers and
# size of images: more than the compiler's own limit of 8, beyond which it warns once and compiles no more.
_VARIANTS = 128
_DEVICES = ("auto", "cpu", "cuda")
_PRECISIONS = ("bf16", "tf32", "fp32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings of an engine as they are asked for. "auto" leaves one to the machine, which `settle` looks at."""

    device: str
    precision: str
    compile: bool | str
    cuda_graphs: bool | str
    memory_format: str
    deterministic: bool
    workers: int | str

    def __post_init__(self) -> None:
        checks.one_of("device", self.device, _DEVICES)
        checks.one_of("precision", self.precision, ("auto", *_PRECISIONS))
        checks.one_of("memory_format", self.memory_format, tuple(_MEMORY_FORMATS))
        checks.true_or_false("deterministic", self.deterministic)
        for name in ("compile", "cuda_graphs"):
            if getattr(self, name) != "auto":
                checks.true_or_false(name, getattr(self, name))
        if self.workers != "auto":
            checks.whole("workers", self.workers, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Settled settings of a run. None changes results beyond the rounding of `precision`.

    "bf16" runs forwards in bfloat16 and the rest as "tf32", which rounds the inputs of products to
    19 bits on GPUs that can; "fp32" rounds nothing.
    """

    device: torch.device
    precision: str
    compiled: bool
    cuda_graphs: bool
    memory_format: str
    deterministic: bool
    workers: int

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    def place(self, model: torch.nn.Module) -> None:
        """Move a model to the device, its maps in this engine's memory format."""
        model.to(self.device, memory_format=_MEMORY_FORMATS[self.memory_format])  # pyright: ignore[reportCallIssue] - an overload torch lacks

    def compile(self, function: Any) -> Any:
        """`function` or module, compiled anew for each kind of input it will see; as it is where compiling is off."""
        if not self.compiled:
            return function
        torch._dynamo.config.recompile_limit = _VARIANTS  # pyright: ignore[reportAttributeAccessIssue]
        return _told_by_name(torch.compile(function, dynamic=False, options=_FUSION))

    def __str__(self) -> str:
        words = (
            self.device.type,
            self.precision,
            "compiled" if self.compiled else "not compiled",
            "CUDA graphs" if self.cuda_graphs else "",
            self.memory_format,
            "deterministic" if self.deterministic else "",
            f"{self.workers} workers",
        )
        return ", ".join(filter(None, words))


def settle(asked: EngineSettings) -> Engine:
    """The engine that is asked for, with torch's global switches set accordingly.

    Raises:
        UsageError: a setting that this machine cannot meet.
    """
    on = device(asked.device)
    is_gpu = on.type == "cuda"
    precision = asked.precision
    if precision == "bf16" and not is_gpu:
        raise UsageError(
            "precision=bf16 is for GPUs: torch 2.11 leaves weight gradients of some bfloat16 convolutions "
            "unset on CPUs. Give precision=fp32"
        )
    if precision == "auto":
        precision = (
            "bf16" if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    if asked.cuda_graphs is True and not is_gpu:
        raise UsageError("cuda_graphs=true, but the run is on a CPU: leave auto")
    compiled = _compiled(asked.compile, on)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return Engine(
        device=on,
        precision=precision,
        compiled=compiled,
        cuda_graphs=is_gpu and compiled if asked.cuda_graphs == "auto" else bool(asked.cuda_graphs),
        memory_format=asked.memory_format,
        deterministic=asked.deterministic,
        workers=_workers(asked.workers, on),
    )


@contextlib.contextmanager
def training(engine: Engine) -> Iterator[None]:
    """torch's switches for training: the fastest kernels, or those that give the same bits each time."""
    torch.backends.cudnn.benchmark = not engine.deterministic
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch._inductor.config.deterministic = True  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(engine.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def device(asked: str) -> torch.device:
    """The device asked for; this process's own GPU where there are several.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device=cuda, but torch finds no GPU: check nvidia-smi and that torch was built for its driver, "
            "or give device=cpu"
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = ranks.local_rank()
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"process {index} has no GPU of its own: this machine has {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _compiled(asked: Any, on: torch.device) -> bool:
    """Whether to compile: as asked, where that works; of itself on a GPU.

    Raises:
        UsageError: compile=true, and it does not work here.
    """
    wanted = on.type == "cuda" if asked == "auto" else asked
    missing = why_not_compiled(on) if wanted else ""
    if not missing:
        return wanted
    if asked != "auto":
        raise UsageError(
            f"compile=true, but torch.compile lacks {missing}: install it, or leave auto (the results stay the same)"
        )
    if ranks.local_rank() == 0:
        console.say(f"engine  not compiled, which is slower: torch.compile lacks {missing}")
    return False


@functools.cache
def why_not_compiled(on: torch.device) -> str:
    """What torch.compile lacks on this machine; "" where it works, which a small function tries."""
    if on.type == "cuda":
        # Triton builds a small C library at first use.
        if not any(map(shutil.which, ("cc", "gcc", "clang", os.environ.get("CC", "cc")))):
            return "a C compiler"
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            return "Python.h (the python3-dev package)"
    try:
        torch.compile(lambda values: values * 2 + 1, dynamic=False)(torch.ones(64, device=on))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = _first_line(error)
        if isinstance(error, OSError):
            return f"a folder to write to, which TORCHINDUCTOR_CACHE_DIR names ({reason})"
        compiler = (
            "a C++ compiler, which CXX names,"
            if on.type == "cpu"
            else "a C compiler, which CC names,"
        )
        return f"{compiler} or another part of it ({reason})"
    return ""


def _first_line(error: BaseException) -> str:
    """What an error says, without the advice to developers that torch puts around it."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("backend=")]
    return lines[0] if lines else type(error).__name__


def _told_by_name(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, whose failures to compile what it is given are told by the setting that asked for it."""
    from torch._dynamo.exc import BackendCompilerFailed  # seconds to import, and needed only here

    def call(*given: Any, **named: Any) -> Any:
        try:
            return compiled(*given, **named)
        except BackendCompilerFailed as error:
            raise UsageError(
                f"torch.compile failed ({_first_line(error)}): give compile=false (the results stay the same)"
            ) from error

    return call


def _workers(asked: Any, on: torch.device) -> int:
    """Loader processes: as asked; else a training process's share of the cores but one, a quarter beside a CPU."""
    if asked != "auto":
        return asked
    cores = machine.cores() // ranks.local_world_size()
    # One core is left to the process that feeds a GPU, which has little to do where steps are CUDA graphs.
    return cores // 4 if on.type == "cpu" else max(1, cores - 1)
