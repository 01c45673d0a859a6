"""Data in YOLO's and Pascal VOC's folders, by --data and by --train-json."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from deformable_detr.data.coco_format import DatasetError
from deformable_detr.engine import argument_parser, main
from deformable_detr.startup.folders import (
    Folder,
    convert_folders,
    find_folder,
    find_folders,
    number_by_name,
    share_categories,
)

# Some 110 MB with its video library: not a part of the environment of `make setup`.
needs_supervision = pytest.mark.skipif(find_spec("supervision") is None, reason="needs: pip install supervision")


@pytest.fixture
def yolo(tmp_path) -> Path:
    """A dataset of two classes in YOLO's format: images of 40x20 and 20x40, one of them without objects."""
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [dog, cat]\n")
    for split, shade in (("train", 90), ("val", 180)):
        images, labels = tmp_path / "yolo" / "images" / split, tmp_path / "yolo" / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        Image.new("RGB", (40, 20), (shade, 0, 0)).save(images / "a.png")
        Image.new("RGB", (20, 40), (0, shade, 0)).save(images / "b.png")
        # A cat in the right half, from 5 to 15 of 20 pixels.
        (labels / "a.txt").write_text("1 0.75 0.5 0.5 0.5\n")
    return tmp_path / "yolo"


def voc_text(name: str, box: tuple[int, int, int, int]) -> str:
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"


@pytest.fixture
def voc(tmp_path) -> Path:
    """A devkit: the training image has a dog, that of the validation a cat; a third one is in no list."""
    folder = tmp_path / "voc"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for index, (name, animal) in enumerate((("a 1", "dog"), ("b", "cat"), ("c", "cow"))):
        Image.new("RGB", (40, 20), (80 * index, 0, 0)).save(folder / "JPEGImages" / f"{name}.png")
        # Devkits count pixels from 1.
        (folder / "Annotations" / f"{name}.xml").write_text(voc_text(animal, (11, 6, 30, 15)))
    (folder / "ImageSets/Main/train.txt").write_text("a 1\n")
    (folder / "ImageSets/Main/val.txt").write_text("b\n")
    return folder


def test_data_yaml_names_its_folders(yolo):
    expected = Folder(yolo / "labels" / "train", yolo / "images" / "train", yolo / "data.yaml")
    assert find_folders(str(yolo)) == find_folders(str(yolo / "data.yaml"))
    assert find_folders(str(yolo))["train"] == expected
    assert find_folder("train", str(yolo / "data.yaml"), None) == expected
    assert find_folder("train", str(yolo / "images"), None) == Folder(yolo / "images", yolo / "images")
    assert find_folder("train", str(yolo / "other.json"), "x") is None


def test_roboflows_paths_that_lead_beside_the_folder_are_found(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
    path = tmp_path / "data" / "data.yaml"
    path.write_text("train: ../train/images\nval: ../valid/images\nnames: {0: a}\n")
    found = find_folders(str(path))
    assert found["val"][:2] == (tmp_path / "data/valid/labels", tmp_path / "data/valid/images")


@pytest.mark.parametrize(
    "text, message",
    [
        ("names: [a]", "must name folders of images under train and val"),
        ("train: [a, b]", r"train must be one folder of images, got \['a', 'b'\]"),
        ("train: list.txt", "train must be one folder of images, got 'list.txt'"),
        ("a: [", "must be YAML"),
    ],
)
def test_what_a_data_yaml_lacks_is_named(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=rf"data\.yaml:? {message}"):
        find_folders(str(tmp_path))


def test_pascal_vocs_folders_are_found(voc, tmp_path):
    assert find_folders(str(voc)) == dict.fromkeys(("train", "val"), Folder(voc / "Annotations", voc / "JPEGImages"))
    export = tmp_path / "export"
    for split in ("train", "valid"):
        (export / split).mkdir(parents=True)
        (export / split / "a.xml").write_text(voc_text("dog", (1, 1, 2, 2)))
    assert find_folders(str(export)) == {
        "train": Folder(export / "train", export / "train"),
        "val": Folder(export / "valid", export / "valid"),
    }
    with pytest.raises(FileNotFoundError, match=r"--data must be a data\.yaml .*is none of them"):
        find_folders(str(tmp_path))


def test_categories_are_shared_by_name():
    train = {"categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}], "annotations": [{"category_id": 5}]}
    val = {"categories": [{"id": 2, "name": "cow"}, {"id": 9, "name": "cat"}], "annotations": [{"category_id": 9}]}
    share_categories([train, val])
    assert (
        train["categories"]
        == val["categories"]
        == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}]
    )
    assert train["annotations"] == val["annotations"] == [{"category_id": 2}]


