"""Precisions of matrix products, fast ones included, each with a bound of its error."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from relloc.features.chunks import slices

# On a CPU one candidate pair takes the time of so many float64 products of whole matrices.
_PAIR_COST = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductPrecision:
    """A precision of matrix products, with a bound of its error.

    Factors lose `dropped_bits` of float32's 23 bits, and sums at most `error_per_term` per term.

    Float32 loses 2^-24 per term, whatever the order of the sum. TF32 drops 13 bits of the factors,
    which are rounded here, so that nothing depends on how a GPU rounds; products are then exact.
    Tensor cores cut sums off at 2^-23 of the largest term or more (Fasi, Higham, Mikaitis,
    Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021), in each of the at most 1.5
    additions per term: below 2^-22.
    """

    dropped_bits: int
    error_per_term: float
    matmul_precision: str


FLOAT32 = ProductPrecision(
    dropped_bits=0,
    error_per_term=2**-24,
    matmul_precision="highest",
)
TF32 = ProductPrecision(
    dropped_bits=13,
    error_per_term=2**-22,
    matmul_precision="high",
)


def product_precisions(
    device: torch.device,
    n_rows: int,
    k: int,
) -> tuple[ProductPrecision, ...]:
    """Returns the precisions with which candidates are searched, fastest first.

    Returns none where comparing all pairs in float64 takes no longer than that.
    """
    if device.type == "cuda":
        # Tensor cores have TF32 since Ampere.
        has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
        if has_tf32:
            return TF32, FLOAT32
        return (FLOAT32,)
    # Each of the k nearest rows is compared in float64 once more: of a small bank that takes longer
    # than all float64 products at once.
    if device.type == "cpu" and n_rows < _PAIR_COST * k:
        return ()
    return (FLOAT32,)


def round_to(
    precision: ProductPrecision,
    rows: Float[Tensor, "n d"],
    norms: Float64[Tensor, "n"],
    block: int,
) -> tuple[Float32[Tensor, "n d"], Float64[Tensor, "n"]]:
    """Returns the rows at length one, rounded to the factors of `precision`.

    Also returns the length of what rounding took from each row. `block` rows are worked on at once.
    """
    rounded = torch.empty(rows.shape, device=rows.device)
    errors = torch.empty_like(norms)
    # Adding half a step to the bits and cutting them off rounds to nearest: float32 orders its
    # values as the integers of their bits, and a carry into the exponent is right as well.
    half_step = 1 << max(0, precision.dropped_bits - 1)
    kept_bits = -2 * half_step
    for part in slices(len(rows), block):
        unit = rows[part] / norms[part].unsqueeze(1)
        rounded[part] = unit
        if precision.dropped_bits:
            bits = rounded[part].view(torch.int32)
            rounded_bits = (bits + half_step) & kept_bits
            rounded[part] = rounded_bits.view(torch.float32)
        lost = unit.sub_(rounded[part])
        errors[part] = torch.linalg.vector_norm(lost, dim=1)
    return rounded, errors


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets PyTorch's global precision of float32 products, and puts the old one back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
