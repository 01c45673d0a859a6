"""Training with a compiled transformer: one program, and nothing else is different.

What compiles here is the front end alone, which decides about programs; what generates code takes minutes.
"""

import copy
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {"with_box_refine": True, "two_stage": True, "num_decoder_layers": 1, "activation_checkpoint": True}
# A square, whose sides must not become equal for good, and sides that strides do not divide.
CANVASES = [(128, 128), (160, 128), (131, 257), (96, 320)]
OBJECTS = [[5.0, 5, 50, 60]], [1]


def step(model, batch):
    """Losses and gradient of a step in bfloat16."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def train_in_two_processes(rank, store, model, make_input, reports):
    """Compare steps of the compiled model with those of the same model as it is written."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        torch._dynamo.reset()
        counters.clear()
        plain = copy.deepcopy(model)
        model.compile_for_training(backend="eager")
        assert list(plain.state_dict()) == list(model.state_dict())
        distributed = DistributedDataParallel(model)
        for seed, (height, width) in enumerate(CANVASES):
            batch = [make_input(height, width, *OBJECTS, seed=10 * rank + seed), make_input(height - 20, width - 30)]
            expected, expected_gradient = step(plain, batch)
            dist.all_reduce(expected_gradient)
            losses, gradient = step(distributed, batch)
            torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
            assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > 0.999
            torch.testing.assert_close(gradient.norm(), expected_gradient.norm() / 2, rtol=0.02, atol=0)
            # An evaluation in between runs the model as it is written.
            model.eval()([make_input(64, 96)])
            model.train()
        reports.put(counters["stats"]["unique_graphs"])
    except Exception:
        reports.put(traceback.format_exc())


@pytest.mark.slow
def test_all_sizes_take_one_program_with_mixed_precision_checkpoints_and_processes(
    make_model, make_input, randomize, tmp_path
):
    model, context = randomize(make_model(**OPTIONS)).train(), mp.get_context("fork")
    reports = context.SimpleQueue()
    arguments = (tmp_path / "store", model, make_input, reports)
    processes = [context.Process(target=train_in_two_processes, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    found = [reports.get() for _ in processes if not reports.empty()]
    assert found == [1, 1], found


def test_a_padding_invariant_model_says_that_it_cannot(make_model):
    model = make_model(padding_invariant=True)
    with pytest.raises(ValueError, match="padding_invariant cannot be compiled"):
        model.compile_for_training()
    assert not model.is_compiled


def test_losses_of_a_model_that_its_user_compiles_are_computed_as_they_are_written(make_model):
    torch._dynamo.reset()
    criterion, generator = make_model().criterion, torch.Generator().manual_seed(0)
    shapes = {
        "pred_logits": (2, 1, 11, 5),
        "pred_boxes": (2, 1, 11, 4),
        "enc_logits": (1, 20, 5),
        "enc_boxes": (1, 20, 4),
    }
    raw = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}]

    def losses(raw):
        return criterion({name: x.sigmoid() if "boxes" in name else x for name, x in raw.items()}, targets)

    torch.testing.assert_close(torch.compile(losses, backend="eager")(raw), losses(raw))
