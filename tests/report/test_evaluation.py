import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from deformable_detr.data.evaluators import build_evaluator
from deformable_detr.report.evaluation import BestScore, find_best_score, load_evaluation
from deformable_detr.report.run import NoData, read_run

CAT, DOG = 7, 3
BOX = [10, 10, 20, 20]


def load(run_folder):
    return load_evaluation(read_run(run_folder.path), run_folder.register())


def test_precision_and_recall_are_as_worked_out_by_hand(run_folder):
    """Right, wrong, right: precision 1 up to recall 1/2, then 2/3. The other class has no object, and no say."""
    run_folder.write_truth((1, CAT, BOX), (2, CAT, BOX))
    run_folder.write_detections((1, CAT, BOX, 0.9), (1, CAT, [60, 60, 20, 20], 0.8), (2, CAT, BOX, 0.7))
    result = load(run_folder).precision_recall()
    for curve in (*result.curves().values(), *result.curves(1).values()):
        assert curve == pytest.approx(np.where(result.recall <= 0.5, 1, 2 / 3))
    ap = (51 + 50 * 2 / 3) / 101
    assert result.ap_per_class() == pytest.approx([np.nan, 100 * ap], nan_ok=True)


def test_a_loose_box_counts_at_low_thresholds_only(run_folder):
    run_folder.write_truth((1, CAT, [0, 0, 10, 10]))
    run_folder.write_detections((1, CAT, [0, 0, 10, 7], 0.9))  # IoU 0.7: right at .50, .55, .60, .65 and .70
    means = {label: curve.mean() for label, curve in load(run_folder).precision_recall().curves().items()}
    assert means == pytest.approx({"IoU .50": 1, "IoU .75": 0, "IoU .50:.95": 0.5})


def test_an_object_with_id_0_counts(run_folder):
    """Some tools number objects from 0, with which pycocotools marks detections that match nothing."""
    run_folder.write_truth((1, CAT, BOX))
    path = run_folder.data / "val.json"
    path.write_text(path.read_text().replace('"annotations": [{"id": 1,', '"annotations": [{"id": 0,'))
    run_folder.write_detections((1, CAT, BOX, 0.9))
    evaluation = load(run_folder)
    assert evaluation.truth["annotations"][0]["id"] == 0
    assert evaluation.precision_recall().ap_per_class() == pytest.approx([np.nan, 100], nan_ok=True)
    assert evaluation.best_scores()[0] == BestScore(0.45, 1.0, 1.0, 1.0)


def test_ap_per_category_equals_that_of_detectron2s_evaluator(run_folder):
    rng = np.random.default_rng(0)

    def boxes(count):
        return np.concatenate([rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))], axis=1).round(2)

    truth = [(int(rng.integers(1, 4)), int(rng.choice([CAT, DOG])), box.tolist()) for box in boxes(20)]
    run_folder.write_truth(*truth, (1, CAT, [0, 0, 50, 50], 1))
    name = run_folder.register()
    dicts = DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False, output_dir=str(run_folder.path / "inference"))
    evaluator.reset()
    for image in dicts:
        own = [(category, box) for image_id, category, box in truth if image_id == image["image_id"]]
        shifted = np.array([box for _, box in own]) + rng.normal(0, 2, (len(own), 4))
        xywh = torch.tensor(np.concatenate([shifted, boxes(5)]), dtype=torch.float32)
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        found.scores = torch.tensor(rng.random(len(xywh)), dtype=torch.float32)
        classes = [int(category == CAT) for category, _ in own] + rng.integers(0, 2, 5).tolist()
        found.pred_classes = torch.tensor(classes)
        evaluator.process([image], [{"instances": found}])
    expected = evaluator.evaluate()["bbox"]
    result = load(run_folder).precision_recall()
    assert result.ap_per_class() == pytest.approx([expected["AP-dog"], expected["AP-cat"]])
    overall = [100 * curve.mean() for curve in result.curves().values()]
    assert overall == pytest.approx([expected["AP50"], expected["AP75"], expected["AP"]])
    assert 5 < expected["AP"] < 95


