import math

import pytest
import torch

from deformable_detr.layers.position_encoding import PositionEmbeddingSine, sine_embedding


def test_sine_embedding_interleaves_sine_and_cosine():
    encoded = sine_embedding(torch.tensor([0.5]), 4, temperature=100.0)
    expected = [math.sin(0.5), math.cos(0.5), math.sin(0.05), math.cos(0.05)]
    torch.testing.assert_close(encoded, torch.tensor([expected]))


def test_first_cell_centre_is_half_a_cell_of_the_valid_area():
    mask = torch.zeros(1, 2, 4, dtype=torch.bool)
    encoded = PositionEmbeddingSine(8)(mask)
    assert encoded.shape == (1, 8, 2, 4)
    # y channels come first: row 0 of 2 is a quarter of the way, column 0 of 4 an eighth.
    assert encoded[0, 0, 0, 0].item() == pytest.approx(math.sin(2 * math.pi * 0.25), abs=1e-5)
    assert encoded[0, 4, 0, 0].item() == pytest.approx(math.sin(2 * math.pi * 0.125), abs=1e-5)


def test_without_an_offset_and_at_temperature_20_the_encoding_is_that_of_dino():
    encoded = PositionEmbeddingSine(8, temperature=20.0, offset=0.0)(torch.zeros(1, 2, 4, dtype=torch.bool))
    # Row 1 of 2 is at half of the height, and column 3 of 4 at three quarters of the width: right borders of the cells.
    # Four channels per axis: their frequencies are 1 and 1 / sqrt(20).
    angles = [math.pi, math.pi / 20**0.5, 1.5 * math.pi, 1.5 * math.pi / 20**0.5]
    expected = [function(angle) for angle in angles for function in (math.sin, math.cos)]
    torch.testing.assert_close(encoded[0, :, 0, 2], torch.tensor(expected), rtol=0, atol=1e-5)


def test_padding_does_not_change_the_encoding_of_valid_cells():
    embedding = PositionEmbeddingSine(16)
    small = embedding(torch.zeros(1, 5, 7, dtype=torch.bool))
    padded_mask = torch.ones(1, 9, 8, dtype=torch.bool)
    padded_mask[:, :5, :7] = False
    assert torch.equal(embedding(padded_mask)[:, :, :5, :7], small)


def test_encoding_is_finite_float32_at_padding_even_when_the_default_dtype_is_half():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :1, :1] = False
    encoded = PositionEmbeddingSine(16).half()(mask)
    assert encoded.dtype == torch.float32
    assert encoded.isfinite().all()


@pytest.mark.parametrize("embed_dim", [0, 6, -4])
def test_embed_dim_must_hold_sines_and_cosines_of_two_axes(embed_dim):
    with pytest.raises(ValueError, match=f"embed_dim .*{embed_dim}"):
        PositionEmbeddingSine(embed_dim)


@pytest.mark.parametrize("temperature", [0.0, -20.0, float("nan")])
def test_the_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature .*{temperature}"):
        PositionEmbeddingSine(8, temperature=temperature)
