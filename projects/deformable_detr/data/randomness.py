"""Random numbers as a function of where a run is, so that nothing about them has to be saved to resume it."""

import random

import numpy as np
import torch

# Different uses of one seed must not share their numbers.
DATA, STEP = 0, 1


def seed_generators(*words: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (all devices) from a tuple of numbers.

    Equal tuples give equal numbers, different ones independent numbers.

    Args:
        words: at least 0 each, such as (seed, STEP, iteration, rank).
    """
    state = np.random.SeedSequence(words).generate_state(8)
    random.seed(state[:3].tobytes())
    np.random.seed(state[3:6])
    torch.manual_seed(int(state[6]) << 32 | int(state[7]))
