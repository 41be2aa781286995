"""Overlaps, offsets and clipping, beside plain loops and beside torchvision."""

import math

import numpy as np
import plain_detection as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from relloc.transfer.detection.boxes import (
    ROI_STDS,
    RPN_STDS,
    areas,
    clip,
    decode,
    encode,
    overlaps,
)

starts = st.floats(0, 1000, width=32)
sides = st.floats(0.125, 800, width=32)


@st.composite
def boxes_of(draw: st.DrawFn, min_size: int = 1) -> Tensor:
    corners = draw(st.lists(st.tuples(starts, starts, sides, sides), min_size=min_size, max_size=6))
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in corners]).reshape(-1, 4)


@given(boxes_of(0), boxes_of(0))
def test_overlaps_are_torchvisions(one: Tensor, other: Tensor) -> None:
    measured = overlaps(one, other)
    assert torch.allclose(measured, box_iou(one, other), atol=1e-6)
    assert torch.equal(measured, overlaps(other, one).T)
    assert measured.shape == (len(one), len(other))


@given(boxes_of())
def test_a_box_overlaps_itself_wholly(boxes: Tensor) -> None:
    assert torch.allclose(overlaps(boxes, boxes).diagonal(), torch.tensor(1.0))


def test_overlaps_by_number() -> None:
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    others = torch.tensor([[1.0, 0, 3, 2], [2, 0, 4, 2], [0, 0, 1, 1], [5, 5, 6, 6]])
    assert overlaps(square, others).tolist() == [pytest.approx([1 / 3, 0, 1 / 4, 0])]
    # Widths have no + 1: a shift of a tenth of a pixel matters to boxes smaller than a pixel.
    tiny = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.1, 0.0, 0.3, 0.2]])
    assert overlaps(tiny[:1], tiny[1:]).item() == pytest.approx(1 / 3, rel=1e-5)


def test_a_box_without_area_overlaps_nothing_and_nothing_is_nan() -> None:
    line = torch.tensor([[3.0, 3.0, 3.0, 9.0]])
    assert overlaps(line, line).item() == 0
    assert overlaps(line, torch.tensor([[0.0, 0, 10, 10]])).item() == 0
    assert torch.isfinite(encode(line, line, ROI_STDS)).all()
    assert torch.isfinite(encode(torch.tensor([[0.0, 0, 10, 10]]), line, RPN_STDS)).all()


def test_batches_of_boxes_are_compared_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 3, 5, 4, generator=generator) * 50
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)
    together = overlaps(boxes[0], boxes[1, :, :4])
    for image in range(3):
        assert torch.equal(together[image], overlaps(boxes[0, image], boxes[1, image, :4]))
    assert together.shape == (3, 5, 4)
    assert torch.allclose(areas(boxes), corners[..., 2] * corners[..., 3], rtol=1e-4)


@given(boxes_of(), boxes_of(), st.sampled_from([RPN_STDS, ROI_STDS]))
def test_offsets_are_those_of_the_plain_twin_and_lead_back(
    references: Tensor, boxes: Tensor, stds: tuple[float, ...]
) -> None:
    n = min(len(references), len(boxes))
    references, boxes = references[:n], boxes[:n]
    offsets = encode(references, boxes, stds)
    ratios = (boxes[:, 2:] - boxes[:, :2]) / (references[:, 2:] - references[:, :2])
    for place in range(n):
        expected = plain.encode(references[place].tolist(), boxes[place].tolist(), stds)
        assert offsets[place].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
        decoded = decode(references[place], offsets[place], stds)
        # Beyond a ratio of 62.5 a side is limited.
        if ratios[place].min() > 16 / 1000 and ratios[place].max() < 1000 / 16:
            assert torch.allclose(decoded, boxes[place], rtol=1e-3, atol=0.1)


def test_decoded_sides_are_limited_at_both_ends() -> None:
    reference = torch.tensor([10.0, 20.0, 26.0, 52.0])  # 16 x 32
    offsets = torch.tensor([[0.0, 0, 50, 50], [0, 0, -50, -50], [0.5, -1, math.log(2), 0]])
    boxes = decode(reference.expand(3, 4), offsets, RPN_STDS)
    widths = (boxes[:, 2] - boxes[:, 0]).tolist()
    heights = (boxes[:, 3] - boxes[:, 1]).tolist()
    assert widths == pytest.approx([1000, 16 * 16 / 1000, 32], rel=1e-4)
    assert heights == pytest.approx([2000, 32 * 16 / 1000, 32], rel=1e-4)
    assert boxes[2].tolist() == pytest.approx([10, -12, 42, 20], abs=1e-4)
    # With standard deviations of .2 the limit is one of the offset after multiplication.
    limited = decode(reference, torch.tensor([0.0, 0, 20, 21]), ROI_STDS)
    assert (limited[2] - limited[0]).item() == pytest.approx(16 * math.exp(4), rel=1e-4)
    assert (limited[3] - limited[1]).item() == pytest.approx(2000, rel=1e-4)


def test_decoding_equals_the_plain_twin() -> None:
    rng = np.random.default_rng(1)
    starts_ = rng.uniform(0, 300, (40, 2))
    references = np.concatenate([starts_, starts_ + rng.uniform(0.5, 200, (40, 2))], axis=1)
    offsets = rng.normal(0, 3, (40, 4))
    decoded = decode(torch.tensor(references).float(), torch.tensor(offsets).float(), RPN_STDS)
    for place in range(40):
        expected = plain.decode(references[place].tolist(), offsets[place].tolist(), RPN_STDS)
        assert decoded[place].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-2)


def test_clipping_takes_the_size_of_each_image() -> None:
    boxes = torch.tensor([[-5.0, 2, 50, 70], [1, 2, 3, 4], [60, 60, 90, 90]])
    sizes = torch.tensor([[[20, 30]], [[100, 80]]])
    clipped = clip(boxes.expand(2, 3, 4), sizes)
    assert clipped[0].tolist() == [[0, 2, 30, 20], [1, 2, 3, 4], [30, 20, 30, 20]]
    assert clipped[1].tolist() == [[0, 2, 50, 70], [1, 2, 3, 4], [60, 60, 80, 90]]


def test_box_math_of_bfloat16_is_in_float32() -> None:
    box = torch.tensor([[500.0, 100, 600, 300]])
    offsets = torch.tensor([[0.125, 0, 0, 0]], dtype=torch.bfloat16)
    decoded = decode(box, offsets, RPN_STDS)
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [pytest.approx([512.5, 100, 612.5, 300])]
    assert overlaps(box.bfloat16(), box.bfloat16()).dtype == torch.float32
