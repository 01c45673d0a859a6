"""What is wrong with COCO-format data is counted and shown before the first step, or repaired where that is asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from deformable_detr.data import checks as data_checks
from deformable_detr.data.checks import CocoData, Problems, drop_overlap, load_coco_data
from deformable_detr.data.coco_format import DatasetError, read_coco_json
from deformable_detr.data.datasets import get_train_dicts, register_coco_data
from deformable_detr.startup.user_data import check_user_data


@pytest.fixture
def spoil(write_coco) -> Callable:
    """A function (change) -> what a check finds in four images with one object each, after ``change(content)``."""

    def check(change: Callable[[dict], object] = lambda content: None, *, for_evaluation: bool = False):
        data = write_coco()
        change(data.content)
        data.save()
        return load_coco_data(data.json, data.images, for_evaluation=for_evaluation)

    return check


def findings(data) -> dict[str, list[str]]:
    return {what: cases for (what, _), cases in data.problems.cases.items()}


def test_sound_data_stay_as_they_are(spoil, tmp_path):
    data = spoil(for_evaluation=True)
    assert not data.problems
    assert data.content == json.loads((tmp_path / "data" / "instances.json").read_text())


@pytest.mark.parametrize(
    ("box", "what", "repaired"),
    (
        ([5, 5, 0, 10], "box without area", None),
        ([5, 5, -3, 10], "box without area", None),
        ([5, float("nan"), 3, 10], "box that is not four finite numbers", None),
        ([5, 5, float("inf"), 10], "box that is not four finite numbers", None),
        ([5, 5, 3], "box that is not four finite numbers", None),
        (None, "box that is not four finite numbers", None),
        ([80, 5, 10, 10], "box outside of its image", None),
        ([5, -20, 10, 10], "box outside of its image", None),
        ([70, 50, 30, 40], "box that leaves its image", [70, 50, 10, 10]),
        ([-5, -5, 30, 40], "box that leaves its image", [0, 0, 25, 35]),
    ),
)
def test_unusable_boxes_are_left_out_and_others_clipped(spoil, box, what, repaired):
    # The first image is 80 x 60.
    data = spoil(lambda content: content["annotations"][0].update(bbox=box))
    ((found, cases),) = findings(data).items()
    assert found == what and len(cases) == 1 and "annotation 1, 10.png" in cases[0]
    assert [a["bbox"] for a in data.content["annotations"] if a["id"] == 1] == ([repaired] if repaired else [])
    assert len(data.content["images"]) == 4


def test_boxes_that_leave_the_image_by_a_rounding_error_are_sound(spoil):
    assert not spoil(lambda content: content["annotations"][0].update(bbox=[-0.4, 0, 81, 60.9])).problems


@pytest.mark.parametrize(("key", "what"), (("image_id", "unknown image"), ("category_id", "unknown category")))
def test_objects_of_unknown_images_and_categories_are_left_out(spoil, key, what):
    data = spoil(lambda content: content["annotations"][1].update({key: 77}))
    assert findings(data) == {f"object of an {what}": [f"annotation 2: {what.split()[1]} 77"]}
    assert [a["id"] for a in data.content["annotations"]] == [1, 3, 4]


def test_ids_that_are_used_twice_are_found(spoil):
    def change(content: dict) -> None:
        content["images"][3]["id"] = content["images"][0]["id"]
        content["annotations"][2]["id"] = 1
        del content["annotations"][1]["id"]

    data = spoil(change)
    assert findings(data)["image id that is used twice"] == ["13.png and 10.png have id 10"]
    # The object of the image that lost its id belongs to an image that is not known any more.
    assert findings(data)["object of an unknown image"] == ["annotation 4: image 13"]
    assert findings(data)["missing id, or id that is used twice, of an object"] == ["annotation None", "annotation 1"]
    assert [a["id"] for a in data.content["annotations"]] == [1, 5, 6]


def test_two_categories_of_one_id_cannot_be_repaired(spoil):
    with pytest.raises(DatasetError, match="more than one category has the id 3"):
        spoil(lambda content: content["categories"].append({"id": 3, "name": "again"}))


def test_two_categories_of_one_name_cannot_be_repaired(spoil):
    """Results name their category, by which its id is found again."""
    told = r"instances\.json: every category must have a name of its own; 3 and 7 are both 'square'"
    with pytest.raises(DatasetError, match=told):
        spoil(lambda content: content["categories"].append({"id": 7, "name": "square"}))


def test_an_unused_category_may_have_the_name_of_one_behind_it(spoil):
    assert not findings(spoil(lambda content: content["categories"].insert(0, {"id": 0, "name": "square"})))


def test_entries_of_one_image_file_become_one_with_the_objects_of_all(spoil):
    def change(content: dict) -> None:
        first, copy, third = content["images"][0], content["images"][1], content["images"][2]
        copy.update(first, id=11)
        third.update(first, id=12, file_name=f"./{first['file_name']}")
        # The second entry brings an object that the first has, the third one that it has not.
        content["annotations"][1].update(content["annotations"][0], id=2, image_id=11)
        content["annotations"][2]["bbox"] = [40, 15, 10, 10]

    data = spoil(change)
    assert findings(data) == {
        "image file that is listed twice": ["10.png has the ids 10 and 11", "./10.png has the ids 10 and 12"]
    }
    assert [image["id"] for image in data.content["images"]] == [10, 13]
    assert sorted((a["id"], a["image_id"]) for a in data.content["annotations"]) == [(1, 10), (3, 10), (4, 13)]


@pytest.mark.parametrize(("kind", "key"), (("images", "width"), ("annotations", "image_id"), ("categories", "name")))
def test_entries_without_their_fields_are_named(spoil, kind, key):
    with pytest.raises(DatasetError, match=rf"instances\.json: {kind}\[1\] has no {key}"):
        spoil(lambda content: content[kind][1].pop(key))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    (
        ("annotations", 1.5, r"annotations\[1\] must be an object with image_id, .*, got 1\.5"),
        ("images", {"file_name": None}, r"images\[1\]: file_name must be text, got null"),
        ("images", {"width": [80]}, r"images\[1\]: width must be a number, got \[80\]"),
        ("images", {"height": float("inf")}, r"images\[1\]: height must be a number, got Infinity"),
        ("images", {"id": float("nan")}, r"images\[1\]: id must be a whole number or text, got NaN"),
        ("annotations", {"id": {}}, r"annotations\[1\]: id must be a whole number or null, got \{\}"),
        ("annotations", {"category_id": "cat"}, r'annotations\[1\]: category_id must be a whole number, got "cat"'),
        ("annotations", {"image_id": True}, r"annotations\[1\]: image_id must be a whole number or text, got true"),
        ("annotations", {"iscrowd": 2}, r"annotations\[1\]: iscrowd must be 0 or 1, got 2"),
        ("annotations", {"segmentation": 3}, r"annotations\[1\]: segmentation must be a list, .*, got 3"),
        ("categories", {"name": 7}, r"categories\[1\]: name must be text, got 7"),
    ),
)
def test_entries_of_another_form_are_named_with_rule_and_value(spoil, kind, change, message):
    def replace(content: dict) -> None:
        content[kind][1] = {**content[kind][1], **change} if isinstance(change, dict) else change

    with pytest.raises(DatasetError, match=rf"instances\.json: {message}"):
        spoil(replace)


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b'{"images": "\xff"}', "must be JSON in COCO format: .*utf-8"),
        (b"[" * 100_000, "must be JSON in COCO format"),
        (b"[]", r"must be in COCO format .* no \['images', 'annotations', 'categories'\]"),
        (b'{"images": [], "annotations": {}, "categories": []}', r"annotations must be a list, got \{\}"),
        (b'{"images": [], "annotations": [], "categories": []}', "must list at least one category"),
    ),
    ids=["not UTF-8", "too deep", "not an object", "not a list", "no category"],
)
def test_files_of_another_format_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"broken\.json:? ?{message}"):
        read_coco_json(str(path))


@pytest.mark.parametrize("content", (None, b"", b"not an image"))
def test_images_that_cannot_be_read_are_left_out_with_their_objects(write_coco, content):
    files = write_coco()
    path = Path(files.images) / "11.png"
    path.unlink() if content is None else path.write_bytes(content)
    data = load_coco_data(files.json, files.images)
    ((what, cases),) = findings(data).items()
    assert what == ("missing image file" if content is None else "unreadable image file")
    assert len(cases) == 1 and str(path) in cases[0]
    assert [image["id"] for image in data.content["images"]] == [10, 12, 13]
    assert [a["image_id"] for a in data.content["annotations"]] == [10, 12, 13]


def test_images_of_another_size_than_annotated_are_left_out(write_coco):
    files = write_coco()
    path = Path(files.images) / "10.png"
    Image.open(path).resize((160, 120)).save(path)
    data = load_coco_data(files.json, files.images)
    assert findings(data) == {"image of another size than in the annotations": [f"{path} is 160x120, not 80x60"]}
    assert 10 not in [image["id"] for image in data.content["images"]]


@pytest.mark.parametrize(("orientation", "is_sound"), ((1, False), (6, True)))
def test_sizes_are_compared_upright_as_detectron2_reads_images(write_coco, orientation, is_sound):
    files = write_coco()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 80)).save(Path(files.images) / "10.jpg", exif=exif)
    files.content["images"][0]["file_name"] = "10.jpg"
    files.save()
    assert bool(load_coco_data(files.json, files.images).problems) is not is_sound


def test_of_many_images_a_sample_is_opened_and_all_are_looked_for(write_coco, monkeypatch):
    monkeypatch.setattr(data_checks, "MAX_OPENED_IMAGES", 2)
    files = write_coco()
    for name in ("10.png", "11.png"):
        (Path(files.images) / name).write_bytes(b"not an image")
    (Path(files.images) / "13.png").unlink()
    found = findings(load_coco_data(files.json, files.images))
    assert [len(found[what]) for what in ("unreadable image file", "missing image file")] == [1, 1]


def test_evaluation_needs_areas_and_training_does_not(spoil, write_coco):
    def change(content: dict) -> None:
        del content["annotations"][0]["area"], content["annotations"][1]["iscrowd"]

    data = spoil(change, for_evaluation=True)
    assert len(findings(data)["object without area or iscrowd, which the evaluation reads"]) == 2
    first = data.content["annotations"][0]
    assert first["area"] == first["bbox"][2] * first["bbox"][3]
    assert data.content["annotations"][1]["iscrowd"] == 0
    shutil.rmtree(data.image_root)
    assert not spoil(change).problems


# Both splits together


def check(train, val, tmp_path: Path, *, repair: bool):
    files = {"train": (train.json, train.images), "val": (val.json, val.images)}
    return check_user_data(files, repair=repair, output_dir=str(tmp_path / "out"))


def test_images_of_both_splits_are_found_by_their_bytes_and_left_out_of_training(write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    shutil.copy(Path(val.images) / "12.png", Path(train.images) / "renamed.png")
    train.content["images"][2]["file_name"] = "renamed.png"
    train.save()
    with pytest.raises(
        DatasetError, match=r"1 x image that is also in the validation data.*renamed\.png is 12\.png of"
    ):
        check(train, val, tmp_path, repair=False)
    repaired, num_images = check(train, val, tmp_path, repair=True)
    assert num_images == {"train": 3, "val": 4}
    content = json.loads(Path(repaired["train"][0]).read_text())
    assert [x["id"] for x in content["images"]] == [x["image_id"] for x in content["annotations"]] == [10, 11, 13]
    assert repaired.keys() == {"train"}


def test_files_that_begin_alike_are_read_as_a_whole_and_no_others(tmp_path, monkeypatch):
    def data(split, **files):
        (tmp_path / split).mkdir()
        for name, content in files.items():
            (tmp_path / split / name).write_bytes(content)
        images = [{"id": name, "file_name": name} for name in files]
        content = {"images": images, "annotations": []}
        return CocoData(f"{split}.json", str(tmp_path / split), content, Problems(split))

    long, digest, whole = bytes(1 << 16), data_checks._digest, []
    monkeypatch.setattr(
        data_checks, "_digest", lambda path, length=-1: length < 0 and whole.append(path[-1]) or digest(path, length)
    )
    train = data("train", a=long + b"1", b=long + b"2", c=b"3" + long, d=b"4")
    drop_overlap(train, data("val", e=long + b"2", f=b"5" + long, g=b"66"))
    assert [image["id"] for image in train.content["images"]] == ["a", "c", "d"]
    assert sorted(whole) == ["a", "b", "e"]


def test_strict_is_the_default_and_tells_counts_first_examples_and_remedy(write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    for annotation in train.content["annotations"]:
        annotation["bbox"] = [0, 0, 0, 0]
    val.content["annotations"][0]["category_id"] = 77
    train.save(), val.save()
    with pytest.raises(DatasetError) as error:
        check(train, val, tmp_path, repair=False)
    text = str(error.value)
    assert f"{train.json}:\n  4 x box without area (left out by --repair): annotation 1, 10.png: [0, 0, 0, 0]; " in text
    assert text.count("annotation") == 3 + 1 and "; ...\n" in text
    assert f"{val.json}:\n  1 x object of an unknown category" in text
    assert text.endswith("add --repair to the command")
    assert not (tmp_path / "out").exists()


def test_repairing_says_what_it_changed_and_leaves_the_users_files_alone(write_coco, tmp_path, caplog):
    train, val = write_coco("train"), write_coco("val")
    (Path(train.images) / "10.png").unlink()
    before = Path(train.json).read_text()
    repaired, _ = check(train, val, tmp_path, repair=True)
    assert "1 x missing image file (image left out by --repair)" in caplog.text
    assert Path(train.json).read_text() == before
    assert repaired["train"] == (str(tmp_path / "out" / "train_repaired.json"), train.images)
    assert not load_coco_data(*repaired["train"]).problems


def test_data_without_a_usable_image_are_refused_even_when_repairing(write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    for path in Path(train.images).glob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"(?s)has no usable image.*4 x missing image file"):
        check(train, val, tmp_path, repair=True)


def test_evaluating_on_the_training_data_is_allowed_with_a_warning(write_coco, tmp_path, caplog):
    data = write_coco()
    assert check(data, data, tmp_path, repair=False) == ({}, {"train": 4, "val": 4})
    assert "the same" in caplog.text


# What Detectron2's loader drops or dies of

POINTS = [{"x": x, "y": x * x} for x in range(8)]
# Some of these Detectron2 leaves out with their objects, and of some it dies.
SEGMENTATIONS = {
    "fewer than 3 points": [[1, 2, 3, 4]],
    "an empty polygon": [[]],
    "an odd number of coordinates": [[1, 2, 3, 4, 5, 6, 7]],
    "a flat list": [1, 2, 3, 4, 5, 6],
    "points as dictionaries": [POINTS],
    "run lengths without a size": {"counts": [0, 4800]},
    "run lengths without counts": {"size": [60, 80]},
}


@pytest.mark.parametrize("segmentation", SEGMENTATIONS.values(), ids=SEGMENTATIONS)
def test_objects_keep_their_boxes_whatever_their_segmentation_is(spoil, segmentation):
    data = spoil(lambda content: [a.update(segmentation=segmentation) for a in content["annotations"]])
    assert not data.problems
    register_coco_data("tiny", data.json_file, data.image_root)
    records = get_train_dicts("tiny", num_classes=3)
    assert [len(record["annotations"]) for record in records] == [1, 1, 1, 1]
    assert not any("segmentation" in annotation for record in records for annotation in record["annotations"])


@pytest.mark.parametrize("segmentation", SEGMENTATIONS.values(), ids=SEGMENTATIONS)
def test_where_segmentations_are_wanted_those_that_cannot_be_read_are_faults(write_coco, segmentation):
    files = write_coco()
    files.content["annotations"][1]["segmentation"] = segmentation
    files.content["annotations"][2]["segmentation"] = [[1, 2], [0, 0, 9, 0, 9, 9]]
    files.content["annotations"][3]["segmentation"] = {"size": [50, 100], "counts": [0, 5000]}
    files.save()
    data = load_coco_data(files.json, files.images, boxes_only=False)
    assert findings(data) == {"segmentation that Detectron2 cannot read": ["annotation 2"]}
    Path(files.json).write_text(json.dumps(data.content))
    register_coco_data("tiny", files.json, files.images, boxes_only=False)
    assert [len(record["annotations"]) for record in get_train_dicts("tiny", num_classes=3)] == [1, 0, 1, 1]


def test_keypoints_of_another_form_do_not_stop_a_training_on_boxes(spoil):
    data = spoil(lambda content: content["annotations"][0].update(keypoints=POINTS))
    register_coco_data("tiny", data.json_file, data.image_root)
    assert len(get_train_dicts("tiny", num_classes=3)) == 4


def test_objects_marked_ignore_become_crowds(spoil, tmp_path):
    data = spoil(lambda content: [content["annotations"][i].update(ignore=i % 2) for i in (0, 1)])
    assert findings(data) == {'object with "ignore"': ["annotation 2"]}
    Path(data.json_file).write_text(json.dumps(data.content))
    register_coco_data("tiny", data.json_file, data.image_root)
    crowds = [a["iscrowd"] for record in get_train_dicts("tiny", num_classes=3) for a in record["annotations"]]
    assert crowds == [0, 1, 0, 0]


@pytest.mark.parametrize("boxes_only", [True, False])
def test_objects_marked_ignore_are_named_where_nobody_has_checked_the_data(spoil, boxes_only):
    data = spoil(lambda content: content["annotations"][1].update(ignore=1))
    register_coco_data("tiny", data.json_file, data.image_root, boxes_only=boxes_only)
    with pytest.raises(DatasetError, match=r'instances\.json: annotation 2 has "ignore": 1, .*set "iscrowd": 1'):
        get_train_dicts("tiny", num_classes=3)


def test_image_ids_that_cannot_be_sorted_are_refused(spoil):
    with pytest.raises(DatasetError, match=r"instances\.json: the ids of images must be all whole numbers or all text"):
        spoil(lambda content: content["images"][2].update(id="twelve"))


@pytest.mark.parametrize("encoding", ("utf-8-sig", "utf-16"))
def test_files_with_a_byte_order_mark_are_read_and_rewritten_for_the_evaluation(write_coco, tmp_path, encoding):
    train, val = write_coco("train"), write_coco("val")
    for data in (train, val):
        data.content["categories"][0]["name"] = "Scheibe für Öl"
        Path(data.json).write_text(json.dumps(data.content, ensure_ascii=False), encoding=encoding)
    assert read_coco_json(val.json) == val.content
    rewritten, num_images = check(train, val, tmp_path, repair=False)
    assert num_images == {"train": 4, "val": 4}
    assert {split: Path(files[0]).name for split, files in rewritten.items()} == {
        "train": "train_utf8.json",
        "val": "val_utf8.json",
    }
    assert json.loads(Path(rewritten["val"][0]).read_text()) == val.content
    assert register_coco_data("tiny", *rewritten["val"]) == ["square", "bar", "Scheibe für Öl"]
    COCOEvaluator("tiny", tasks=("bbox",))
