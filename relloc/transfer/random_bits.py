"""Random bits that are hashed from seeds, by integer arithmetic on the device.

They are the same on every device and however samples are batched, and the process does not wait for
the device.
"""

from jaxtyping import Int
from torch import Tensor

_32_BITS = (1 << 32) - 1


def random_bits(seeds: Int[Tensor, "b"], ids: Int[Tensor, "n"]) -> Int[Tensor, "b n"]:
    """Returns a random 32-bit number for each of `n` ids under each of `b` seeds.

    `seeds` are of 63 bits, and `ids` are numbers from 0 to 2^31 - 1.
    """
    seed = seeds.unsqueeze(1)
    lower_half = seed & _32_BITS
    upper_half = seed >> 32
    # One half after the other, as the hash takes 32 bits at a time.
    hashed = _mix(ids ^ lower_half)
    return _mix(hashed ^ upper_half)


def _mix(x: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Returns 32-bit numbers hashed into 32-bit numbers.

    Two rounds of shift, xor and multiply, with constants from C. Wellons's hash-prospector. The
    factors are below 2^31, so no product leaves the signed 64-bit integers that torch computes in.
    """
    x = x ^ (x >> 16)
    product = x * 0x21F0AAAD
    x = product & _32_BITS
    x = x ^ (x >> 15)
    product = x * 0x735A2D97
    x = product & _32_BITS
    return x ^ (x >> 15)
