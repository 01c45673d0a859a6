"""CUDA graphs imitated on the CPU: operations are noted while they run, and repeated into the same tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for a GPU, or copies numbers of the host to it: a recording must have none of them.
FORBIDDEN = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}


class ImitatedGraph:
    """Repeats operations at the addresses at which they ran."""

    def __init__(self):
        self.operations = []
        self.stream = None

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                for new, result in zip(tensors_in(func(*args, **kwargs)), results, strict=True):
                    if new.data_ptr() != result.data_ptr():
                        result.data.copy_(new)


class Recorder(TorchDispatchMode):
    """Stands for ``torch.cuda.graph``: in the end nothing has happened but that operations are noted."""

    def __init__(self, graph, *, pool, stream, capture_error_mode):
        super().__init__()
        self.graph = graph
        self.graph.stream = stream
        self.random = torch.get_rng_state()
        self.before = []

    def __exit__(self, *args):
        super().__exit__(*args)
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.data.copy_(value)  # Unnoticed by autograd.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} is not permitted when the stream is capturing")
        if func._schema.is_mutable or "batch_norm" in name:
            self.before += [(tensor, tensor.clone()) for tensor in tensors_in((args, kwargs))]
        results = func(*args, **(kwargs or {}))
        # What another device does than that of the stream is done, but not recorded.
        if self.graph.stream.device == torch.device("cpu"):
            self.graph.operations.append((func, args, kwargs or {}, tensors_in(results)))
        return results


class ImitatedStream:
    """Of a device; as with PyTorch's, without one it is of the current device, which is no model's here."""

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        assert other.device == self.device

    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def imitated_graphs() -> Iterator[list[ImitatedStream]]:
    """Let the CPU record, and list the streams on which it does."""
    streams = []

    def graph(recorded, *, stream, **options):
        streams.append(stream)
        return Recorder(recorded, stream=stream, **options)

    with mock.patch.multiple(
        torch.cuda,
        CUDAGraph=ImitatedGraph,
        graph=graph,
        Stream=ImitatedStream,
        stream=ImitatedStream,
        current_stream=ImitatedStream,
        graph_pool_handle=lambda: (0, 1),
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
    ):
        yield streams
