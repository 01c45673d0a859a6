import dataclasses

import pytest
import torch
from torch import Tensor

from deformable_detr.layers import ms_deform_attn, ms_deform_attn_pytorch


@dataclasses.dataclass
class Case:
    """value (N, S, M, D), L pairs (H, W), locations (N, Lq, M, L, P, 2), weights (N, Lq, M, L, P)."""

    value: Tensor
    spatial_shapes: list[tuple[int, int]]
    sampling_locations: Tensor
    attention_weights: Tensor

    @property
    def args(self) -> tuple:
        return self.value, self.spatial_shapes, self.sampling_locations, self.attention_weights

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.sampling_locations, self.attention_weights

    def to(self, value_dtype: torch.dtype, dtype: torch.dtype) -> "Case":
        value, locations, weights = self.tensors
        return Case(value.to(value_dtype), self.spatial_shapes, locations.to(dtype), weights.to(dtype))

    def with_grad(self) -> "Case":
        value, locations, weights = (tensor.detach().clone().requires_grad_() for tensor in self.tensors)
        return Case(value, self.spatial_shapes, locations, weights)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[ms_deform_attn, ms_deform_attn_pytorch], ids=["op", "twin"])
def attend(request):
    """The op (a compiled kernel where one is built) and its PyTorch twin."""
    return request.param


@pytest.fixture
def make_case(device):
    """Random float64 arguments off the pixel lattice, where the gradient of the locations is defined.

    Locations reach `margin` of a map beyond its borders.
    """

    def make(shapes=((5, 7), (3, 4), (1, 1)), N=2, M=3, D=4, Lq=5, P=2, margin=0.2, seed=0) -> Case:
        generator = torch.Generator().manual_seed(seed)
        L, S = len(shapes), sum(h * w for h, w in shapes)
        value = torch.randn(N, S, M, D, generator=generator, dtype=torch.float64)
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64).view(L, 1, 2)
        random = torch.rand(N, Lq, M, L, P, 2, generator=generator, dtype=torch.float64)
        pixels = ((random * (1 + 2 * margin) - margin) * sizes).floor()
        fraction = torch.rand(N, Lq, M, L, P, 2, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        locations = (pixels + fraction + 0.5) / sizes.clamp(min=1)
        weights = torch.rand(N, Lq, M, L * P, generator=generator, dtype=torch.float64).softmax(-1)
        weights = weights.view(N, Lq, M, L, P)
        return Case(value.to(device), list(shapes), locations.to(device), weights.to(device))

    return make
