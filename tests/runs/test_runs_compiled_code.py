"""Compiled code is kept below the runs, and found there by other processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._functorch import config as autograd_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from relloc.runs.compiled_code import FOLDER, VARIABLE, keep_compiled_code


@pytest.fixture(autouse=True)
def _switches_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What a test has set is taken back at the end.
    monkeypatch.setenv(VARIABLE, default_cache_dir())
    with autograd_config.patch(autograd_cache_allow_custom_autograd_functions=False):
        yield


@pytest.mark.parametrize("before", ["nothing", "torch's default", "a link to it"])
def test_compiled_code_is_kept_below_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    if before == "nothing":
        monkeypatch.delenv(VARIABLE)
    if before == "a link to it":
        default = Path(default_cache_dir())
        (tmp_path / "link").symlink_to(default.parent)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "link" / default.name))
    keep_compiled_code(tmp_path / "runs")
    folder = tmp_path / "runs" / FOLDER
    assert os.environ[VARIABLE] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert autograd_config.autograd_cache_allow_custom_autograd_functions


# The second name is that of torch's default, but not its place.
@pytest.mark.parametrize("name", ["mine", Path(default_cache_dir()).name])
def test_a_folder_that_the_user_names_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    keep_compiled_code(tmp_path / "runs")
    assert os.environ[VARIABLE] == str(tmp_path / name)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("reason", ["others may write", "another owner", "no locks", "a file"])
def test_a_folder_that_can_not_be_trusted_or_locked_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    runs = tmp_path / "runs"
    before = os.environ[VARIABLE]
    if reason == "others may write":
        (runs / FOLDER).mkdir(parents=True)
        (runs / FOLDER).chmod(0o770)
    elif reason == "another owner":
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    elif reason == "no locks":

        def refuse(*_of: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", refuse)
    else:
        runs.write_text("")
    keep_compiled_code(runs)
    assert os.environ[VARIABLE] == before


# Compiles a small training step for grids of several gaps, and prints of each how many graphs were
# compiled, how many of them came from the folder and how many did not, and its gradient.
STEPS = """
import hashlib
import sys

import torch
from torch._dynamo.utils import counters

from relloc.geometry import PatchGrid
from relloc.models.ghost_batch_norm import Groups, use_ghost_batches
from relloc.patches.color import Drop
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.graphed import Graphed
from relloc.runs.engine import EngineSettings, resolve_engine

torch.set_num_threads(1)
torch.backends.cudnn.deterministic = True
device, runs, *steps = sys.argv[1:]
engine = resolve_engine(EngineSettings(
    device=device, precision="fp32", compile=True, cuda_graphs="auto",
    memory_format="channels_last", deterministic=False, workers=0, runs=runs,
))


class Scaled(torch.autograd.Function):
    # The forward is the same for each slope; slopes are powers of two, which round nothing.

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * slope


def head(patches):
    return Scaled.apply(network(patches.flatten(0, 1)).relu())


for step in steps:
    gap, _, slope = step.partition("x")
    slope = float(slope or 1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, stride=4), torch.nn.BatchNorm2d(4))
    use_ghost_batches(network, Groups(images=4, rows_per_image=(9,)))
    network.to(device)
    grid = PatchGrid(patch_px=8, gap_px=int(gap), jitter_px=int(gap), resize=None)
    pipeline = PatchPipeline(grid=grid, color=Drop(noise="gaussian"), normalize=ByDataset())
    generator = torch.Generator(device).manual_seed(0)
    shape = (8, grid.span_px, grid.span_px, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=device)
    images = images.permute(0, 3, 1, 2)
    drawn = pipeline.draw(8, generator)
    if slope != 1:
        torch.compiler.reset()
    counters.clear()
    make = pipeline.compiled(engine.compile)
    if device == "cuda":
        # Later calls replay a recorded graph.
        make = Graphed(make)
        for _ in range(5):
            make(images, *drawn)
    patches = make(images, *drawn)
    engine.compile(head)(patches).square().sum().backward()
    torch.testing.assert_close(patches, pipeline.make(images, *drawn))
    graphs = counters["stats"]["unique_graphs"]
    found = counters["aot_autograd"]
    gradient = network[0].weight.grad
    digest = hashlib.sha256((gradient / slope).cpu().numpy().tobytes()).hexdigest()[:8]
    print(step, graphs, found["autograd_cache_hit"], found["autograd_cache_miss"],
          found["autograd_cache_bypass"], digest, flush=True)
"""


def compiled(device: str, runs: Path, *steps: str) -> dict[str, tuple[str, ...]]:
    """What a process of its own prints of each step."""
    script = runs / "steps.py"
    script.write_text(STEPS)
    # torch sets the variable in this process too, while it is imported.
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    # Scalar code is compiled in half of the time of code for the CPU's vector instructions.
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
    # Without processes beside this one, which would import torch
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), device, str(runs), *steps],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: tuple(words[1:]) for words in lines}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_grids_of_other_gaps_share_compiled_code_also_in_another_process(
    tmp_path: Path, device: str
) -> None:
    cold = compiled(device, tmp_path, "2", "5")
    *counts, digest = cold["2"]
    # Patches and network are compiled: each is missed in the folder.
    assert counts == ["2", "0", "2", "0"]
    assert cold["5"][:4] == ("0", "0", "0", "0")
    assert (tmp_path / FOLDER / "aotautograd").is_dir()

    # The last step has another backward: its network must not be taken for the one before.
    warm = compiled(device, tmp_path, "7", "2", "2x2")
    assert warm["7"][:4] == ("2", "2", "0", "0")
    assert warm["2"] == ("0", "0", "0", "0", digest)
    assert warm["2x2"] == ("2", "1", "1", "0", digest)
