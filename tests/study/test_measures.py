import math

import pytest

from deformable_detr.study.measures import count_duplicates, learning_curve
from deformable_detr.study.summary import at_time, equal_time, mean_curve, show, spread, summarise_study
from deformable_detr.study.table import Study, Table, Variant


def detection(box, *, image=1, category=1, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_duplicates_are_pairs_of_one_class_and_image_that_overlap():
    box = (0.0, 0.0, 10.0, 10.0)
    found = count_duplicates(
        [
            detection(box),
            # 80 of 100 pixels in common, 100 in the union: IoU 0.8.
            detection((0.0, 0.0, 10.0, 8.0)),
            # With the first 60 / 100; with the second 60 / 80 = 0.75.
            detection((0.0, 0.0, 10.0, 6.0)),
            detection(box, category=2),
            detection(box, image=2),
            # Too low a score.
            detection(box, score=0.29),
        ]
    )
    assert found == {"detections": 5, "duplicates": 2}


def test_an_overlap_of_just_the_limit_is_no_duplicate_and_a_score_of_just_the_limit_counts():
    halves = [detection((0.0, 0.0, 4.0, 4.0), score=0.3), detection((0.0, 0.0, 4.0, 2.0), score=0.3)]
    assert count_duplicates(halves, min_iou=0.5) == {"detections": 2, "duplicates": 0}
    assert count_duplicates(halves, min_iou=0.49) == {"detections": 2, "duplicates": 1}


def test_three_copies_are_three_pairs_and_nothing_is_none():
    assert count_duplicates([detection((1.0, 2.0, 3.0, 4.0))] * 3)["duplicates"] == 3
    assert count_duplicates([]) == {"detections": 0, "duplicates": 0}


def test_a_learning_curve_counts_iterations_from_one_and_seconds_of_steps():
    # Iterations from 0; the evaluation after the training has the number of the next one.
    metrics = {
        1: {"time": 0.5, "total_loss": 3.0, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/APs": math.nan},
        3: {"time": 0.25, "total_loss": 2.0},
        4: {"bbox/AP": 30.0, "bbox/AP50": 40.0, "bbox/APs": 5.0},
    }
    first, last = learning_curve(metrics, iterations=4)
    assert (first["iteration"], first["seconds"], first["AP"]) == (2, 1.0, 10.0) and math.isnan(first["APs"])
    assert last == {"iteration": 4, "seconds": 1.5, "AP": 30.0, "AP50": 40.0, "APs": 5.0}


def test_spread_is_the_mean_and_the_sample_standard_deviation():
    assert spread([1.0, 3.0, 5.0]) == {"mean": 3.0, "std": 2.0, "n": 3}
    assert spread([7.0]) == {"mean": 7.0, "std": None, "n": 1}
    assert spread([7.0, math.nan]) == {"mean": 7.0, "std": None, "n": 1}
    assert spread([math.nan]) is None and spread([]) is None


def test_a_spread_is_shown_with_what_is_known_of_it():
    assert show(spread([1.0, 3.0, 5.0])) == "3.0 ± 2.0"
    assert (show(spread([7.04])), show(None)) == ("7.0", "-")


def curve(*points):
    return [{"iteration": i, "seconds": s, "AP": ap, "APs": ap / 2} for i, s, ap in points]


def cell(*points, duplicates=0, **others):
    return {"curve": curve(*points), "detections": 10, "duplicates": duplicates, "test_queries": {}, **others}


def test_a_mean_curve_has_the_points_that_all_seeds_have():
    cells = [cell((2, 1.0, 10.0), (4, 2.0, 20.0)), cell((2, 3.0, 14.0))]
    (point,) = mean_curve(cells)
    assert point["iteration"] == 2
    assert point["seconds"]["mean"] == 2.0 and point["seconds"]["std"] == pytest.approx(math.sqrt(2))
    assert point["AP"]["mean"] == 12.0 and point["APs"]["mean"] == 6.0


def test_a_mean_curve_pairs_evaluations_of_the_same_iteration():
    cells = [cell((2, 1.0, 10.0), (4, 2.0, 20.0)), cell((4, 4.0, 30.0))]
    (point,) = mean_curve(cells)
    assert (point["iteration"], point["seconds"]["mean"], point["AP"]["mean"]) == (4, 3.0, 25.0)


def test_at_a_time_the_last_evaluation_until_then_counts():
    points = curve((2, 1.0, 10.0), (4, 2.0, 20.0))
    assert [at_time(points, seconds) for seconds in (0.5, 1.0, 1.9, 9.0)] == [0.0, 10.0, 10.0, 20.0]


def test_equal_time_lets_all_trainings_of_the_fastest_variant_end():
    slow, fast = [cell((4, 3.5, 1.0))], [cell((4, 2.0, 1.0)), cell((4, 4.0, 1.0))]
    assert equal_time({"slow": slow, "fast": fast, "missing": []}) == 4.0
    assert equal_time({"missing": []}) is None


@pytest.fixture
def table():
    variants = {"a": Variant("A", "m"), "b": Variant("B", "m", test_queries=(30,)), "c": Variant("C", "m")}
    return Table({"s": Study("Why?", ("a", "b", "c"))}, variants, sizes={}, common={})


def test_a_summary_compares_variants_at_equal_iterations_and_at_equal_time(table):
    results = {
        "a": [cell((2, 1.0, 10.0), (4, 2.0, 20.0), duplicates=1), cell((2, 1.0, 12.0), (4, 2.0, 24.0), duplicates=3)],
        "b": [cell((2, 2.0, 30.0), (4, 4.0, 40.0), test_queries={"30": {"AP": 35.0, "APs": 7.0}})],
        "c": [],
    }
    timed = {"variant": "b", "test_queries": 30, "ms": 5.0}
    summary = summarise_study(table, "s", results, {"machine": "M", "rows": [timed]})
    a, b, c = summary["rows"]
    assert (summary["equal_time"], summary["machine"]) == (2.0, "M")
    assert a["AP"] == {"mean": 22.0, "std": pytest.approx(math.sqrt(8)), "n": 2}
    assert a["duplicates"]["mean"] == 2.0
    # b has made half of its iterations in the time of a.
    assert (b["AP"]["mean"], b["AP at equal time"]["mean"]) == (40.0, 30.0)
    assert b["test_queries"]["30"]["AP"]["mean"] == 35.0 and b["test_queries"]["30"]["latency"] == timed
    assert (c["seeds"], c["AP"], c["curve"]) == (0, None, [])
