import numpy as np
import pytest

from deformable_detr.report.evaluation import load_evaluation
from deformable_detr.report.matching import IN_CROWD, NOTHING, BoxTable, match_detections
from deformable_detr.report.run import read_run


@pytest.fixture
def matches(evaluated):
    return load_evaluation(read_run(evaluated.path), evaluated.register()).matches


def table(*entries):
    keys = ("image_id", "category_id", "bbox", "score", "iscrowd")
    return BoxTable.from_coco(
        [dict(zip(keys, entry, strict=False)) for entry in entries], image_index={5: 0, 6: 1}, class_index={1: 0}
    )


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


def test_surest_detection_chooses_first_and_takes_the_closest_object():
    truth = table((5, 1, [0, 0, 10, 10]), (5, 1, [2, 0, 10, 10]))
    # Both overlap both objects with an IoU of at least 0.6; the weaker one would fit the second object exactly.
    found = table((5, 1, [2, 0, 10, 10], 0.5), (5, 1, [1.5, 0, 10, 10], 0.6))
    assert found.scores.tolist() == [0.6, 0.5]
    assert match_detections(truth, found, 2).tolist() == [1, 0]


def test_boxes_of_different_images_never_match():
    truth = table((5, 1, [0, 0, 10, 10]), (6, 1, [50, 50, 10, 10]))
    found = table((6, 1, [0, 0, 10, 10], 0.9), (5, 1, [50, 50, 10, 10], 0.9))
    assert match_detections(truth, found, 2).tolist() == [NOTHING, NOTHING]


def test_any_number_of_detections_may_lie_in_a_crowd():
    truth = table((5, 1, [0, 0, 100, 100], 1.0, 1))
    found = table(*((5, 1, [x, 0, 10, 10], 0.9) for x in (0, 20, 40, 200)))
    assert match_detections(truth, found, 1).tolist() == [IN_CROWD] * 3 + [NOTHING]


def test_matching_above_a_threshold_is_that_of_the_detections_above_it():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 30, (60, 2)), rng.uniform(10, 20, (60, 2))], axis=1)
    truth = table(*((5, 1, box.tolist()) for box in boxes[:15]))
    detections = [(5, 1, box.tolist(), float(score)) for box, score in zip(boxes[15:], rng.random(45), strict=True)]
    all_matched = match_detections(truth, table(*detections), 1)
    strong = [detection for detection in detections if detection[3] >= 0.5]
    assert match_detections(truth, table(*strong), 1).tolist() == all_matched[: len(strong)].tolist()


@pytest.mark.parametrize("truth, found", [([], [(5, 1, [0, 0, 1, 1], 0.5)]), ([(5, 1, [0, 0, 1, 1])], []), ([], [])])
def test_nothing_to_match_leaves_every_detection_without_an_object(truth, found):
    assert match_detections(table(*truth), table(*found), 2).tolist() == [NOTHING] * len(found)
