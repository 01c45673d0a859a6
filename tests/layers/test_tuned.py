import pytest
import torch
from torch import nn

from deformable_detr.layers import Dropout
from deformable_detr.layers.tuned import converted_once, relu_and_dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_drops_with_the_given_probability_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003)
    out = Dropout(p)(x)
    # Standard deviation of the share of a million: below 0.0005.
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.002)
    assert out.unique().tolist() == [0, pytest.approx(1 / (1 - p), abs=1e-4)]
    # Neighbours share a random number; they must not share a fate.
    dropped = (out == 0).float().flatten()[:1_000_000].view(-1, 4)
    assert dropped.T.corrcoef().fill_diagonal_(0).abs().max() < 0.01
    assert dropped.mean(0).tolist() == pytest.approx([p] * 4, abs=0.004)


def test_gradient_passes_where_the_value_passed():
    x = torch.randn(5, 7, requires_grad=True)
    out = Dropout(0.5)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, (out != 0) * 2.0)


def test_a_seed_repeats_the_mask_and_dtypes_are_kept():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(3, 50, dtype=dtype)
        outs = []
        for _ in range(2):
            torch.manual_seed(1)
            outs.append(Dropout(0.3)(x))
        assert torch.equal(*outs) and outs[0].dtype == dtype


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.4, False)])
def test_does_nothing_without_probability_or_training(p, training):
    x = torch.randn(4, 4)
    assert torch.equal(Dropout(p).train(training)(x), x)


def test_probability_one_drops_everything_even_infinity():
    assert not Dropout(1.0)(torch.randn(8)).any()
    assert Dropout(0.5)(torch.full((100,), float("inf"))).isnan().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_relu_and_dropout_are_the_two_one_after_the_other_bit_for_bit(p, dtype, device):
    values, gradient = torch.randn(2, 50, 70, dtype=dtype, device=device)
    values[0], values[1] = 0.0, -torch.inf
    results = []
    for function in (relu_and_dropout, lambda x, dropout: dropout(x.relu())):
        torch.manual_seed(2)
        x = values.clone().requires_grad_()
        out = function(x * 1, Dropout(p))
        results.append((out, *torch.autograd.grad(out, x, gradient)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dropout", "kept"), [(Dropout(0.5), 1), (nn.Dropout(0.5), 3), (Dropout(0.5).eval(), 1), (nn.Identity(), 1)]
)
def test_of_relu_and_dropout_only_the_result_is_kept_unless_the_dropout_is_anothers(bytes_kept, dropout, kept):
    x, weight = torch.randn(30, 40, requires_grad=True), torch.ones(40, 2, requires_grad=True)

    def run():
        return relu_and_dropout(x, dropout) @ weight

    assert bytes_kept(run) == kept * x.nbytes + 2 * 40 * 4
    run().sum().backward()


def test_readers_of_one_copy_have_the_gradients_of_readers_with_their_own():
    layers = [nn.Linear(8, 5) for _ in range(3)]
    results = []
    for once in (True, False):
        x = torch.linspace(-3, 5, 160).view(20, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            read = converted_once(x) if once else lambda x=x: x
            inputs = [read() for _ in layers]
            total = sum(layer(given).square().sum() for layer, given in zip(layers, inputs, strict=True))
        results.append((total, *torch.autograd.grad(total, [x, *nn.ModuleList(layers).parameters()])))
        assert len({given.data_ptr() for given in inputs}) == 1
        assert inputs[0].dtype == (torch.bfloat16 if once else torch.float32)
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, True), (torch.float64, True)])
def test_nothing_is_copied_that_autocast_leaves_as_it_is(dtype, autocast):
    x = torch.ones(3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert converted_once(x)() is x
