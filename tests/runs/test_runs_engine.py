"""Tests how device, precision and compilation are chosen."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from relloc.errors import UsageError
from relloc.runs import engine
from relloc.runs.engine import EngineSettings, resolve_engine

DEFAULTS = {
    "device": "cpu",
    "precision": "auto",
    "compile": "auto",
    "cuda_graphs": "auto",
    "memory_format": "channels_last",
    "deterministic": False,
    "workers": "auto",
    "runs": "runs",
}


def asked(**changes: object) -> EngineSettings:
    settings = EngineSettings(**DEFAULTS)  # type: ignore[arg-type]
    for (
        name,
        value,
    ) in changes.items():  # of whatever type: the type checker of tests would be first
        object.__setattr__(settings, name, value)
    settings.__post_init__()
    return settings


@pytest.fixture(autouse=True)
def _switches_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Otherwise tests that compile would make a folder below the runs.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:3]
    torch.use_deterministic_algorithms(before[3])


def test_auto_on_a_cpu_is_float32_and_not_compiled() -> None:
    settled = resolve_engine(asked())
    assert (settled.device.type, settled.precision, settled.bf16, settled.compiled) == (
        "cpu",
        "fp32",
        False,
        False,
    )
    assert str(settled).startswith("cpu, fp32, not compiled, channels_last, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert resolve_engine(asked(device="auto")).device.type == "cpu"
    with pytest.raises(UsageError, match="device=cuda.*nvidia-smi"):
        resolve_engine(asked(device="cuda"))


@pytest.mark.parametrize(("given", "expected"), [(None, "32"), ("8", "8")])
def test_a_gpu_has_a_queue_for_each_stream_unless_the_environment_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    resolve_engine(asked(device="cpu"))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == expected


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("device", "tpu", "device is tpu: .* auto, cpu, cuda$"),
        ("precision", "fp16", "precision is fp16: .* auto, bf16, tf32, fp32$"),
        ("precision", "bf16", r"precision=bf16 .*GPUs.*\bprecision=fp32$"),
        ("precision", 32, "precision is 32: .* auto, bf16, tf32, fp32$"),
        ("compile", "yes please", "compile is yes please: .*true or false"),
        ("compile", 1, "compile is 1: .*true or false"),
        ("cuda_graphs", "maybe", "cuda_graphs is maybe: .*true or false"),
        ("cuda_graphs", True, r"cuda_graphs=true.*\bCPU\b.*\bauto\b"),
        ("memory_format", "nhwc", "memory_format is nhwc: .* channels_last, contiguous$"),
        ("deterministic", "auto", "deterministic is auto: .*true or false"),
        ("workers", "many", "workers is many: .*whole number .*0 or more"),
        ("workers", -1, "workers is -1: .*whole number .*0 or more"),
        ("workers", 1.5, "workers is 1.5: .*whole number .*0 or more"),
        ("workers", True, "workers is True: .*whole number .*0 or more"),
    ],
)
def test_a_wrong_setting_is_one_message_with_what_there_is(
    setting: str, value: object, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        resolve_engine(asked(**{setting: value}))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the place of an attempt to compile, which may last a minute."""
    monkeypatch.setattr(engine, "why_not_compiled", lambda _on: "")


@pytest.mark.usefixtures("compiler")
def test_what_is_asked_for_is_what_is_told() -> None:
    settled = resolve_engine(
        asked(
            precision="tf32",
            compile=True,
            memory_format="contiguous",
            deterministic=True,
            workers=3,
        )
    )
    assert str(settled) == "cpu, tf32, compiled, contiguous, deterministic, 3 workers"


