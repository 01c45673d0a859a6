"""Training on images of every size and batches without objects holds no memory from step to step."""

import gc
import os

import torch
from detectron2.structures import Boxes, Instances

from deformable_detr import load_config
from deformable_detr.loading import build_model

BOUND = 64  # MiB that the process may grow by: allocators do not give everything back


def random_batch(generator: torch.Generator) -> list[dict]:
    batch = []
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        height, width = torch.randint(20, 120, (2,), generator=generator).tolist()
        count = int(torch.randint(0, 5, (), generator=generator))
        instances = Instances((height, width))
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * 10
        instances.gt_boxes = Boxes(torch.cat((corners[:, 0], corners[:, 1] + 4), dim=1))
        instances.gt_classes = torch.randint(80, (count,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_steps_leave_nothing_behind(tiny_yaml, amount, outcomes):
    _, path, *opts = tiny_yaml("_two_stage")
    model = build_model(load_config(path, opts)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tensors, memory = [], []
    # Twice through the same batches: what is kept per size of image is there after the first time.
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        for _ in range(amount(12, 500)):
            optimizer.zero_grad()
            loss = sum(model(random_batch(generator)).values())
            loss.backward()
            optimizer.step()
            assert loss.isfinite()
            outcomes["steps"] += 1
        tensors.append(live_tensors())
        memory.append(resident_mib())
    assert tensors[1] <= tensors[0]
    assert memory[1] - memory[0] < BOUND
    outcomes["MiB of growth in the second half"] += max(round(memory[1] - memory[0]), 0)
