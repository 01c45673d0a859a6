"""Dataset dicts for tests."""

from detectron2.structures import BoxMode

from deformable_detr.data.mapper import NamedErrorsMapper


def record(*annotations: dict, file_name: str = "a.jpg", image_id: int = 7, **fields) -> dict:
    return {"file_name": file_name, "image_id": image_id, "annotations": list(annotations), **fields}


def annotation(bbox=(10.0, 20.0, 30.0, 40.0), label: int = 0, **fields) -> dict:
    return {"bbox": list(bbox), "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0, **fields}


def mapper(is_train: bool, augmentations) -> NamedErrorsMapper:
    return NamedErrorsMapper(is_train=is_train, augmentations=augmentations, image_format="RGB")
