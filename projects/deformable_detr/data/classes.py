"""Whether a model has as many outputs as its data have classes."""

import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..wording import name_first
from .coco_format import read_coco_json

# The official models' outputs are raw category ids: 1 to 90 for the 80 classes of COCO.
_COCO_CLASSES, _COCO_OUTPUTS = 80, 91


def find_class_names(dataset: str, *, read: bool = False) -> list[str] | None:
    """Names of a registered dataset's classes, in the order of the outputs; None where nothing says them.

    Args:
        read: read them from the annotation file of a COCO-format dataset where the metadata lack them, as those of
            ``register_coco_instances(name, {}, ...)`` do before the dataset is loaded.

    Raises:
        DatasetError: if the categories of that file are not in COCO's format.
    """
    if dataset not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(dataset)
    if (names := metadata.get("thing_classes", None)) is not None:
        return list(names)
    path = metadata.get("json_file", None)
    if not read or metadata.get("evaluator_type", None) != "coco" or path is None or not os.path.isfile(path):
        return None
    # Of images to write results for, as COCO's test-dev, nothing else need be there.
    categories = read_coco_json(path, kinds=["categories"])["categories"]
    return [category["name"] for category in sorted(categories, key=lambda category: category["id"])]


def check_num_classes(
    datasets: Sequence[str | None], num_classes: int, *, key: str = "NUM_CLASSES", read: bool = False
) -> None:
    """Check that a model has one output for every class of its data.

    With fewer, there are objects that it cannot name; with more, Detectron2's evaluators stop at the first detection of
    a class that is none. Data that keep COCO's raw category ids go with the official 91 outputs.

    Args:
        datasets: registered names; None, and data whose classes are not known, are passed over.
        key: of the setting, for the error text.
        read: as for :func:`find_class_names`.

    Raises:
        ValueError: if the numbers differ.
    """
    for dataset in datasets:
        names = None if dataset is None else find_class_names(dataset, read=read)
        if names is None or len(names) == num_classes:
            continue
        is_official = (len(names), num_classes) == (_COCO_CLASSES, _COCO_OUTPUTS)
        if is_official and MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id", None) is None:
            continue
        note = "; 80 outputs take the 80 rows of the official weights by themselves" if is_official else ""
        raise ValueError(
            f"{key} is {num_classes}, but dataset {dataset!r} has {len(names)} classes ({name_first(names)}): "
            f"set {key} to {len(names)}{note}"
        )
