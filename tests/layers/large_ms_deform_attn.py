"""Gradients of a value with offsets beyond 2^31 elements, whose last two lines alone are sampled."""

import torch
from torch import Tensor

from deformable_detr.layers import ms_deform_attn, ms_deform_attn_pytorch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
# N, H, W, M, D, and points outside beside the four at the end. H and W are powers of two, so that float32 holds every
# location and pixel exactly.
LARGE = {
    "one image": (1, 1024, 1024, 65, 32, 0),
    "two images": (2, 1024, 1024, 33, 32, 0),
    # As many points as make it pay to copy the value head by head.
    "heads first": (1, 512, 2, 2, 2**20 + 2**14, 1020),
}
SMALL = {
    "one image": (1, 32, 32, 5, 32, 0),
    "two images": (2, 32, 32, 3, 32, 0),
    "heads first": (1, 32, 2, 2, 33, 60),
}


def check_gradients_at_the_end(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Compare the op's gradients with those of the twin for a value that is nothing but the last two lines."""
    N, H, W, M, D, outside = sizes
    generator = torch.Generator().manual_seed(0)
    # Memory that nobody writes to takes no place: all but the last lines.
    value = torch.empty(N, H * W, M, D, dtype=dtype, device=device)
    last = torch.randn(N, 2 * W, M, D, generator=generator).to(value)
    value[:, -2 * W :] = last
    x = torch.randint(-15, 16 * W, (N, 2, M, 1, 4), generator=generator) / 16
    y = torch.randint(0, 32, (N, 2, M, 1, 4), generator=generator) / 16
    weights = torch.rand(N, 2, M, 1, 4, generator=generator)
    grad_output = torch.randn(N, 2, M * D, generator=generator).to(value)

    def locations(height: int, lines_above: int) -> Tensor:
        return torch.stack([(x + 0.5) / W, (y + lines_above + 0.5) / height], -1).to(device)

    shape = (N, 2, M, 1, outside)
    everywhere = torch.cat([locations(H, H - 2), torch.full((*shape, 2), 5.0, device=device)], -2)
    all_weights = torch.cat([weights, torch.ones(shape)], -1).to(device)
    tensors = [tensor.requires_grad_() for tensor in (value, everywhere, all_weights)]
    output = ms_deform_attn(value, [(H, W)], everywhere, all_weights)
    actual = torch.autograd.grad(output, tensors, grad_output)

    small = [tensor.double().requires_grad_() for tensor in (last, locations(2, 0), weights.to(device))]
    expected_output = ms_deform_attn_pytorch(small[0], [(2, W)], *small[1:])
    expected = list(torch.autograd.grad(expected_output, small, grad_output.double()))
    expected[1][..., 1] *= H / 2  # per height of the map, and not of two lines
    assert_close(output, expected_output)
    assert_close(actual[0][:, -2 * W :], expected[0])
    assert_close(actual[1][..., :4, :], expected[1], TOLERANCE[torch.float32])
    assert_close(actual[2][..., :4], expected[2], TOLERANCE[torch.float32])
    assert not actual[1][..., 4:, :].any() and not actual[2][..., 4:].any()
    # Nothing went elsewhere.
    assert actual[0].count_nonzero() == actual[0][:, -2 * W :].count_nonzero() > 0


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (tolerance or TOLERANCE[actual.dtype]), error
