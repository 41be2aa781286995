"""Damaged and hostile files of weights: each gives weights or one message, in bounded time."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from relloc.checkpoints import backbone_files, layouts, weight_files
from relloc.errors import CheckpointError

WEIGHTS = {
    "conv1.weight": torch.ones(4, 3, 3, 3),
    "bn1.num_batches_tracked": torch.tensor(3),
    "layer1.0.conv1.weight": torch.ones(4, 4),
    "layer4.1.bn2.weight": torch.ones(2).half(),
}
NOTES = {
    "args": argparse.Namespace(path=Path("/x")),
    "history": collections.defaultdict(list, loss=[1.0]),
    "set": {1, 2},
    "best": np.float64(3),
    "rng": torch.arange(5, dtype=torch.uint8),
    "array": np.arange(3),
}
DESCRIBED = {
    "model": {
        "name": "small",
        "backbone": {"_target_": "relloc.models.small.SmallBackbone", "widths": [8] * 5},
    }
}


def torch_saved(content: Any, *, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def formats() -> dict[str, bytes]:
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    training = {"step": 1, "model": {"backbone.a": torch.ones(2)}, "about": DESCRIBED}
    return {
        "zip.pth": torch_saved({"state_dict": WEIGHTS, **NOTES}),
        "legacy.pth": torch_saved({"state_dict": WEIGHTS, **NOTES}, zipped=False),
        "x.safetensors": save(WEIGHTS, metadata={"format": "pt"}),
        "ours.safetensors": save(WEIGHTS, metadata={"relloc": json.dumps(DESCRIBED)}),
        "training.pt": torch_saved(training),
        "tensors.pkl": pickle.dumps({"model": WEIGHTS, **NOTES}),
        **{
            f"pickle{protocol}.pkl": pickle.dumps({"model": arrays, **NOTES}, protocol)
            for protocol in (2, 3, 4, 5)
        },
    }


LARGE = (2**60, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**12)
OPERATIONS = (
    *(bytes([operation]) for operation in b"}])(02RbsuQ"),
    *(b"cos\nsystem\n", b"N", b"K\x07"),
    *(b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\x7f"),
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, zeroes, exchanges, removes or adds bytes, huge numbers and pickle operations."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # Half of the damage is near the start, where headers and pickles are
        place = rng.randrange(min(len(changed), rng.choice((400, len(changed)))) or 1)
        size, other = rng.randrange(1, 40), rng.randrange(len(changed) or 1)
        kind = rng.randrange(8)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[place : place + size] = bytes(size)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            one, two = changed[place : place + size], changed[other : other + size]
            changed[place : place + size], changed[other : other + size] = two, one
        elif kind == 4:
            del changed[place : place + size]
        elif kind == 5:
            changed[place:place] = rng.randbytes(size)
        elif kind == 6:
            changed[place : place + 8] = struct.pack("<Q", rng.choice(LARGE))
        else:
            changed[place:place] = rng.choice(OPERATIONS)
    return bytes(changed)


def with_right_checksums(content: bytes, rng: random.Random) -> bytes:
    """A zip of torch's with its pickle damaged, which the checksums do not tell."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, damaged(record, rng) if name.endswith("data.pkl") else record)
    return out.getvalue()


def outcome(file: Path) -> str:
    """`weights`, or the message of a refusal; anything else is raised."""
    try:
        if backbone_files.is_ours(file):
            _, about = backbone_files.load_backbone(file)
            backbone_files.model_name(about, file)
        else:
            found = layouts.find(weight_files.read(file), origin=str(file))
            assert str(found)
            found.fitted(WEIGHTS)
    except CheckpointError as error:
        return str(error)
    return "weights"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", formats())
def test_every_damaged_file_is_weights_or_one_message(tmp_path: Path, name: str) -> None:
    whole = formats()[name]
    (tmp_path / name).write_bytes(whole)
    assert outcome(tmp_path / name) == "weights"
    rng = random.Random(name)
    for count in range(150):
        zipped = whole.startswith(b"PK") and count % 3
        content = with_right_checksums(whole, rng) if zipped else damaged(whole, rng)
        (tmp_path / name).write_bytes(content)
        message = outcome(tmp_path / name)
        assert message.isprintable(), (count, message)
        assert "weights_only" not in message
        assert len(message) < 2000


@pytest.mark.parametrize("size", [128, 384, 1 << 12, 98_432])
def test_safetensors_are_known_whatever_the_length_of_their_header(
    tmp_path: Path, size: int
) -> None:
    """A length of 128 and others begin with 0x80, as pickles do."""
    content = save({"a": torch.arange(4.0)})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = json.dumps(header).encode().ljust(size)
    assert len(text) == size
    (tmp_path / "x.pth").write_bytes(struct.pack("<Q", size) + text + content[-16:])
    assert torch.equal(weight_files.read(tmp_path / "x.pth")["a"], torch.arange(4.0))


HOSTILE = """
import resource, sys
from pathlib import Path
from relloc.checkpoints import weight_files
from relloc.errors import CheckpointError

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for name in sys.argv[1:]:
    try:
        weight_files.read(Path(name))
    except CheckpointError as error:
        print(error)
    else:
        print("weights")
"""


def hostile() -> dict[str, bytes]:
    start = b"\x80\x02"
    deep = b")" + b"\x85" * 500_000
    lists = [b"]q\x00(" + b"K\x01" * 10 + b"e0"]
    lists += [
        b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 10 + b"e0" for i in range(1, 12)
    ]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", start + b"}" * (1 << 26) + b".")
    # One content of 64 MB, of which 100 arrays would be made
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    content = b"B" + struct.pack("<I", 1 << 26) + bytes(1 << 26) + b"q\x010"
    array = reconstruct + b"(K\x01J" + struct.pack("<i", 1 << 26) + b"\x85" + kind + b"\x89h\x01tb"
    header = b'{"a":' + b"[" * 20_000_000
    return {
        "deep": start + b"}K\x01" + deep + b"s.",
        "deep key": start + b"}" + deep + b"Ns.",
        "doubled again and again": start + b"}K\x01" + b"".join(lists) + b"h\x0bs.",
        "in itself": start + b"}q\x00K\x01h\x00s.",
        "many dicts": start + b"(" + b"}" * 20_000_000 + b"l.",
        "many arrays of one content": start + content + b"](" + array * 100 + b"e.",
        "one array many times": start
        + content
        + b"}K\x01]("
        + array
        + b"q\x02"
        + b"h\x02" * 1000
        + b"es.",
        "far memo": start + b"}r\xff\xff\xff\xffK\x01" + b"]" * 5 + b".",
        "long number": start + b"}\x8b\xff\xff\xff\x7f",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60),
        "compressed": bomb.getvalue(),
        "header": struct.pack("<Q", 2**60) + b"{}",
        "deep header": struct.pack("<Q", len(header)) + header,
    }


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the limit of memory is set by what /proc tells"
)
@pytest.mark.slow
def test_hostile_files_neither_crash_nor_fill_the_memory(tmp_path: Path) -> None:
    for name, content in hostile().items():
        (tmp_path / name).write_bytes(content)
    names = [str(tmp_path / name) for name in hostile()]
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, *names],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines, done.stderr[-2000:])
    assert len(lines) == len(names)
    taken = [
        Path(name).name
        for line, name in zip(lines, names, strict=True)
        if not line.startswith(name)
    ]
    assert taken == ["one array many times"]
