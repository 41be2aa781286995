"""Chooses how a run computes: device, precision, compilation, memory format, loader processes.

Only the precision changes results, by rounding. Everything else changes how fast a run is.
"""

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
from relloc.runs.compiled_code import keep_compiled_code
from relloc.terminal import quantity

_MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# A gradient that flows into a batch norm is computed from many values and read by several kernels.
# By default the compiler then stores it, in float32. Computing it again for each of the kernels
# takes a third less memory traffic.
_FUSION: dict[str, Any] = {"realize_acc_reads_threshold": 14}
# Features of all evaluations come from one function, which is compiled for each architecture, set
# of layers and size of images. After 8 compilations of a function, its default limit, torch.compile
# warns once and compiles no more.
_MAX_VARIANTS = 128
_DEVICES = ("auto", "cpu", "cuda")
_PRECISIONS = ("bf16", "tf32", "fp32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of an engine as a user writes them; `resolve_engine` resolves "auto".

    Args:
        device: "cpu", "cuda" or "auto".
        precision: "bf16", "tf32", "fp32" or "auto"; see `Engine`.
        memory_format: "channels_last" or "contiguous", the layout of feature maps.
        deterministic: True to get the same bits each time on the same machine.
        workers: number of loader processes of each training process.
        runs: folder below which compiled code is kept.
    """

    device: str
    precision: str
    compile: bool | str
    cuda_graphs: bool | str
    memory_format: str
    deterministic: bool
    workers: int | str
    runs: str

    def __post_init__(self) -> None:
        checks.one_of("device", self.device, _DEVICES)
        checks.one_of("precision", self.precision, ("auto", *_PRECISIONS))
        checks.one_of("memory_format", self.memory_format, tuple(_MEMORY_FORMATS))
        checks.true_or_false("deterministic", self.deterministic)
        for name in ("compile", "cuda_graphs"):
            value = getattr(self, name)
            if value != "auto":
                checks.true_or_false(name, value)
        if self.workers != "auto":
            checks.whole("workers", self.workers, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How a run computes. Nothing here changes results beyond the rounding of `precision`.

    "bf16" runs forwards in bfloat16 and everything else as "tf32". "tf32" rounds the inputs of
    matrix products and convolutions to 19 bits on GPUs that can do so. "fp32" rounds nothing.
    """

    device: torch.device
    precision: str
    compiled: bool
    cuda_graphs: bool
    memory_format: str
    deterministic: bool
    workers: int
    # Fine-tuning is compiled only where compile=true asks for it: with "auto" it is not, since a
    # compiled segmenter was no faster (docs/benchmarks.md).
    fine_tuning_compiled: bool = False

    @property
    def bf16(self) -> bool:
        """True if forwards run in bfloat16."""
        return self.precision == "bf16"

    @property
    def fuses(self) -> bool:
        """True if frozen ResNets compute convolution, batch norm and ReLU at once.

        That is a part of compiling, which rounds otherwise, and less, in bfloat16.
        """
        return self.compiled and self.bf16

    def place(self, model: torch.nn.Module) -> None:
        """Moves a model to the device, with its weights in this engine's memory format."""
        model.to(self.device, memory_format=_MEMORY_FORMATS[self.memory_format])  # pyright: ignore[reportCallIssue] - an overload torch lacks

    def compile(self, function: Any) -> Any:
        """Returns a function or module compiled, or as it is where compiling is off.

        It is compiled at its first call, and again for each new shape of its inputs.
        """
        if not self.compiled:
            return function
        torch._dynamo.config.recompile_limit = _MAX_VARIANTS  # pyright: ignore[reportAttributeAccessIssue]
        compiled = torch.compile(function, dynamic=False, options=_FUSION)
        return _with_explained_failures(compiled)

    def compile_training(self, function: Any) -> Any:
        """Returns a function of fine-tuning compiled where that was asked for, or as it is."""
        return self.compile(function) if self.fine_tuning_compiled else function

    def __str__(self) -> str:
        words = [self.device.type, self.precision]
        words.append("compiled" if self.compiled else "not compiled")
        if self.cuda_graphs:
            words.append("CUDA graphs")
        words.append(self.memory_format)
        if self.deterministic:
            words.append("deterministic")
        words.append(quantity(self.workers, "worker"))
        return ", ".join(words)


def resolve_engine(asked: EngineSettings) -> Engine:
    """Resolves settings for this machine, and sets global switches of torch and CUDA.

    These are torch's switches for precision, and CUDA's number of queues.

    Raises:
        UsageError: this machine can't meet a setting.
    """
    # CUDA reads this once, when it starts. By default 8 queues lead to a GPU, and streams beyond
    # these share one: nvJPEG's, of which there are more, would wait for whole training steps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    on = device(asked.device)
    is_gpu = on.type == "cuda"
    precision = _precision(asked.precision, is_gpu=is_gpu)
    if asked.cuda_graphs is True and not is_gpu:
        raise UsageError("cuda_graphs=true, but the run is on a CPU: leave auto")
    may_compile = is_gpu if asked.compile == "auto" else asked.compile
    if may_compile:
        keep_compiled_code(Path(asked.runs))
    compiled = _compiled(asked.compile, on)
    # A graph replays the kernels of a step without the cost of launching each. Networks that are
    # not compiled can have graphs too, if they are asked for.
    cuda_graphs = is_gpu and compiled
    if asked.cuda_graphs != "auto":
        cuda_graphs = bool(asked.cuda_graphs)
    # These switches are global in torch: for products of matrices, and for convolutions.
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return Engine(
        device=on,
        precision=precision,
        compiled=compiled,
        fine_tuning_compiled=asked.compile is True,
        cuda_graphs=cuda_graphs,
        memory_format=asked.memory_format,
        deterministic=asked.deterministic,
        workers=_workers(asked.workers, on),
    )


def _precision(asked: str, *, is_gpu: bool) -> str:
    """Returns the precision to compute with: as asked, or for "auto" the device's fastest.

    Raises:
        UsageError: bf16 on a CPU.
    """
    if asked == "bf16" and not is_gpu:
        raise UsageError(
            "precision=bf16 is for GPUs: on CPUs torch (2.11 to 2.15) leaves weight gradients of "
            "some bfloat16 convolutions unset. Give precision=fp32"
        )
    if asked != "auto":
        return asked
    # GPUs before Ampere emulate bfloat16, which is slower than float32.
    if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


@contextlib.contextmanager
def training(engine: Engine) -> Iterator[None]:
    """Sets torch's switches for training within the block.

    They choose the fastest kernels, or with `deterministic` those that give the same bits each
    time.
    """
    # cuDNN times its kernels for each new shape, and may choose another one in another run.
    torch.backends.cudnn.benchmark = not engine.deterministic
    if engine.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch would fill each new tensor to expose reads before writes, which costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch._inductor.config.deterministic = True  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(engine.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def device(asked: str) -> torch.device:
    """Returns the device to run on; of several processes each has a GPU of its own.

    Raises:
        UsageError: "cuda" was asked for and there is no GPU, or fewer GPUs than processes.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device=cuda, but torch finds no GPU: check nvidia-smi and that torch was built for "
            "its driver, or give device=cpu"
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
    """Returns whether to compile: as asked, and for "auto" on a GPU where torch.compile works.

    Raises:
        UsageError: compile=true, and torch.compile does not work here.
    """
    wanted = on.type == "cuda" if asked == "auto" else asked
    missing = why_not_compiled(on) if wanted else ""
    if not missing:
        return wanted
    if asked != "auto":
        raise UsageError(
            f"compile=true, but torch.compile lacks {missing}: install it, or leave auto (the "
            "results stay the same)"
        )
    if ranks.local_rank() == 0:
        console.print_message(
            f"engine  not compiled, which is slower: torch.compile lacks {missing}"
        )
    return False


@functools.cache
def why_not_compiled(on: torch.device) -> str:
    """Returns what torch.compile lacks on this machine, or "" if it works.

    It compiles a small function to find out, since the reasons for failure are many.
    """
    if on.type == "cuda":
        # Triton builds a small C library at first use, and without its needs fails obscurely.
        compilers = ("cc", "gcc", "clang", os.environ.get("CC", "cc"))
        if not any(shutil.which(compiler) for compiler in compilers):
            return "a C compiler"
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            return "Python.h (the python3-dev package)"
    try:
        torch.compile(lambda values: values * 2 + 1, dynamic=False)(torch.ones(64, device=on))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = _first_line(error)
        if isinstance(error, OSError):
            return f"a folder to write to, which TORCHINDUCTOR_CACHE_DIR names ({reason})"
        # On CPUs torch.compile generates C++, on GPUs Triton's kernels with a little C around.
        compiler = "a C compiler, which CC names,"
        if on.type == "cpu":
            compiler = "a C++ compiler, which CXX names,"
        return f"{compiler} or another part of it ({reason})"
    return ""


def _first_line(error: BaseException) -> str:
    """Returns what an error says, without the advice to developers that torch puts around it."""
    for line in str(error).splitlines():
        if line and not line.startswith("backend="):
            return line
    return type(error).__name__


def _with_explained_failures(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `compiled`, which raises `UsageError` naming compile= if it can't be compiled."""
    # This import takes seconds, and only compiled runs need it.
    from torch._dynamo.exc import BackendCompilerFailed

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise UsageError(
                f"torch.compile failed ({_first_line(error)}): give compile=false (the results "
                "stay the same)"
            ) from error

    return call


def _workers(asked: Any, on: torch.device) -> int:
    """Returns how many loader processes each training process has: as asked, or by the cores."""
    if asked != "auto":
        return asked
    # Training processes on one machine share its cores.
    cores = machine.cores() // ranks.local_world_size()
    # A CPU that trains is busy itself.
    if on.type == "cpu":
        return cores // 4
    # One core is left to the process that feeds the GPU.
    return max(1, cores - 1)
