"""Tensors that depend on sizes alone, kept between calls: making them takes launches, and copies from the host."""

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


def keep_per_size(maxsize: int | None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function of hashable arguments, sizes among them: what it made for the last ``maxsize`` is kept.

    Compilers and tracers, to whom sizes are no numbers, get what is made anew, and so does FakeTensorMode. Nothing may
    write to what is kept. A CUDA graph that reads it needs it as long as the graph lives; with None all is kept.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @functools.lru_cache(maxsize)
        def kept(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):  # An inference tensor could not be saved for a later backward pass.
                return make(*args, **kwargs)

        @functools.wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            real = not torch.compiler.is_compiling() and all(map(_is_constant, _leaves(args))) and not _is_fake()
            return kept(*args, **kwargs) if real else make(*args, **kwargs)

        return call

    return decorate


def _leaves(values: tuple) -> Iterator[object]:
    for value in values:
        if isinstance(value, tuple):
            yield from _leaves(value)
        else:
            yield value


def _is_constant(value: object) -> bool:
    return type(value) in (int, float, torch.dtype, torch.device)


def _is_fake() -> bool:
    # The second question alone would take longer than what is kept saves.
    return is_in_torch_dispatch_mode() and detect_fake_mode() is not None
