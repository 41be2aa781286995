"""Records a function of tensors as a CUDA graph, which launches all its kernels at once.

A training step has thousands of small kernels. Launched one by one, they can take the host longer
than the GPU needs to run them; a recorded graph is one launch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from relloc.errors import UsageError

# Calls before the recording. In them kernels are compiled, loaded and chosen, which can't be
# recorded.
_PLAIN_CALLS = 3


class Graphed:
    """A function that is called as it is at first, then recorded and replayed.

    A replay runs the same kernels, so results are equal to the bit. The function must launch the
    same kernels in each call, on tensors of the same shapes, and tensors that it changes beside its
    result must keep their memory. The next call overwrites the result.

    Raises (when called):
        UsageError: the function can't be recorded.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._plain_calls = 0
        # The stream of the recording is used from the first call on, since the nodes that autograd
        # creates for parameters remember the stream on which they were created.
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []  # the memory that the graph reads its arguments from
        self._result: Tensor

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        if self._plain_calls < _PLAIN_CALLS:
            self._plain_calls += 1
            return self._call_plainly(arguments)
        graph = self._graph or self._record(arguments)
        # A graph reads from fixed memory, so the arguments are copied there.
        for memory, argument in zip(self._inputs, arguments, strict=True):
            if memory is not None and argument is not None:
                memory.copy_(argument)
        graph.replay()
        return self._result

    def _call_plainly(self, arguments: tuple[Tensor | None, ...]) -> Tensor:
        # Arguments come from the caller's stream, and the result goes back to it: each waits.
        callers_stream = torch.cuda.current_stream()
        self._stream.wait_stream(callers_stream)
        with torch.cuda.stream(self._stream):
            result = self._function(*arguments)
        callers_stream.wait_stream(self._stream)
        return result

    def _record(self, arguments: tuple[Tensor | None, ...]) -> torch.cuda.CUDAGraph:
        # Absent arguments, such as the dropout mask of a head without dropout, stay absent.
        for argument in arguments:
            memory = None if argument is None else torch.empty_like(argument)
            self._inputs.append(memory)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local", since threads of NCCL and of page-locking may call CUDA meanwhile,
            # which would otherwise break the recording.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._function(*self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                f"the training step can't be recorded as a CUDA graph ({error}): "
                "give cuda_graphs=false, with which the results stay the same"
            ) from error
        self._graph = graph
        return graph
