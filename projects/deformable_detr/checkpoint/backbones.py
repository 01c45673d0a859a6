"""Pretrained backbones of any architecture: found by their names, and completed where a file cannot have all of it."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from .coverage import ConversionReport
from .sources import BOTTOM_UP, DETECTRON2, RESNET, TORCHVISION, Source

# Buffers that a model computes when it is built.
_COMPUTED = ("relative_position_index", "num_batches_tracked")


def find_backbone(keys: Collection[str], model_keys: Collection[str]) -> Source | None:
    """Find what a file calls the parameters of our backbone, which may differ by one prefix on either side.

    The prefixes are those by which most names fit: ``module.`` of a file, ``net.`` of a ViT below its pyramid.

    Args:
        keys: the names in the file.
        model_keys: the names in our model.

    Returns:
        The source, or None where no name fits.
    """
    ours = [key for key in model_keys if key.startswith(BOTTOM_UP)]
    our_prefixes = [prefix for prefix in _common_prefixes(ours, share=0.5) if prefix.startswith(BOTTOM_UP)]
    best, most = None, 0
    for kind, spelling in ((DETECTRON2, ()), (TORCHVISION, RESNET)):
        for theirs in _common_prefixes(keys, share=0.1):
            source = replace(kind, rules=((f"^{re.escape(theirs)}", BOTTOM_UP), *spelling))
            names = {source.rename(key).removeprefix(BOTTOM_UP) for key in keys if key.startswith(theirs)}
            for prefix in our_prefixes:
                fitting = sum(key.removeprefix(prefix) in names for key in ours if key.startswith(prefix))
                if fitting > most:
                    below = ((f"^{re.escape(BOTTOM_UP)}", prefix),) if prefix != BOTTOM_UP else ()
                    best, most = replace(source, rules=source.rules + below), fitting
    return best


def fit_position_tables(tensors: dict[str, Tensor], target: Mapping[str, Tensor], report: ConversionReport) -> None:
    """Interpolate the backbone's position tables of another size, as Detectron2's models do for another image.

    Args:
        tensors: the checkpoint by our names; changed.
        target: the model's parameters.
        report: is told what happened.
    """
    for key in [key for key in tensors if key.startswith(BOTTOM_UP) and key in target]:
        table, wanted = tensors[key], target[key].detach()
        if table.shape == wanted.shape:
            continue
        if key.endswith(_COMPUTED):
            del tensors[key]
            report.dropped.update(dict.fromkeys(report.used.pop(key), "computed by the model for its own sizes"))
        elif (fitted := _fit_table(key, table, wanted)) is not None:
            tensors[key] = fitted
            report.mapped[key] = f"position table interpolated, {tuple(table.shape)} -> {tuple(wanted.shape)}"


def find_absent_parts(target: Collection[str], present: Collection[str]) -> list[str]:
    """Name the backbone's parameters that a file may well be without: those of parts that it has nothing of at all.

    Such are norms on the outputs, a pyramid, position tables. A part is absent as a whole, with all that are numbered
    like it: some blocks of a stage, or the variances of a norm, are a hole in another backbone's file.

    Args:
        target: the model's names.
        present: the converted names.

    Returns:
        Our names; none where less than half of the backbone is there.
    """
    ours = [key for key in target if key.startswith(BOTTOM_UP)]
    counted = [key for key in ours if not key.endswith(_COMPUTED)]
    if 2 * sum(key in present for key in counted) < len(counted):
        return []
    paths = [tuple(key.split(".")) for key in present if key.startswith(BOTTOM_UP)]
    modules = {path[:depth] for path in paths for depth in range(len(path))}
    kinds = {(module[:-1], module[-1].rstrip("0123456789")) for module in modules if module}
    with_own_parameters = {path[:-1] for path in paths if not path[-1].endswith(_COMPUTED)}

    def may_be_absent(key: str) -> bool:
        path = tuple(key.split("."))
        for depth in range(1, len(path)):
            if path[:depth] not in modules:
                return (path[: depth - 1], path[depth - 1].rstrip("0123456789")) not in kinds
        return key.endswith(_COMPUTED) or path[:-1] not in with_own_parameters

    return [key for key in ours if key not in present and may_be_absent(key)]


def _common_prefixes(keys: Collection[str], *, share: float) -> list[str]:
    """Dotted prefixes of at least this share of the names, the empty one first."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        counts.update("".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts)))
    return [prefix for prefix, count in counts.items() if count >= share * len(keys)]


def _fit_table(key: str, table: Tensor, wanted: Tensor) -> Tensor | None:
    """Return a position table in the size of the model's; None if it is none, or of another width."""
    if table.dim() != wanted.dim() or table.dim() < 2:
        return None
    if key.endswith((".rel_pos_h", ".rel_pos_w")) and table.shape[1] == wanted.shape[1]:
        # (L, C), of the distances along one axis.
        return F.interpolate(table.float().T[None], size=len(wanted), mode="linear")[0].T.to(table.dtype)
    if key.endswith("pos_embed") and table.dim() == 3 and table.shape[::2] == wanted.shape[::2]:
        return _fit_grid(table[0], wanted[0].to(table.dtype))[None]
    if key.endswith("relative_position_bias_table") and table.shape[1] == wanted.shape[1]:
        return _fit_grid(table, wanted.to(table.dtype))
    return None


def _fit_grid(table: Tensor, wanted: Tensor) -> Tensor:
    """(n * n, C) -> (m * m, C), bicubic; either may have the entry of a class token before its grid."""
    old, new = math.isqrt(len(table)), math.isqrt(len(wanted))
    grid = table[len(table) - old * old :].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    fitted = wanted.clone()
    first = len(wanted) - new * new
    fitted[first:] = grid[0].flatten(1).T
    if first and len(table) > old * old:
        fitted[:first] = table[:first]
    return fitted
