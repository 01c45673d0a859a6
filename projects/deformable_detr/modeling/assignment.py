"""From matching costs on the device to assignments on the host: what travels, and what scipy makes of it.

Shapes: Ld layers, N images, Lq predictions per layer and image, n objects of the image that has most of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Match = tuple[Tensor, Tensor]

# From so many pairs of a prediction and an object on, an assignment considers each object's cheapest predictions alone.
# scipy takes 1.3 ms for 22,223 proposals and 7 objects, 15 for 60 objects, for which a GPU waits.
PAIRS_TO_ASSIGN = 2**14


class Costs(NamedTuple):
    """Costs of the predictions of one layer for the objects of one image, on the host.

    Attributes:
        matrix: (R, objects); infinite for pairs that need not be considered.
        rows: (R,) which predictions they are, in order; None if they are all.
        is_finite: whether all costs are, also those that have stayed on the device.
    """

    matrix: np.ndarray
    rows: np.ndarray | None
    is_finite: bool

    def assign(self, repeat: int) -> Match:
        """Find a cheapest assignment: indices of predictions and of objects, each matched ``repeat`` times."""
        rows, columns = linear_sum_assignment(np.tile(self.matrix, repeat))
        rows = rows if self.rows is None else self.rows[rows]
        return torch.from_numpy(rows), torch.from_numpy(columns % max(1, self.matrix.shape[1]))


class Transfer(NamedTuple):
    """What of the costs (N, Ld, Lq, n) of a group of layers travels to the host: all, or each object's cheapest.

    An assignment of c columns needs no more than the c cheapest predictions of each object: with any other one, one of
    these is free and no dearer.

    Attributes:
        shape: of the costs.
        kept: predictions of each object that are sent; Lq sends all of all.
        counts: objects of every image; what columns behind them hold does not matter.
    """

    shape: tuple[int, int, int, int]
    kept: int
    counts: Sequence[int]

    @classmethod
    def plan(cls, shape: tuple[int, int, int, int], counts: Sequence[int], repeat: int) -> "Transfer":
        predictions, objects = shape[2:]
        pays = predictions * objects > PAIRS_TO_ASSIGN and 4 * repeat * objects <= predictions
        return cls(shape, repeat * objects if pays else predictions, counts)

    @property
    def is_whole(self) -> bool:
        return self.kept == self.shape[2]

    def pack(self, costs: Tensor) -> Tensor:
        """Return what to send, int32 in one dimension: costs, bit for bit; or the chosen ones, where, and extremes."""
        if self.is_whole:
            return costs.flatten().view(torch.int32)
        values, predictions = costs.topk(self.kept, dim=2, largest=False, sorted=False)
        # A NaN is both of the extremes.
        floats = (values, *costs.flatten(2).aminmax(dim=2))
        return torch.cat([predictions.flatten().int(), *(x.flatten().view(torch.int32) for x in floats)])

    def unpack(self, sent: np.ndarray) -> list[list[Costs]]:
        """Costs by image and layer from what :meth:`pack` returned."""
        images, layers, _, objects = self.shape
        if self.is_whole:
            costs = sent.view(np.float32).reshape(self.shape)
            return [
                [Costs(layer, None, bool(np.isfinite(layer).all())) for layer in image[..., :count]]
                for image, count in zip(costs, self.counts, strict=True)
            ]
        shape = images, layers, self.kept, objects
        chosen, values, extremes = np.split(sent, [math.prod(shape), 2 * math.prod(shape)])
        finite = np.isfinite(extremes.view(np.float32)).reshape(2, images, layers).all(0)
        parts = chosen.reshape(shape), values.view(np.float32).reshape(shape), finite
        return [
            [_cheapest(*layer, count) for layer in zip(*image, strict=True)]
            for *image, count in zip(*parts, self.counts, strict=True)
        ]


def _cheapest(predictions: np.ndarray, values: np.ndarray, is_finite: bool, count: int) -> Costs:
    """Costs of chosen predictions, (kept, n) both, each column for one object."""
    predictions, values = predictions[:, :count], values[:, :count]
    rows, where = np.unique(predictions, return_inverse=True)
    matrix = np.full((len(rows), count), np.inf, dtype=values.dtype)
    matrix[where.reshape(values.shape), np.arange(count)] = values
    return Costs(matrix, rows, bool(is_finite) or count == 0)
