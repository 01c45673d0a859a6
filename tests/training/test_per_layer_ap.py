"""The AP of every decoder layer."""

import pytest
import torch
from torch import nn

from deformable_detr.training.per_layer_ap import EveryLayer, LayerEvaluators


class Evaluator:
    """Counts images of detections, and gives the results that it was made with."""

    def __init__(self, results: dict | None = None) -> None:
        self.results = results
        self.seen = 0

    def reset(self) -> None:
        self.seen = 0

    def process(self, inputs: list, outputs: list) -> None:
        self.seen += len(outputs)

    def evaluate(self) -> dict | None:
        return self.results


def test_layers_are_told_apart_and_the_last_one_is_what_the_model_detects(model_and_batch):
    model, batch = model_and_batch
    every_layer = EveryLayer(model.eval())
    with torch.no_grad():
        first, last = every_layer(batch)
        expected = model(batch)
    raw = model.predict_raw(batch)
    for image, (x, y) in enumerate(zip(last, expected, strict=True)):
        assert torch.equal(x["instances"].pred_boxes.tensor, y["instances"].pred_boxes.tensor)
        assert torch.equal(x["instances"].scores, y["instances"].scores)
        best = raw["pred_logits"][0, image].sigmoid().max()
        assert first[image]["instances"].scores[0] == best != x["instances"].scores[0]


@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_layers_leaves_the_mode_of_the_model(model_and_batch, mode):
    every_layer = EveryLayer(model_and_batch[0].train(mode))
    # What Detectron2 does around an evaluation.
    before = every_layer.training
    every_layer.eval().train(before)
    assert model_and_batch[0].training is mode


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="PER_LAYER_AP needs a DeformableDETR or a DETR, got Linear"):
        EveryLayer(nn.Linear(1, 1))


def test_each_layer_has_its_evaluator_and_the_last_ones_results_are_the_models():
    evaluators = [Evaluator({"bbox": {"AP": float(n), "AP-cat": 0.0}}) for n in range(2)]
    layers = LayerEvaluators(evaluators)
    layers.reset()
    layers.process(["image"], [["a"], ["b", "c"]])
    assert [evaluator.seen for evaluator in evaluators] == [1, 2]
    assert layers.evaluate() == {
        "bbox": {"AP": 1.0, "AP-cat": 0.0},
        "bbox_layer_0": {"AP": 0.0},
        "bbox_layer_1": {"AP": 1.0},
    }


@pytest.mark.parametrize("nothing", [None, {}])
def test_processes_beside_the_main_one_have_no_results(nothing):
    assert LayerEvaluators([Evaluator(nothing)] * 2).evaluate() == nothing


def test_every_layer_is_evaluated_on_request(run, tmp_path):
    results = run(tmp_path / "run", "--eval-only", per_layer_ap=True)
    assert results.keys() == {"bbox", "bbox_layer_0", "bbox_layer_1"}
    own = {name: value for name, value in results["bbox"].items() if not name.startswith("AP-")}
    assert "AP" in own and results["bbox_layer_1"] == pytest.approx(own, nan_ok=True)
    with pytest.raises(
        ValueError, match=r"--precision .*(PER_LAYER_AP|per_layer_ap) False, got DeformableDETR and True"
    ):
        run(tmp_path / "run", "--eval-only", "--precision", "bfloat16", per_layer_ap=True)
