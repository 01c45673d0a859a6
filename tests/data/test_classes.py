"""As many outputs as the data have classes."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from deformable_detr.data.classes import check_num_classes, find_class_names
from deformable_detr.data.coco_format import DatasetError
from deformable_detr.data.datasets import get_train_dicts


def register(name: str, **metadata: object) -> None:
    DatasetCatalog.register(name, lambda: pytest.fail("the data are read"))
    MetadataCatalog.get(name).set(**metadata)


@pytest.mark.parametrize("num_classes", [1, 3, 80])
def test_more_and_fewer_outputs_than_classes_are_refused(num_classes):
    register("tiny", thing_classes=["a", "b"])
    check_num_classes(["tiny"], 2)
    message = rf"KEY is {num_classes}, but dataset 'tiny' has 2 classes \(a, b\): set KEY to 2"
    with pytest.raises(ValueError, match=message):
        check_num_classes(["tiny"], num_classes, key="KEY")


@pytest.mark.parametrize("name, classes", [("coco_2017_val", 80), ("voc_2007_test", 20), ("lvis_v1_val", 1203)])
def test_classes_of_detectron2s_own_datasets_are_known_without_reading_them(name, classes):
    check_num_classes([name], classes)
    with pytest.raises(ValueError, match=f"dataset '{name}' has {classes} classes"):
        check_num_classes([name], 3)


def test_official_outputs_go_with_data_that_keep_cocos_raw_ids():
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    register("raw", thing_classes=names)
    check_num_classes(["raw"], 91)
    with pytest.raises(ValueError, match="NUM_CLASSES is 90, but dataset 'raw' has 80 classes"):
        check_num_classes(["raw"], 90)
    with pytest.raises(ValueError, match="'coco_2017_val' has 80 classes .*set NUM_CLASSES to 80; 80 outputs take the"):
        check_num_classes(["coco_2017_val"], 91)


def test_data_that_say_nothing_are_passed_over():
    register("silent")
    check_num_classes(["silent", "not registered", None], 7)


def test_classes_that_only_the_file_knows_are_read_where_asked(write_coco):
    data = write_coco()
    register_coco_instances("tiny", {}, data.json, data.images)
    assert find_class_names("tiny") is None
    # In ascending order of their ids, as Detectron2 numbers them.
    assert find_class_names("tiny", read=True) == ["square", "bar", "disc"]
    # Detectron2 writes results for images without ground truth, such as COCO's test-dev.
    del data.content["annotations"]
    data.save()
    assert find_class_names("tiny", read=True) == ["square", "bar", "disc"]
    data.content["categories"][0]["name"] = 9
    data.save()
    with pytest.raises(DatasetError, match=r"categories\[0\]: name must be text, got 9"):
        find_class_names("tiny", read=True)


def test_data_to_train_on_are_compared_once_they_are_loaded(write_coco):
    data = write_coco()
    register_coco_instances("tiny", {}, data.json, data.images)
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 80, but dataset 'tiny' has 3 classes \(square, bar, disc\)"):
        get_train_dicts("tiny", num_classes=80)
