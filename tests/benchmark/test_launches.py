"""What `python -m deformable_detr.benchmark ... --launches` counts, against counts by hand."""

import pytest
import torch
from torch import nn

from deformable_detr.benchmark.launches import count_launches, format_launches, sum_by_phase


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 4)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.blocks[0](x).relu()
        return self.drop(self.blocks[1](x.reshape(-1, 3))).sum()


def test_operations_of_a_step_belong_to_the_module_that_made_them():
    model = TwoLayers().eval()
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)

    def step():
        model(torch.ones(5, 2)).backward()
        optimizer.step()

    counts = count_launches(step, model)
    assert counts == {
        ("", "forward", "ones"): 1,
        ("blocks.0", "forward", "addmm"): 1,
        ("", "forward", "relu"): 1,
        ("blocks.1", "forward", "addmm"): 1,
        ("", "forward", "sum"): 1,
        ("", "forward", "ones_like"): 1,  # the gradient of the loss
        # A layer's gradients are a product for its weight, a sum for its bias, and a product for what comes before.
        ("blocks.1", "backward", "mm"): 2,
        ("blocks.1", "backward", "sum.dim_IntList"): 1,
        ("", "backward", "threshold_backward"): 1,
        ("blocks.0", "backward", "mm"): 1,
        ("blocks.0", "backward", "sum.dim_IntList"): 1,
        ("", "optimizer", "add_.Tensor"): 4,
    }
    assert sum_by_phase(counts) == {"forward": 6, "backward": 6, "optimizer": 4}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_counts_parts_and_not_what_does_nothing(mode):
    model = TwoLayers().eval()

    @mode()
    def detect():
        # A view, a conversion to the type it has, an allocation: none of them runs anything.
        model(torch.empty(5, 2).to(torch.float32).view(5, 2))

    assert sum_by_phase(count_launches(detect, model)) == {"forward": 4}


def test_gradients_that_add_up_are_counted_where_they_meet():
    layer = nn.Linear(2, 2, bias=False)

    def call():
        x = torch.ones(1, 2)
        (layer(x) + layer(x)).sum().backward()

    counts = count_launches(call, layer)
    assert counts["", "backward", "mm"] == 2 and counts["", "backward", "add.Tensor"] == 1


def test_tables_cut_names_and_leave_out_numbers():
    model = TwoLayers().eval()
    table = format_launches(count_launches(lambda: model(torch.ones(5, 2)).backward(), model), 1)
    lines = [line.split() for line in table.splitlines()]
    assert ["blocks", "2", "5"] in lines and ["(the", "rest)", "4", "1"] in lines and ["all", "6", "6"] in lines
    assert lines[lines.index([]) + 3] == ["mm", "3"]
