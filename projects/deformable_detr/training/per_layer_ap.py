"""AP of every decoder layer, from one pass of the model per image."""

from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from torch import nn

from .step import unwrap


class EveryLayer(nn.Module):
    """A detector that returns, in evaluation, the detections of every decoder layer in place of the last one's.

    Args:
        model: a :class:`SetPredictionDetector`, also wrapped for distributed training.
        key: of the setting that asks for it, for error texts.

    Raises:
        TypeError: if the model has no decoder layers to tell apart.
    """

    def __init__(self, model: nn.Module, *, key: str = "TEST.PER_LAYER_AP") -> None:
        super().__init__()
        self.model = unwrap(model)
        # Detectron2 puts a model back into the mode in which it was; this one has none of its own.
        self.training = self.model.training
        if not hasattr(self.model, "predict"):
            raise TypeError(f"{key} needs a DeformableDETR or a DETR, got {type(self.model).__name__}")

    @property
    def num_layers(self) -> int:
        return self.model.transformer.num_decoder_layers

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return detections by layer and image, each as :meth:`SetPredictionDetector.inference` returns them."""
        images = self.model.preprocess_image(batched_inputs)
        outputs = self.model.predict(images, all_proposals=False)
        layers = zip(outputs["pred_logits"], outputs["pred_boxes"], strict=True)
        return [self.model.inference(logits, boxes, images, batched_inputs) for logits, boxes in layers]


class LayerEvaluators(DatasetEvaluator):
    """One evaluator for each decoder layer; the results are those of the last one, and AP, AP50, ... of every layer.

    Args:
        evaluators: of the layers, from the first to the last. They may write the same files: the last one's stay.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[list[dict[str, Any]]]) -> None:
        for evaluator, detections in zip(self._evaluators, outputs, strict=True):
            evaluator.process(inputs, detections)

    def evaluate(self) -> dict[str, Any] | None:
        """Results by task, as "bbox" of the last layer and "bbox_layer_0", "bbox_layer_1", ... without classes."""
        # All of them, in every process: they exchange their detections.
        results = [evaluator.evaluate() for evaluator in self._evaluators]
        if not results[-1]:
            return results[-1]
        by_layer = {
            f"{task}_layer_{layer}": {name: value for name, value in metrics.items() if not name.startswith("AP-")}
            for layer, tasks in enumerate(results)
            for task, metrics in tasks.items()
        }
        return {**results[-1], **by_layer}
