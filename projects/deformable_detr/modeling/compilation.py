"""torch.compile of a part of a detector, for training with batches of any size."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def compile_for_all_sizes(part: nn.Module, *, backend: str) -> None:
    """Let a module compile itself when it is called for the first time; names of its parameters stay.

    Raises:
        RuntimeError: if PyTorch cannot leave compiled modules as they are for a while (before 2.6).
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError(f"compilation for training needs PyTorch 2.6 or newer, this is {torch.__version__}")
    part.compile(dynamic=True, backend=backend)


@contextmanager
def running_compiled(*, training: bool) -> Iterator[None]:
    """Call compiled parts in it: in training as one program for all sizes, in evaluation as they were written."""
    # Here, as this takes PyTorch a second or two.
    from torch._dynamo import config as compiler_config
    from torch.fx.experimental import _config as shape_config

    with ExitStack() as stack:
        if training:
            # Sizes that are equal in the first batch need not be equal in the next: each such pair would be compiled
            # anew. PyTorch's own messages name this setting; there is no public one.
            stack.enter_context(shape_config.patch(use_duck_shape=False))
            # DistributedDataParallel would have the programs cut into pieces for its buckets of gradients, and cannot
            # cut those with activation checkpoints at all.
            stack.enter_context(compiler_config.patch(optimize_ddp=False))
        else:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
