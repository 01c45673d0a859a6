"""Count what a call asks PyTorch to do, by module: on a GPU each such operation is a launch and costs the host time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._C import _current_autograd_node
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Prefixes of what runs nothing on the device: allocations, and a view that is declared as none.
_FREE = ("empty", "new_empty", "_unsafe_view")
_MODULE = "deformable_detr.module"  # A key of the metadata of autograd's nodes.
PHASES = ("forward", "backward", "optimizer")


class Operation(NamedTuple):
    """What was dispatched, where, and in which of ``PHASES``."""

    module: str
    phase: str
    name: str


def count_launches(call: Callable[[], object], model: nn.Module) -> Counter[Operation]:
    """Run ``call`` once and count the ATen operations in it that are neither a view nor an empty allocation.

    The count is the same on every device but for operations that one of them replaces by several. An operation of a
    backward pass belongs to the module whose forward pass made its node of the graph, also where it adds to a gradient;
    what no module does belongs to "".

    Args:
        call: runs ``model``, forwards or both ways, with or without an optimizer.
        model: whose submodules are told apart, by their names.
    """
    counter = _Counter()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(counter.enter(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(counter.leave, always_call=True).remove)
        stack.callback(register_optimizer_step_pre_hook(counter.enter_optimizer).remove)
        stack.callback(register_optimizer_step_post_hook(counter.leave_optimizer).remove)
        stack.enter_context(counter)
        call()
    return counter.counts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Operation] = Counter()
        self.modules = [""]
        self.in_optimizer = False

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *inputs: object) -> None:
            self._sign(inputs)  # What led to them is the work of the module around this one.
            self.modules.append(name)

        return hook

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self._sign(output)
        self.modules.pop()

    def enter_optimizer(self, *args: object) -> None:
        self.in_optimizer = True

    def leave_optimizer(self, *args: object) -> None:
        self.in_optimizer = False

    def _sign(self, tensors: object) -> None:
        """Write the module's name on the nodes behind ``tensors`` that no other module has signed."""
        nodes = [x.grad_fn for x in tree_leaves(tensors) if isinstance(x, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and _MODULE not in node.metadata:
                node.metadata[_MODULE] = self.modules[-1]
                nodes += [before for before, _ in node.next_functions]

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        # Inference mode passes on composite operations whole; elsewhere only their parts arrive.
        if torch.is_inference_mode_enabled() and torch._C.DispatchKey.CompositeImplicitAutograd not in func.py_kernels:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        # Dropout, for one, hands its argument back in evaluation.
        nothing_done = not func._schema.is_mutable and any(result is x for x in args)
        if func.namespace == "aten" and not _is_free(func) and not nothing_done:
            self.counts[self._describe(func)] += 1
        return result

    def _describe(self, func: torch._ops.OpOverload) -> Operation:
        name, node = func.name().removeprefix("aten::"), _current_autograd_node()
        if self.in_optimizer:
            return Operation("", "optimizer", name)
        if node is not None:
            return Operation(node.metadata.get(_MODULE, ""), "backward", name)
        return Operation(self.modules[-1], "forward", name)


def _is_free(func: torch._ops.OpOverload) -> bool:
    """Whether a result shares memory with an argument that is not written to, or is memory not written to."""
    aliases = (result.alias_info for result in func._schema.returns)
    return func._schema.name.removeprefix("aten::").startswith(_FREE) or any(
        alias is not None and not alias.is_write for alias in aliases
    )


def sum_by_phase(counts: Counter[Operation]) -> dict[str, int]:
    """Operations in each of ``PHASES`` that has any."""
    sums = {phase: sum(n for operation, n in counts.items() if operation.phase == phase) for phase in PHASES}
    return {phase: count for phase, count in sums.items() if count}


def format_launches(counts: Counter[Operation], depth: int) -> str:
    """Return a table of modules, cut to ``depth`` names without numbers, and one of the most frequent operations."""
    sums = sum_by_phase(counts)
    modules: dict[str, Counter[str]] = {}
    for operation, count in counts.items():
        names = [name for name in operation.module.split(".") if not name.isdigit()]
        modules.setdefault(".".join(names[:depth]), Counter())[operation.phase] += count
    rows = [[name or "(the rest)", *(modules[name][phase] for phase in sums)] for name in sorted(modules)]
    rows.append(["all", *sums.values()])
    operations: Counter[str] = Counter()
    for operation, count in counts.items():
        operations[operation.name] += count
    return "\n\n".join(
        (
            tabulate(rows, headers=["operations dispatched in", *sums]),
            tabulate(operations.most_common(15), headers=["operation", "count"]),
        )
    )
