"""Matching by COCO's own evaluation: detections in the order of images, the surest first."""

import numpy as np
import pytest

from deformable_detr.report.evaluation import IN_CROWD, NOTHING, load_evaluation
from deformable_detr.report.run import read_run

CAT, DOG = 7, 3


@pytest.fixture
def match(run_folder):
    """A function (objects, detections) -> Matches, with entries as of RunFolder."""

    def run(truth, found):
        run_folder.write_truth(*truth)
        run_folder.write_detections(*found)
        return load_evaluation(read_run(run_folder.path)).matches

    return run


@pytest.fixture
def matches(evaluated):
    return load_evaluation(read_run(evaluated.path), evaluated.register()).matches


def test_confusion_of_three_images_is_as_counted_by_hand(matches):
    # columns: dog, cat, missed
    expected = [
        [1, 1, 0],  # dogs: one found, one taken for a cat
        [0, 1, 1],  # cats: one found, one missed; the crowd is none
        [1, 1, 0],  # background: the dog detected twice; the cat too far from its object
    ]
    assert matches.confusion(0.3).tolist() == expected


def test_confusion_counts_detections_from_the_threshold_on(matches):
    assert matches.confusion(0.2)[2].tolist() == [2, 1, 0]
    assert matches.confusion(0.95).tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_errors_of_an_image_are_its_missed_objects_and_false_detections(matches):
    missed, false = matches.errors(0.3)
    assert missed.tolist() == [1, 1, 0]
    assert false.tolist() == [1, 1, 1]


def test_every_object_is_in_one_cell_of_the_confusion(matches):
    for threshold in (0.0, 0.55, 0.85, 1.0):
        assert matches.confusion(threshold)[:-1].sum(axis=1).tolist() == [2, 2]


def test_surest_detection_chooses_first_and_takes_the_closest_object(match):
    # Both overlap both objects with an IoU of at least 0.6; the weaker one would fit the second object exactly.
    found = match(
        [(1, CAT, [0, 0, 10, 10]), (1, CAT, [2, 0, 10, 10])],
        [(1, CAT, [2, 0, 10, 10], 0.5), (1, CAT, [1.5, 0, 10, 10], 0.6)],
    )
    assert found.scores.tolist() == [0.6, 0.5]
    assert found.matched.tolist() == [1, 0]


def test_boxes_of_different_images_never_match(match):
    found = match(
        [(1, CAT, [0, 0, 10, 10]), (2, CAT, [50, 50, 10, 10])],
        [(2, CAT, [0, 0, 10, 10], 0.9), (1, CAT, [50, 50, 10, 10], 0.9)],
    )
    assert found.matched.tolist() == [NOTHING, NOTHING]


def test_any_number_of_detections_may_lie_in_a_crowd(match):
    found = match([(1, CAT, [0, 0, 50, 50], 1)], [(1, DOG, [x, 0, 10, 10], 0.9) for x in (0, 20, 40, 60)])
    assert found.matched.tolist() == [IN_CROWD] * 3 + [NOTHING]


def test_an_object_goes_before_the_crowd_that_it_lies_in(match):
    found = match([(1, CAT, [0, 0, 50, 50], 1), (1, DOG, [0, 0, 10, 16])], [(1, DOG, [0, 0, 10, 10], 0.9)] * 2)
    assert found.matched.tolist() == [1, IN_CROWD]
    assert found.is_correct().tolist() == [True, False]


def test_equal_scores_choose_in_the_order_of_categories_and_then_of_the_file(match):
    found = match(
        [(1, CAT, [0, 0, 10, 10])],
        [(1, CAT, [0, 0, 10, 9], 0.5), (1, DOG, [0, 0, 10, 8], 0.5), (1, DOG, [0, 0, 10, 10], 0.5)],
    )
    assert found.classes.tolist() == [0, 0, 1]  # the dogs first, whose category id is lower
    assert found.matched.tolist() == [0, NOTHING, NOTHING]


def test_objects_and_detections_of_every_size_count_and_more_than_100_in_an_image(match):
    tiny, huge = [0, 0, 1, 1], [-1e6, -1e6, 3e6, 3e6]
    boxes = [tiny, huge, *([index, 50, 0.5, 0.5] for index in range(110))]
    found = match([(1, CAT, box) for box in boxes], [(1, CAT, box, 1 - i / 200) for i, box in enumerate(boxes)])
    assert found.matched.tolist() == list(range(112))


def test_an_annotation_with_id_0_is_an_object_as_any(run_folder, evaluated):
    """COCO's evaluation says 0 for a detection without an object."""
    path = evaluated.data / "val.json"
    before = load_evaluation(read_run(evaluated.path)).matches
    path.write_text(path.read_text().replace('"id": 1, "image_id": 1', '"id": 0, "image_id": 1'))
    after = load_evaluation(read_run(evaluated.path)).matches
    assert after.matched.tolist() == before.matched.tolist()
    assert after.confusion(0.3).tolist() == before.confusion(0.3).tolist()


def test_matching_above_a_threshold_is_that_of_the_detections_above_it(match):
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 30, (60, 2)), rng.uniform(10, 20, (60, 2))], axis=1)
    truth = [(1, CAT, box.tolist()) for box in boxes[:15]]
    detections = [(1, CAT, box.tolist(), float(score)) for box, score in zip(boxes[15:], rng.random(45), strict=True)]
    all_matched = match(truth, detections).matched
    strong = [detection for detection in detections if detection[3] >= 0.5]
    assert match(truth, strong).matched.tolist() == all_matched[: len(strong)].tolist()


@pytest.mark.parametrize(
    "truth, found", [([], [(1, CAT, [0, 0, 1, 1], 0.5)]), ([(1, CAT, [0, 0, 1, 1])], []), ([], [])]
)
def test_nothing_to_match_leaves_every_detection_without_an_object(match, truth, found):
    assert match(truth, found).matched.tolist() == [NOTHING] * len(found)
