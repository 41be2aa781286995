"""Trainings of images of one size are compiled, and end where those that are not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# In a process of its own, as the tests check types at run time, which can't be compiled.
SCRIPT = """
import copy
import dataclasses
import sys
from pathlib import Path

import torch

sys.path[:0] = sys.argv[2:]
from contexts import context
from resumed import Saved, killed
from test_transfer_segmentation_evaluations import evaluation, given

torch.set_num_threads(1)
calls = []


def compiled(function):
    fast = torch.compile(function, dynamic=False)

    def call(*of):
        calls.append(len(of[1].images))
        return fast(*of)

    return call


def run(state, compile):
    one = evaluation(iterations=4, evaluate_every=1)
    where = given(folder=Path(sys.argv[1]), state=state)
    config = dataclasses.replace(where.encode_config, compile=compile)
    return list(one.run(dataclasses.replace(where, encode_config=config)))


plain, fast = Saved(), Saved()
run(plain, lambda function: function)
expected = copy.deepcopy(plain.content)
assert not calls
run(fast, compiled)
assert calls == [4] * 4, calls
found = copy.deepcopy(fast.content)
for name, value in expected["network"].items():
    torch.testing.assert_close(found["network"][name], value, rtol=1e-3, atol=1e-4, msg=name)

# Killed after two steps, it goes on to the same bits.
stopped = killed(lambda state: run(state, compiled), 2).content
assert stopped["step"] == 2
run(again := Saved(stopped), compiled)
for name, value in found["network"].items():
    assert torch.equal(again.content["network"][name], value), name
"""


def test_a_compiled_training_equals_one_that_is_not_and_resumes_to_the_bit(tmp_path: Path) -> None:
    script = tmp_path / "compiled.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    folders = [str(tests), str(Path(__file__).parent / "segmentation")]
    environment = {
        **os.environ,
        # Scalar code is compiled in half of the time of code for the CPU's vector instructions.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        # Without processes beside this one, which would import torch
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
