"""The model as one function of tensors, and its capture by torch.export: where every exported format starts.

Shapes: N images on a canvas of (H, W) pixels, Lq queries, K classes, k detections.
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError  # what torch.export raises
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torchvision.ops import box_convert

from ..layers import ms_deform_attn_pytorch
from ..modeling import SetPredictionDetector
from ..modeling.frozen_bn import fold_for_good
from ..modeling.padding import padding_mask

# The longest side, in pixels, that a program of dynamic size accepts; torch.export asks for a limit.
MAX_SIDE = 2**14
# Images in the example that a dynamic batch is captured with. Not 1, which would be taken for a constant, nor 2:
# some decompositions compare strides, and 2 * C is both two images and the position and content of one query.
EXAMPLE_BATCH = 3


class DetectionProgram(nn.Module):
    """What an exported file computes: images in, the best detections out, post-processing included.

    The input is RGB whatever channel order the model was trained in. What stands in the padding does not matter.
    """

    def __init__(self, model: SetPredictionDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (N, 3, H, W) uint8, RGB, resized for the model, each in the top left corner of the canvas.
            image_sizes: (N, 2) int64, height and width of each image in pixels, without its padding.

        Returns:
            Boxes (N, k, 4) float32, xyxy in [0, 1] of each image without its padding (times its original width and
            height they are pixels of the original); scores (N, k) float32, best first; labels (N, k) int64. A query
            may appear with several classes, of DETR with its best one; k is ``test_topk_per_image``, less for very
            small images and few queries.
        """
        outputs = self.predict(images, image_sizes)
        found = self.model.select_detections(outputs["pred_logits"][-1], outputs["pred_boxes"][-1])
        return found.boxes, found.scores, found.labels

    def predict(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Return what the model predicts before the best are selected; see ``SetPredictionDetector.predict_raw``."""
        if self.model.input_format == "BGR":
            images = images.flip(1)
        inside = ~padding_mask(images.shape[-2:], image_sizes)[:, None]
        return self.model.predict_padded(self.model.normalise(images) * inside, image_sizes, all_proposals=False)

    def scores_and_boxes(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, Lq, K), -1 of what is never selected, and boxes (N, Lq, 4) xyxy in [0, 1] of all queries."""
        outputs = self.predict(images, image_sizes)
        return self.model.classification.selectable_scores(outputs["pred_logits"][-1]), box_convert(
            outputs["pred_boxes"][-1], "cxcywh", "xyxy"
        )


@dataclass(frozen=True)
class InputShape:
    """Which input sizes are constants of a program; None is dynamic.

    Attributes:
        batch: N.
        size: (H, W) of the canvas in pixels.
    """

    batch: int | None = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        height, width = self.size or ("height", "width")
        return f"{self.batch or 'batch'} x 3 x {height} x {width}"


def capture(program: DetectionProgram, shape: InputShape, *, decompose: bool) -> ExportedProgram:
    """Record the program with torch.export, with FrozenBN multiplied into the convolutions for good.

    Args:
        shape: the sizes to keep dynamic.
        decompose: write ms_deform_attn out as grid_sample, which every runtime has; otherwise it stays the op
            ``deformable_detr::ms_deform_attn``, which the runtime must know.

    Raises:
        ValueError: if something in the model takes a size for a constant that is to stay dynamic.
    """
    stride = coarsest_stride(program.model)
    height, width = shape.size or (3 * stride + 8, 4 * stride + 8)
    batch = shape.batch or EXAMPLE_BATCH
    device = program.model.device
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=device)
    image_sizes = torch.tensor([[height, width]] * batch, device=device)
    dims = {}
    if shape.batch is None:
        dims[0] = Dim("batch", max=MAX_SIDE)
    of_images = dict(dims)
    if shape.size is None:
        # A level of one row or column would be captured as a constant: broadcasting treats size 1 specially.
        of_images |= {2: Dim("height", min=stride + 1, max=MAX_SIDE), 3: Dim("width", min=stride + 1, max=MAX_SIDE)}
    mode = _Decompose() if decompose else contextlib.nullcontext()
    folded = DetectionProgram(fold_for_good(copy.deepcopy(program.model)))
    try:
        with torch.no_grad(), mode:
            return torch.export.export(folded, (images, image_sizes), dynamic_shapes=(of_images, dims))
    except UserError as error:
        if not of_images:
            raise
        raise ValueError(
            f"this model cannot be exported for {shape}: something in it, such as its backbone, may take a size for "
            f"a constant. Fix the number of images (--batch) or the canvas (--fixed-size): {str(error).splitlines()[0]}"
        ) from error


def coarsest_stride(model: SetPredictionDetector) -> int:
    """Stride in pixels of the coarsest feature level."""
    return max(shape.stride for shape in model.backbone.output_shape().values())


class _Decompose(TorchFunctionMode):
    """While active, calls of the op run its grid_sample twin, so that tracing records that one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        op = torch.ops.deformable_detr.ms_deform_attn
        if func not in (op, op.default):
            return func(*args, **(kwargs or {}))
        value, shapes, locations, weights = args
        pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
        return ms_deform_attn_pytorch(value, pairs, locations, weights)
