"""From a dataset dict to what the model takes."""

import copy
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, check_image_size

from .dataset_dict import describe_image
from .images import ImageError, check_format, from_rgb, read_file


class NamedErrorsMapper(DatasetMapper):
    """Detectron2's stock mapper, with this project's image reader and errors that say which image it was.

    Detectron2's mapper reads, in the middle of its ``__call__``, with a reader that clips 16-bit pixels and shows the
    colours of what is transparent. Here the same steps follow our reader; images of 8 bits without transparency have
    the same pixels. The model needs boxes only: semantic maps and proposals are left out.

    Args:
        args, kwargs: as for Detectron2's mapper; ``image_format`` must be RGB or BGR.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_format(self.image_format, "INPUT.FORMAT (image_format of the mapper)")

    def __call__(self, dataset_dict: dict) -> dict:
        record = copy.deepcopy(dataset_dict)
        inputs = T.AugInput(self._read(record))
        transforms = self.augmentations(inputs)
        record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        record.pop("sem_seg_file_name", None)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, inputs.image.shape[:2])
        return record

    def _read(self, record: dict) -> np.ndarray:
        try:
            image = from_rgb(read_file(record["file_name"]), self.image_format)
            check_image_size(record, image)
        except (ImageError, SizeMismatchError) as error:
            raise OSError(f"cannot read {describe_image(record)}: {error}") from error
        return image