def test_images_and_objects_are_numbered_by_the_names_of_the_images():
    content = {
        "images": [{"id": 1, "file_name": "b"}, {"id": 2, "file_name": "c"}, {"id": 3, "file_name": "a"}],
        "annotations": [{"id": 1, "image_id": 1}, {"id": 2, "image_id": 1, "area": 5}, {"id": 3, "image_id": 3}],
    }
    number_by_name(content)
    assert content == {
        "images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b"}, {"id": 3, "file_name": "c"}],
        "annotations": [{"id": 1, "image_id": 1}, {"id": 2, "image_id": 2}, {"id": 3, "image_id": 2, "area": 5}],
    }


def test_the_missing_package_is_named(yolo, tiny_yaml, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="need the package supervision: pip install supervision"):
        main(argument_parser().parse_args(["--data", str(yolo), *tiny_yaml()]))


def test_data_and_json_are_not_given_together(yolo, tiny_yaml):
    with pytest.raises(ValueError, match="--data has the place of --train-json: leave out one of the two"):
        main(argument_parser().parse_args(["--data", str(yolo), "--train-json", "a.json", *tiny_yaml()]))


# With the library


@needs_supervision
def test_yolos_boxes_become_cocos(yolo, tmp_path):
    files = convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))
    assert files["train"] == (str(tmp_path / "out" / "train_coco.json"), str(yolo / "images" / "train"))
    content = json.loads(Path(files["train"][0]).read_text())
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in content["images"]}
    assert sizes == {"a.png": (40, 20), "b.png": (20, 40)}
    (annotation,) = content["annotations"]
    assert annotation["bbox"] == pytest.approx([20, 5, 20, 10]) and annotation["area"] == pytest.approx(200)
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert annotation["category_id"] == 2 and annotation["iscrowd"] == 0


@needs_supervision
def test_pascal_vocs_lists_and_classes_are_those_of_all_splits(voc, tmp_path):
    files = convert_folders(find_folders(str(voc)), str(tmp_path / "out"))
    contents = {split: json.loads(Path(path).read_text()) for split, (path, _) in files.items()}
    for split, name, animal in (("train", "a 1.png", "dog"), ("val", "b.png", "cat")):
        content = contents[split]
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert [image["file_name"] for image in content["images"]] == [name]
        (annotation,) = content["annotations"]
        assert names[annotation["category_id"]] == animal
        assert annotation["bbox"] == pytest.approx([10, 5, 20, 10])
        assert (content["images"][0]["id"], annotation["id"], annotation["image_id"]) == (1, 1, 1)
    assert contents["train"]["categories"] == contents["val"]["categories"]


@needs_supervision
def test_a_name_in_a_list_that_no_image_has_is_an_error(voc, tmp_path):
    (voc / "ImageSets/Main/train.txt").write_text("a 1\n\nd.png\n  e\nf\ng\n")
    told = r"every line of .*train\.txt must be .* in .*JPEGImages .*; 4 of 5 are none: 'd\.png', 'e', 'f', \.\.\.$"
    with pytest.raises(DatasetError, match=told):
        convert_folders(find_folders(str(voc)), str(tmp_path / "out"))


@needs_supervision
def test_images_in_deeper_folders_are_not_left_out_in_silence(yolo, tmp_path):
    deep = yolo / "images" / "train" / "more" / "still"
    for folder in (deep, deep.parents[1] / ".cache"):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(folder / "a.JPG")
    with pytest.raises(DatasetError, match=r"in one folder; .*images/train has 1 in .*, such as more/still/a\.JPG$"):
        convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))


@needs_supervision
@pytest.mark.parametrize("kind", ["yolo", "lazy", "voc"])
def test_a_run_trains_checks_and_evaluates_again_on_folders(request, kind, tiny_yaml, tiny_lazy, tmp_path):
    folder = request.getfixturevalue("voc" if kind == "voc" else "yolo")
    arguments = [*tiny_lazy(), "train.max_iter=1"] if kind == "lazy" else [*tiny_yaml(), "SOLVER.MAX_ITER", "1"]
    main(argument_parser().parse_args(["--data", str(folder), *arguments]))
    output = tmp_path / "output"
    images = 1 if kind == "voc" else 2
    log = (output / "log.txt").read_text()
    assert f"Data checked, nothing is wrong: {images} images with 1 objects to train on; {images} images with 1" in log
    last = "train.device=cpu" if kind == "lazy" else "MODEL.DEVICE cpu"
    results = main(argument_parser().parse_args(["--eval-only", "--config-file", str(output), *last.split()]))
    assert "AP" in results["bbox"]
    told = [line for line in (output / "log.txt").read_text().splitlines() if "Configuration: " in line]
    assert "config.yaml has it as a whole" in told[0] and "config.yaml stays as it is" in told[1]