def test_all_detections_of_an_image_count_as_in_the_evaluation_of_the_run(run_folder):
    """120 cells, all found, then 30 false detections; the first 100 reach 84 of the 101 recalls."""
    corners = torch.tensor([[6.0 * (k % 20), 6.0 * (k // 20)] for k in range(150)])
    grid = torch.cat((corners, corners + 4), dim=1)
    run_folder.write_truth(*((1, CAT, [x, y, 4, 4]) for x, y, *_ in grid[:120].tolist()), num_images=1)
    name = run_folder.register()
    found = Instances((100, 120), pred_boxes=Boxes(grid), scores=torch.arange(150, 0, -1) / 200)
    found.pred_classes = torch.ones(150, dtype=torch.int64)
    evaluator = build_evaluator(name, str(run_folder.path / "inference"), max_detections=150)
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    evaluation = load(run_folder)
    assert evaluation.precision_recall().ap_per_class() == pytest.approx([np.nan, 100], nan_ok=True)
    # Midway between the scores of the last cell and of the first false detection.
    assert evaluation.best_scores()[0] == BestScore(pytest.approx(30.5 / 200), 1.0, 1.0, 1.0)


def test_ground_truth_with_a_byte_order_mark_is_read(evaluated):
    path = evaluated.data / "val.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load(evaluated).truth["annotations"]) == 5


def test_detections_are_left_as_they_are_in_the_file(evaluated):
    evaluation = load(evaluated)
    assert len(evaluation.matches.scores) == 7
    evaluation.precision_recall()
    assert evaluation.detections == json.loads((evaluated.path / "inference/coco_instances_results.json").read_text())


def test_users_data_is_found_through_the_command_line_in_the_log(evaluated):
    evaluation = load_evaluation(read_run(evaluated.path))
    assert (evaluation.name, evaluation.class_names) == ("user_val", ["dog", "cat"])
    assert evaluation.objects_per_class().tolist() == [2, 2]


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda folder: (folder.path / "inference/coco_instances_results.json").unlink(), "No evaluation has ended"),
        (lambda folder: (folder.path / "inference/coco_instances_results.json").write_text('[{"ima'), "not complete"),
        (lambda folder: folder.write_detections((99, CAT, BOX, 0.5)), "no image_id 99"),
        (lambda folder: folder.write_detections((1, 4, BOX, 0.5)), "no category_id 4"),
        (lambda folder: (folder.data / "val.json").rename(folder.data / "old.json"), "has moved: .*val.json"),
        (lambda folder: (folder.path / "log.txt").unlink(), "give --val-json"),
        (lambda folder: (folder.path / "config.yaml").unlink(), "no config.yaml"),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(evaluated, spoil, reason):
    spoil(evaluated)
    with pytest.raises(NoData, match=reason):
        load_evaluation(read_run(evaluated.path))


def test_ground_truth_that_is_not_here_is_named_with_the_variable_that_leads_to_it(evaluated):
    name = evaluated.register()
    (evaluated.data / "val.json").unlink()
    with pytest.raises(NoData, match="val.json.*DETECTRON2_DATASETS"):
        load_evaluation(read_run(evaluated.path), name)


def test_a_model_that_detects_nothing_has_no_curve_but_misses_everything(evaluated):
    evaluated.write_detections()
    evaluation = load(evaluated)
    with pytest.raises(NoData, match="detected nothing"):
        evaluation.precision_recall()
    assert evaluation.matches.confusion(0.3)[:, -1].tolist() == [2, 2, 0]


def test_best_score_is_as_worked_out_by_hand():
    """Right, right, wrong, right of 4 objects: F1 is 2/5, 4/6, 4/7, 6/8."""
    scores, correct = np.array([0.5, 0.9, 0.7, 0.2]), np.array([False, True, True, True])
    assert find_best_score(scores, correct, 4) == BestScore(0.1, 0.75, 0.75, 0.75)
    # Of 2 objects, the last one not right: 2/3, 4/4, 4/5, 4/6.
    assert find_best_score(scores, correct & (scores > 0.2), 2) == BestScore(0.6, 1.0, 1.0, 1.0)


def test_detections_of_equal_scores_are_shown_together_or_not_at_all():
    scores, correct = np.array([0.8, 0.8, 0.8]), np.array([True, False, False])
    assert find_best_score(scores, correct, 1) == BestScore(0.4, 0.5, pytest.approx(1 / 3), 1.0)


def test_without_a_right_detection_there_is_no_best_score():
    assert find_best_score(np.array([0.9]), np.array([False]), 3) is None
    assert find_best_score(np.empty(0), np.empty(0, dtype=bool), 0) is None


def test_best_scores_count_every_category_and_all_together(evaluated):
    """Dogs: 0.9 right, 0.7 in a crowd of cats, which is none of dogs, 0.5 repeated; cats: 0.9 right."""
    overall, (dog, cat) = load(evaluated).best_scores()
    assert dog == BestScore(pytest.approx(0.8), pytest.approx(2 / 3), 1.0, 0.5)
    assert cat == BestScore(pytest.approx(0.85), pytest.approx(2 / 3), 1.0, 0.5)
    assert overall == BestScore(pytest.approx(0.85), pytest.approx(4 / 6), 1.0, 0.5)


def test_detections_in_crowds_of_their_category_do_not_lower_f1(run_folder):
    run_folder.write_truth((1, CAT, [0, 0, 10, 10]), (1, CAT, [40, 40, 50, 50], 1))
    run_folder.write_detections((1, CAT, [50, 50, 10, 10], 0.9), (1, CAT, [0, 0, 10, 10], 0.5))
    assert load(run_folder).best_scores()[0] == BestScore(0.25, 1.0, 1.0, 1.0)


def add_to_truth(run_folder, **entry):
    path = run_folder.data / "val.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 99, "image_id": 1, "category_id": CAT, "bbox": [1, 1, 5, 5], **entry})
    path.write_text(json.dumps(content))


def test_objects_of_no_image_are_left_out_as_by_the_loader(evaluated):
    before = load(evaluated).matches
    add_to_truth(evaluated, image_id=77, bbox=None)
    after = load(evaluated).matches
    assert after.errors(0.3)[0].tolist() == before.errors(0.3)[0].tolist()


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"bbox": None}, "annotation 99 of image 1: bbox must be four finite numbers, got null"),
        ({"ignore": 1}, 'annotation 99 has "ignore": 1'),
        ({"category_id": 1}, "category_id=1 but this id does not exist"),
        ({"id": 1}, "Annotation ids in .* are not unique"),
    ],
)
def test_ground_truth_that_cannot_be_used_is_named(evaluated, entry, told):
    add_to_truth(evaluated, **entry)
    with pytest.raises(NoData, match=rf"(?s)The ground truth of by_hand_val in .*val\.json cannot be used: .*{told}"):
        load(evaluated)
