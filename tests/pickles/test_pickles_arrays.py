"""numpy's arrays and scalars out of pickles: numpy is the oracle, and misfits raise one error."""

import io
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from relloc.pickles.arrays import ARRAYS
from relloc.pickles.inert import LeftOut, Pending, Source, read_pickle
from relloc.pickles.plain import PLAIN

KINDS = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def read(content: bytes) -> Any:
    """The value of a pickle, or of the array that it is."""

    def refuse(reference: Any) -> Any:
        raise pickle.UnpicklingError(f"{reference}")

    value = read_pickle(Source(io.BytesIO(content), len(content)), {**PLAIN, **ARRAYS}, refuse)
    return value.made() if isinstance(value, Pending) else value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_array_of_any_kind_and_order_has_its_values(protocol: int) -> None:
    for kind, byte_order in itertools.product(KINDS, "<>"):
        array = (np.arange(24) % 3).reshape(2, 3, 4).astype(np.dtype(byte_order + kind))
        for given in (
            array,
            np.asfortranarray(array),
            array[:, ::2],
            array[:0],
            array[0, 0, :1].reshape(()),
        ):
            found = read(pickle.dumps(given, protocol))
            torch.testing.assert_close(
                found, torch.from_numpy(np.array(given, kind, order="C")), rtol=0, atol=0
            )


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.float64(-1e300), np.int64(-7), np.uint8(255), np.bool_(True)]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_scalar_is_pythons_own_number(value: np.generic, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol))
    assert (type(found), found) == (type(value.item()), value.item())


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", "b"]),
        np.array([object, None]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, "i4,f8"),
        1j,
    ],
    ids=lambda value: str(np.asarray(value).dtype),
)
def test_what_torch_has_no_numbers_for_is_left_out(value: Any) -> None:
    assert isinstance(read(pickle.dumps(np.asarray(value), 4)), LeftOut)


def test_a_shape_that_its_bytes_do_not_fit_is_refused() -> None:
    content = pickle.dumps(np.arange(3, dtype="f4"), 4)
    three, four = b"K\x03\x85", b"K\x04\x85"
    assert content.count(three) == 1
    with pytest.raises(pickle.UnpicklingError, match=r"\[4\].* 12 bytes"):
        read(content.replace(three, four))


class Called:
    """Pickled as a call of a function of numpy's with these arguments and this state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


_reconstruct, (_, _, _), _state = np.arange(3, dtype="f4").__reduce__()
DTYPE, BYTES = np.dtype("f4"), bytes(12)


@pytest.mark.parametrize(
    "state",
    [
        (1, (3,), DTYPE),  # without contents
        (1, (-3,), DTYPE, False, BYTES),
        (1, (3.0,), DTYPE, False, BYTES),
        (1, [3], DTYPE, False, BYTES),
        (1, (1 << 62, 1 << 62), DTYPE, False, BYTES),
        (1, (3,), DTYPE, False, [0, 0, 0]),
    ],
)
def test_a_state_that_no_array_has_is_refused_before_anything_is_allocated(state: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"ndarray|array"):
        read(pickle.dumps(Called(_reconstruct, np.ndarray, (0,), b"b", state=state), 4))


def test_an_array_without_state_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="without contents"):
        read(pickle.dumps(Called(_reconstruct, np.ndarray, (0,), b"b"), 4))


def test_contents_may_be_text_as_python_2_wrote_them() -> None:
    content = np.array([1.5, 2.5], "<f4").tobytes().decode("latin-1")
    found = read(
        pickle.dumps(
            Called(_reconstruct, np.ndarray, (0,), b"b", state=(1, (2,), DTYPE, False, content)), 2
        )
    )
    assert found.tolist() == [1.5, 2.5]