@needs_supervision
def test_the_same_checks_are_made(yolo, tiny_yaml):
    (yolo / "labels" / "train" / "b.txt").write_text("0 0.9 0.5 0.5 0.5\n0 0.5 0.5 0.0 0.5\n")
    told = r"(?s)1 x box that leaves its image.*1 x box without area.*add --repair"
    with pytest.raises(DatasetError, match=told):
        main(argument_parser().parse_args(["--data", str(yolo), *tiny_yaml()]))


@needs_supervision
def test_a_text_that_is_no_box_is_named_with_its_file(yolo, tmp_path):
    # Beside a polygon, for which the labels are read from copies.
    (yolo / "labels" / "train" / "a.txt").write_text("0 .1 .1 .2 .1 .2 .2\n")
    (yolo / "labels" / "train" / "b.txt").write_text("0 0.9\n")
    with pytest.raises(DatasetError, match=r"supervision cannot read (.*labels/train): .*'\1/b\.txt"):
        convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))


# Of a square of side 0.4 the middle is cut out; a square has a twin far from it: neither is a crowd region.
RING = "0 .1 .1 .5 .1 .5 .5 .1 .5 .1 .1 .2 .2 .2 .4 .4 .4 .4 .2 .2 .2 .1 .1"
PAIR = "1 .1 .1 .2 .1 .2 .2 .1 .2 .1 .1 .8 .8 .9 .8 .9 .9 .8 .9 .8 .8 .1 .1 .75"


@needs_supervision
def test_polygons_become_objects_with_their_boxes_without_a_mask(yolo, tmp_path, monkeypatch):
    (yolo / "labels" / "train" / "a.txt").write_text(f"{RING}\r\n{PAIR}\n1 .5 .5 .5 .5 .9")
    (yolo / "labels" / "train" / "b.txt").write_text("0 .5 .5 .5 .5")
    monkeypatch.setattr("supervision.detection.utils.converters.polygon_to_mask", None)
    monkeypatch.setattr("supervision.dataset.formats.yolo.polygon_to_mask", None)
    files = convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))
    objects = json.loads(Path(files["train"][0]).read_text())["annotations"]
    boxes = [[4, 2, 16, 8], [4, 2, 32, 16], [10, 5, 20, 10], [5, 10, 10, 20]]
    assert [a["bbox"] for a in objects] == [pytest.approx(box, abs=1e-4) for box in boxes]
    assert [(a["category_id"], a["iscrowd"]) for a in objects] == [(1, 0), (2, 0), (2, 0), (1, 0)]


@needs_supervision
def test_pascal_vocs_objects_of_two_polygons_are_no_crowds_and_have_no_masks(voc, tmp_path, monkeypatch):
    corners = "<x1>{0}</x1><y1>7</y1><x2>{1}</x2><y2>7</y2><x3>{1}</x3><y3>9</y3>"
    parts = "".join(f"<polygon>{corners.format(*ends)}</polygon>\n" for ends in ((12, 14), (24, 28)))
    path = voc / "Annotations" / "a 1.xml"
    path.write_text(path.read_text().replace("</object>", f"{parts}</object>"))
    monkeypatch.setattr("supervision.dataset.formats.pascal_voc.polygon_to_mask", None)
    files = convert_folders(find_folders(str(voc)), str(tmp_path / "out"))
    (annotation,) = json.loads(Path(files["train"][0]).read_text())["annotations"]
    assert (annotation["bbox"], annotation["iscrowd"]) == (pytest.approx([10, 5, 20, 10]), 0)


@needs_supervision
def test_points_of_a_pose_are_no_polygon(yolo, tmp_path):
    (yolo / "data.yaml").write_text((yolo / "data.yaml").read_text() + "kpt_shape: [2, 3]\n")
    (yolo / "labels" / "train" / "a.txt").write_text("0 .5 .5 .5 .5 .1 .1 2 .9 .9 2\n")
    files = convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))
    (annotation,) = json.loads(Path(files["train"][0]).read_text())["annotations"]
    assert annotation["bbox"] == pytest.approx([10, 5, 20, 10])


@needs_supervision
def test_a_class_named_twice_is_not_merged_in_silence(yolo, tmp_path):
    (yolo / "data.yaml").write_text("train: images/train\nnames: [dog, cat, dog]\n")
    with pytest.raises(DatasetError, match=r"data\.yaml: every class must have a name of its own; .*\['dog'\]"):
        convert_folders(find_folders(str(yolo)), str(tmp_path / "out"))
