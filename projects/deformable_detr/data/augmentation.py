"""DETR's augmentation, made of Detectron2's transforms."""

import sys
from collections.abc import Sequence

import detectron2.data.transforms as T
import numpy as np
from detectron2.config import CfgNode
from fvcore.transforms.transform import NoOpTransform, Transform

# The short sides before a random crop, official value (datasets/coco.py of the reference implementation).
PRE_CROP_SIZES = (400, 500, 600)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's resize with the official rounding, which truncates: 640x480 becomes 1066x800, not 1067x800.

    The two differ for half of all image sizes, enough to miss published logits.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if self.is_range:
            size = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            # Detectron2's way to ask for the original size, as in MIN_SIZE_TEST: 0.
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, int(size), self.max_size)
        return T.ResizeTransform(height, width, new_height, new_width, self.interp)

    def __repr__(self) -> str:
        limit = "" if self.max_size == sys.maxsize else f", max_size={self.max_size}"
        style = "range" if self.is_range else "choice"
        return f"ResizeShortestEdge({list(self.short_edge_length)}{limit}, {style})"

    __str__ = __repr__

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Size (h, w) in pixels with the given short side, or with ``max_size`` as long side where that is smaller."""
        short, long = min(oldh, oldw), max(oldh, oldw)
        size = short_edge_length
        if long / short * size > max_size:
            size = round(max_size * short / long)
        # Of an image that is one line, the short side is rounded to nothing.
        size, scaled_long = (size, int(size * long / short)) if size else (1, max_size)
        return (size, scaled_long) if oldh < oldw else (scaled_long, size)


class ResizeScale(T.ResizeScale):
    """Detectron2's, which never rounds the short side of a long image to nothing."""

    def get_transform(self, image: np.ndarray) -> Transform:
        resize = super().get_transform(image)
        return T.ResizeTransform(resize.h, resize.w, max(resize.new_h, 1), max(resize.new_w, 1), resize.interp)


class RandomApply(T.RandomApply):
    """Detectron2's, which tells of itself what it applies."""

    def __repr__(self) -> str:
        return f"RandomApply({self.aug}, prob={self.prob})"

    __str__ = __repr__


def build_detr_augmentation(
    *,
    is_train: bool,
    min_size: Sequence[int] | int,
    max_size: int,
    sample_style: str = "choice",
    random_flip: bool = True,
    crop_type: str = "absolute_range",
    crop_size: Sequence[float] | None = (384, 600),
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    lsj_size: int = 0,
    lsj_scale: Sequence[float] = (0.1, 2.0),
) -> list[T.Augmentation]:
    """DETR's augmentation: flip; then resize, in half of the cases after a resize and a random crop.

    Args:
        min_size: short sides in pixels to choose from.
        max_size: limit on the long side in pixels.
        random_flip: horizontally, in half of the cases.
        crop_type: one of Detectron2's ``RandomCrop``.
        crop_size: range of the crop's sides in pixels, or what else ``crop_type`` says; for relative types shares of
            the image's height and width in (0, 1]; None never crops.
        brightness: jitter in [0, 1): the image is blended with black by a factor of [1 - b, 1 + b]; 0 for none.
        contrast: the same with its mean.
        saturation: the same with its gray image, which is of RGB channels.
        lsj_size: side in pixels of large-scale jitter, which takes the place of the resize and the crop; 0 for none.
        lsj_scale: range of the factor on that side to which an image is fitted, before a crop of that side.

    Raises:
        ValueError: on values out of their range.
    """
    # A word such as "none" would count as true.
    if not isinstance(random_flip, bool):
        raise ValueError(f"random_flip must be True (horizontal) or False, got {random_flip!r}")
    min_size = min_size if isinstance(min_size, int) else list(min_size)
    resize = ResizeShortestEdge(min_size, max_size, sample_style)
    if not is_train:
        return [resize]
    augmentations: list[T.Augmentation] = [T.RandomFlip()] if random_flip else []
    if lsj_size:
        augmentations += _large_scale_jitter(lsj_size, *lsj_scale)
    else:
        augmentations += _resize_and_crop(resize, crop_type, crop_size)
    # Last, on the pixels that are left.
    return [*augmentations, *_colour_jitter(brightness=brightness, contrast=contrast, saturation=saturation)]


