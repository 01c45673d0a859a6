"""Crowded scenes, as the study draws them; the demo's are tested with the tool that draws those."""

import json

import numpy as np
import pytest

from deformable_detr.data.shapes import CATEGORIES, Scene, draw_scene, write_split

CROWD = Scene(
    short_side=96, long_sides=(96, 128), min_radius=3.0, max_radius=0.15, num_objects=(30, 60), clutter=(1, 4)
)


def draw(seed, scene=CROWD):
    return draw_scene(np.random.default_rng(seed), scene)


def test_a_crowd_has_many_small_objects_and_never_more_than_the_most():
    drawn = [draw(seed) for seed in range(4)]
    assert all(image.shape in {(96, 96, 3), (96, 128, 3), (128, 96, 3)} for image, _ in drawn)
    counts = [len(objects) for _, objects in drawn]
    assert max(counts) > 20 and max(counts) <= 60
    areas = [entry["area"] for _, objects in drawn for entry in objects]
    assert np.mean(np.array(areas) < 32**2) > 0.9


def test_the_same_seed_draws_the_same_crowd():
    (image, objects), (again, same) = draw(3), draw(3)
    np.testing.assert_array_equal(image, again)
    assert objects == same


def test_clutter_is_seen_and_is_no_object():
    empty = Scene(short_side=96, long_sides=(96,), num_objects=(0, 0), clutter=(5, 5))
    image, objects = draw(1, empty)
    without, _ = draw(1, Scene(short_side=96, long_sides=(96,), num_objects=(0, 0)))
    assert objects == []
    assert np.abs(image.astype(int) - without).max() > 60


@pytest.mark.parametrize("clutter", [(0, 0), (0, 3)])
def test_a_split_of_another_scene_is_drawn_again_and_the_same_is_kept(tmp_path, clutter):
    scene = Scene(short_side=48, long_sides=(48,), min_radius=4.0, num_objects=(1, 2), clutter=clutter)
    assert write_split(tmp_path, "val", 2, seed=0, split=1, scene=scene)
    assert not write_split(tmp_path, "val", 2, seed=0, split=1, scene=scene)
    assert write_split(tmp_path, "val", 2, seed=0, split=1)
    content = json.loads((tmp_path / "val.json").read_text())
    # As the demo has always written it, so that what it left is not drawn again.
    assert content["info"].keys() == {"description", "version", "split", "num_images", "seed"}
    assert {entry["id"] for entry in content["categories"]} == set(CATEGORIES.values())
