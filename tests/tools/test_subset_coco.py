import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "subset_coco.py"
_spec = importlib.util.spec_from_file_location("subset_coco", TOOL)
subset_coco = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(subset_coco)

CONTENT = {
    "images": [{"id": 1}, {"id": 2}, {"id": 3}],
    "annotations": [{"id": 10, "image_id": 1}, {"id": 11, "image_id": 3}, {"id": 12, "image_id": 3}],
    "categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}],
}


def test_subset_keeps_chosen_images_their_annotations_and_all_categories():
    chosen = subset_coco.subset(CONTENT, {2, 3})
    assert chosen["images"] == [{"id": 2}, {"id": 3}]
    assert [entry["id"] for entry in chosen["annotations"]] == [11, 12]
    assert chosen["categories"] == CONTENT["categories"]


def test_unknown_image_id_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\[4\]"):
        subset_coco.subset(CONTENT, {1, 4})


def test_command_line_writes_the_file_and_refuses_unknown_ids(tmp_path):
    source, target = tmp_path / "all.json", tmp_path / "new" / "some.json"
    source.write_text(json.dumps(CONTENT), encoding="utf-8-sig")
    subprocess.run([sys.executable, TOOL, source, target, "1"], check=True)
    assert json.loads(target.read_text())["images"] == [{"id": 1}]
    refused = subprocess.run([sys.executable, TOOL, source, target, "7"], capture_output=True, text=True)
    assert refused.returncode == 2 and "[7]" in refused.stderr
