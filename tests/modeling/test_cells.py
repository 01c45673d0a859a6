"""Numbers about cells that depend on sizes alone, and where they are kept."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from deformable_detr.layers.kept import keep_per_size
from deformable_detr.modeling.cells import get_cells, get_sampled_pixels
from deformable_detr.modeling.padding import padding_mask, padding_masks


def test_cells_come_level_by_level_and_row_by_row():
    cells = get_cells([(1, 2), (2, 1)], torch.zeros(()))
    assert cells.level.tolist() == [0, 0, 1, 1]
    assert cells.centers.tolist() == [[0.5, 0.5], [1.5, 0.5], [0.5, 0.5], [0.5, 1.5]]
    assert cells.sizes.tolist() == [[2, 1], [1, 2]]
    assert cells.strides.tolist() == [[1], [1], [2], [2]]


def test_cells_stand_for_pixels_at_equal_distances():
    columns, rows = get_sampled_pixels((4, 9), [(2, 3)], torch.device("cpu"))[0].tolist()
    assert columns[:3] == [0, 3, 6] and rows[:2] == [0, 2]
    assert set(columns[3:] + rows[2:]) == {float("inf")}


@pytest.mark.parametrize("canvas", [(97, 61), (800, 1333), (33, 640), (5, 3)])
def test_masks_of_cells_are_the_nearest_samples_of_the_mask_of_pixels(canvas):
    """As the official code makes them, also where strides do not divide the canvas and sampling rounds."""
    height, width = canvas
    generator = torch.Generator().manual_seed(0)
    sizes = torch.stack([torch.randint(1, side + 1, (20,), generator=generator) for side in canvas], dim=1)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]
    pixels = padding_mask(canvas, sizes).float()[None]
    expected = [F.interpolate(pixels, size=shape)[0].bool() for shape in shapes]
    for mask, nearest in zip(padding_masks(canvas, sizes, shapes), expected, strict=True):
        assert torch.equal(mask, nearest)


def test_what_is_kept_is_made_once_per_size_and_never_for_a_compiler():
    calls = []

    @keep_per_size(1)
    def ones(size: int, dtype: torch.dtype) -> torch.Tensor:
        calls.append(size)
        return torch.ones(size, dtype=dtype)

    with torch.inference_mode():
        first = ones(2, torch.float32)
    assert ones(2, torch.float32) is first and not first.is_inference()
    assert ones(2, torch.float64).dtype is torch.float64
    assert ones(2, torch.float32) is not first and calls == [2, 2, 2]
    with FakeTensorMode():
        assert ones(2, torch.float32) is not ones(3, torch.float32) and calls[3:] == [2, 3]
    assert type(ones(3, torch.float32)) is torch.Tensor
    traced = torch.jit.trace(lambda x: x + ones(x.shape[0], x.dtype), torch.ones(2), check_trace=False)
    assert traced(torch.ones(3)).tolist() == [2, 2, 2]