def _resize_and_crop(resize: T.Augmentation, crop_type: str, crop_size: Sequence[float] | None) -> list[T.Augmentation]:
    augmentations: list[T.Augmentation] = []
    if crop_size is not None:
        _check_crop_size(crop_type, crop_size)
        crop = [ResizeShortestEdge(PRE_CROP_SIZES, sys.maxsize, "choice"), T.RandomCrop(crop_type, crop_size)]
        augmentations.append(RandomApply(T.AugmentationList(crop), prob=0.5))
    return [*augmentations, resize]


def _check_crop_size(crop_type: str, crop_size: Sequence[float]) -> None:
    """Refuse sizes in the unit of another type: Detectron2 fails at them in the first crop, or crops to nothing."""
    is_relative = crop_type.startswith("relative")
    unit = "shares in (0, 1]" if is_relative else "numbers of pixels from 1"
    if len(crop_size) != 2 or not all(0 < size <= 1 if is_relative else size >= 1 for size in crop_size):
        raise ValueError(
            f"crop_size (INPUT.CROP.SIZE) must be two {unit} for crop_type (INPUT.CROP.TYPE) {crop_type!r}, "
            f"got {list(crop_size)}"
        )


def _large_scale_jitter(size: int, min_scale: float, max_scale: float) -> list[T.Augmentation]:
    if size < 0 or not 0 < min_scale <= max_scale:
        raise ValueError(
            f"large-scale jitter needs a side of at least 0 and scales 0 < min <= max, got {size} and "
            f"({min_scale}, {max_scale})"
        )
    # Smaller images are padded with their batch, where they are masked.
    return [ResizeScale(min_scale, max_scale, size, size), T.FixedSizeCrop((size, size), pad=False)]


def _colour_jitter(**amounts: float) -> list[T.Augmentation]:
    kinds = {"brightness": T.RandomBrightness, "contrast": T.RandomContrast, "saturation": T.RandomSaturation}
    for name, amount in amounts.items():
        if not 0 <= amount < 1:
            raise ValueError(f"{name} of the colour jitter must be in [0, 1), got {amount}")
    return [kinds[name](1 - amount, 1 + amount) for name, amount in amounts.items() if amount]


def augmentation_from_config(cfg: CfgNode, *, is_train: bool) -> list[T.Augmentation]:
    """:func:`build_detr_augmentation` with the values of ``cfg.INPUT``.

    Raises:
        ValueError: on a flip that this augmentation does not know.
    """
    node = cfg.INPUT
    if not is_train:
        return build_detr_augmentation(is_train=False, min_size=node.MIN_SIZE_TEST, max_size=node.MAX_SIZE_TEST)
    if node.RANDOM_FLIP not in ("horizontal", "none"):
        raise ValueError(f"INPUT.RANDOM_FLIP must be 'horizontal' or 'none', got {node.RANDOM_FLIP!r}")
    return build_detr_augmentation(
        is_train=True,
        min_size=node.MIN_SIZE_TRAIN,
        max_size=node.MAX_SIZE_TRAIN,
        sample_style=node.MIN_SIZE_TRAIN_SAMPLING,
        random_flip=node.RANDOM_FLIP == "horizontal",
        crop_type=node.CROP.TYPE,
        crop_size=node.CROP.SIZE if node.CROP.ENABLED else None,
        brightness=node.COLOR_JITTER.BRIGHTNESS,
        contrast=node.COLOR_JITTER.CONTRAST,
        saturation=node.COLOR_JITTER.SATURATION,
        lsj_size=node.LSJ.SIZE,
        lsj_scale=node.LSJ.SCALE,
    )