@pytest.mark.parametrize(("precision", "matmul"), [("fp32", "highest"), ("tf32", "high")])
def test_only_fp32_rounds_no_input_of_a_product(precision: str, matmul: str) -> None:
    resolve_engine(asked(precision=precision))
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 0), (4, 1, 1), (16, 1, 4), (16, 2, 2), (16, 4, 1), (2, 4, 0)],
)
def test_a_cpu_that_trains_leaves_a_quarter_of_its_share_to_readers(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert resolve_engine(asked()).workers == workers


def test_where_a_system_tells_of_no_limit_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert resolve_engine(asked()).workers == 2


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(16, 1, 15), (64, 4, 15), (16, 4, 3), (2, 4, 1)]
)
def test_beside_a_gpu_all_cores_of_its_share_but_one_read(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert engine._workers("auto", torch.device("cuda")) == workers


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    engine.why_not_compiled.cache_clear()
    yield
    engine.why_not_compiled.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
def test_a_machine_that_cannot_compile_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert not engine._compiled("auto", torch.device("cuda"))
    assert "torch.compile lacks a C compiler" in capsys.readouterr().out
    assert engine._compiled(False, torch.device("cuda")) is False
    with pytest.raises(UsageError, match="compile=true.*a C compiler"):
        engine._compiled(True, torch.device("cuda"))


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("error", "named"),
    [
        (
            RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none found\n\nSet TORCH"),
            r"CXX.*none found\)",
        ),
        (PermissionError(13, "Permission denied", "/cache"), r"TORCHINDUCTOR_CACHE_DIR.*/cache"),
        (ImportError("no module named triton"), "no module named triton"),
    ],
)
def test_an_attempt_that_fails_names_compile_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, named: str
) -> None:
    def failing(_function: object, **_options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(_values: torch.Tensor) -> torch.Tensor:
            raise error

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UsageError, match=f"compile=true.*{named}"):
        resolve_engine(asked(compile=True))
    assert not resolve_engine(asked(compile=False)).compiled


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.slow
def test_without_a_compiler_for_cpus_compiling_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no_compiler")))
    with pytest.raises(UsageError, match="compile=true.*CXX"):
        resolve_engine(asked(compile=True))


def test_what_can_not_be_compiled_later_names_compile(
    monkeypatch: pytest.MonkeyPatch, compiler: None
) -> None:
    def failing(_graph: object, _inputs: object) -> object:
        raise RuntimeError("no room for a kernel")

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda of, *, dynamic, options: real(of, dynamic=dynamic, backend=failing)
    )
    with pytest.raises(UsageError, match="no room.*compile=false"):
        resolve_engine(asked(compile=True)).compile(lambda x: x + 1)(torch.ones(2))


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_a_model_is_placed_in_its_memory_format(memory_format: str) -> None:
    model = nn.Conv2d(3, 4, 3)
    resolve_engine(asked(memory_format=memory_format)).place(model)
    assert model.weight.is_contiguous(memory_format=engine._MEMORY_FORMATS[memory_format])


def test_uncompiled_is_the_very_same_function() -> None:
    function = nn.Linear(2, 2)
    assert resolve_engine(asked()).compile(function) is function


@pytest.mark.usefixtures("compiler")
def test_one_compiled_function_serves_more_kinds_of_input_than_the_compiler_allows_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[object] = []

    def counting(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    def scaled(images: torch.Tensor, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {layer: images * len(layer) for layer in layers}

    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda of, *, dynamic, options: real(of, dynamic=dynamic, backend=counting),
    )
    with torch._dynamo.config.patch(recompile_limit=8):  # the compiler's own
        fast = resolve_engine(asked(compile=True)).compile(scaled)
        sets = [("a", "bc")[:n] + ("d",) * m for n in range(3) for m in range(1, 5)]
        for layers in sets:
            assert fast(torch.ones(2), layers)["d"].tolist() == [1, 1]
        assert len(compiled) == len(sets) > 8
        fast(torch.ones(2), sets[0])
        assert len(compiled) == len(sets)


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_sets_the_kernels_and_puts_them_back_even_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settled = resolve_engine(asked(deterministic=deterministic))
    with pytest.raises(KeyError), engine.training(settled):
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("compiling", "expected"), [("auto", False), (True, True), (False, False)])
def test_fine_tuning_is_compiled_where_it_is_asked_for(compiling, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: "compiled")
    monkeypatch.setattr(engine, "_with_explained_failures", lambda function: function)
    settled = resolve_engine(asked(compile=compiling))
    assert settled.compile_training("as it is") == ("compiled" if expected else "as it is")
