"""A function of tensors as a CUDA graph: the GPU is given its thousands of kernels in one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

from relloc.errors import UsageError

_PLAIN_CALLS = 3  # in which kernels are compiled, loaded and chosen, none of which can be recorded


class Graphed:
    """`function`, called as it is at first, then recorded and replayed: the same kernels, so the same bits.

    It must launch the same kernels each time, on tensors of the same shapes, and what it writes beside its
    result must stay in its place. The result is overwritten by the next call.

    Raises:
        UsageError: it can't be recorded.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._plain_calls = 0
        # A stream of its own from the first call on: autograd's nodes keep the stream on which they were made.
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._result: Tensor

    def __call__(self, *given: Tensor | None) -> Tensor:
        if self._plain_calls < _PLAIN_CALLS:
            self._plain_calls += 1
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                result = self._function(*given)
            here.wait_stream(self._stream)
            return result
        graph = self._graph or self._record(given)
        for recorded, value in zip(self._inputs, given, strict=True):
            if recorded is not None and value is not None:
                recorded.copy_(value)
        graph.replay()
        return self._result

    def _record(self, given: tuple[Tensor | None, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = [None if value is None else torch.empty_like(value) for value in given]
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of NCCL and of page-locking may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._function(*self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                f"the step can't be recorded as a CUDA graph ({error}): give cuda_graphs=false (the results stay "
                "the same)"
            ) from error
        self._graph = graph
        return graph
