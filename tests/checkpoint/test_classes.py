"""Class rows by name: from COCO's weights, from transformers' files and from our own checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file

from deformable_detr.checkpoint import CheckpointError, convert, read_checkpoint
from deformable_detr.checkpoint.classes import COCO_CLASSES, match_rows
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer


def numbered(build, variant="", *, classes):
    """A model whose class heads have their row numbers as biases."""
    model = build(variant, NUM_CLASSES=classes)
    for head in model.class_embed:
        head.bias.data = torch.arange(float(classes))
    return model


def test_names_match_regardless_of_case_spaces_hyphens_and_underscores():
    rows = match_rows(["Traffic_Light", "pottedplant", "T-V", "unicorn", None], ["tv", "potted plant", "traffic light"])
    assert rows == [2, 1, 0, None, None]


def test_equal_spelling_comes_before_similar_spelling():
    assert match_rows(["Cat", "cat", "CAT"], ["CAT", "Cat", "cat", None]) == [1, 2, 0]


@pytest.mark.parametrize("variant", ("", "_box_refine", "_two_stage"))
def test_own_classes_take_the_coco_rows_of_their_names_and_others_stay_fresh(variant, build, official_names):
    theirs, ours = numbered(build, variant, classes=91), build(variant, NUM_CLASSES=4)
    converted, report = convert(
        official_names(theirs), model=ours, class_names=["Dog", "unicorn", "traffic-light", "person"]
    )
    for layer in (0, 1):
        bias = converted[f"class_embed.{layer}.bias"]
        assert bias[[0, 2, 3]].tolist() == [18, 10, 1]
        assert torch.equal(bias[1], ours.class_embed[layer].bias[1])
        weight, fresh = converted[f"class_embed.{layer}.weight"], ours.class_embed[layer].weight
        assert torch.equal(weight[[0, 2, 3]], theirs.class_embed[layer].weight[[18, 10, 1]])
        assert torch.equal(weight[1], fresh[1])
    if variant == "_two_stage":
        assert converted["class_embed.2.bias"].tolist() == [0, 1, 2, 3]
    assert report.mapped["class_embed.0.bias"] == "rows of 3 of the model's 4 classes, by name out of 91"
    assert "Dog <- row 18 (dog), traffic-light <- row 10 (traffic light), person <- row 1 (person)" in str(report)
    assert "start from their initialisation: unicorn" in str(report)
    ours.load_state_dict(converted, strict=True)


def test_as_many_but_other_classes_do_not_keep_the_rows(build):
    theirs, ours = numbered(build, classes=3), build(NUM_CLASSES=3)
    state_dict = theirs.state_dict()
    converted, report = convert(state_dict, model=ours, file_class_names=["a", "b", "c"], class_names=["c", "x", "a"])
    assert converted["class_embed.0.bias"][[0, 2]].tolist() == [2, 0]
    assert torch.equal(converted["class_embed.0.bias"][1], ours.class_embed[0].bias[1])
    assert not report.exact


def test_no_common_class_leaves_the_heads_as_initialised(build):
    ours = build(NUM_CLASSES=2)
    converted, report = convert(
        build(NUM_CLASSES=3).state_dict(), model=ours, file_class_names=["a", "b", "c"], class_names=["x", "y"]
    )
    assert set(report.missing) == {f"class_embed.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert "none of the file's 3 classes has a name of the model's" in str(report)
    assert not report.missing.keys() & converted.keys()


def test_the_same_classes_are_an_exact_fit(build):
    model = build(NUM_CLASSES=2)
    names = ["a b", "c"]
    for model_names in (names, ["A_B", "C"]):
        _, report = convert(model.state_dict(), model=model, file_class_names=names, class_names=model_names)
        assert report.exact and not report.class_note


def test_file_without_class_names_keeps_as_many_rows_and_says_that_it_did(build):
    model = build(NUM_CLASSES=2)
    converted, report = convert(model.state_dict(), model=model, class_names=["a", "b"])
    assert report.exact and torch.equal(converted["class_embed.0.bias"], model.class_embed[0].bias)
    assert "does not name its 2 classes" in str(report)


def test_a_model_of_80_other_classes_does_not_get_the_coco_rows_in_order(build, official_names):
    names = [f"species {i}" for i in range(79)] + ["zebra"]
    theirs, ours = numbered(build, classes=91), build(NUM_CLASSES=80)
    converted, _ = convert(official_names(theirs), model=ours, class_names=names)
    assert converted["class_embed.0.bias"][79] == 24
    assert torch.equal(converted["class_embed.0.bias"][:79], ours.class_embed[0].bias[:79])


def test_detrex_rows_are_the_80_coco_classes(build, detrex_names):
    theirs, ours = numbered(build, classes=80), build(NUM_CLASSES=1)
    converted, _ = convert(detrex_names(theirs), model=ours, class_names=["stop sign"])
    assert converted["class_embed.0.bias"].tolist() == [COCO_CLASSES.index("stop sign")] == [11]


def test_wrong_number_of_names_is_told(build):
    with pytest.raises(ValueError, match="2 class_names for 3 class outputs"):
        convert({}, model=build(NUM_CLASSES=3), class_names=["a", "b"])


def test_own_checkpoints_carry_their_class_names_to_models_of_other_classes(build, tmp_path):
    source = numbered(build, classes=3)
    DeformableDETRCheckpointer(source, str(tmp_path), class_names=("circle", "square", "star")).save("m", iteration=5)
    target = build(NUM_CLASSES=2)
    fresh = target.class_embed[0].bias[0].item()
    checkpointer = DeformableDETRCheckpointer(target, class_names=["hexagon", "Square"])
    assert checkpointer.load(str(tmp_path / "m.pth")) == {"iteration": 5}
    assert target.class_embed[0].bias.tolist() == [fresh, 1]
    assert "Square <- row 1 (square)" in str(checkpointer.report)


def test_resuming_with_renamed_classes_is_refused(build, tmp_path):
    DeformableDETRCheckpointer(build(NUM_CLASSES=2), str(tmp_path), class_names=["a", "b"]).save("m")
    with pytest.raises(CheckpointError, match=r"(?s)Cannot resume.*initialisation: c"):
        DeformableDETRCheckpointer(build(NUM_CLASSES=2), str(tmp_path), class_names=["a", "c"]).resume_or_load("")


def test_names_of_the_loaded_classes_are_saved_again(build, official_names, tmp_path):
    torch.save({"model": official_names(build(NUM_CLASSES=91))}, tmp_path / "official.pth")
    checkpointer = DeformableDETRCheckpointer(build(NUM_CLASSES=80), str(tmp_path))
    checkpointer.load(str(tmp_path / "official.pth"))
    checkpointer.save("ours")
    assert read_checkpoint(str(tmp_path / "ours.pth"))["class_names"] == list(COCO_CLASSES)


@pytest.mark.parametrize("suffix", (".safetensors", ".bin"))
def test_class_names_of_transformers_are_read_beside_the_weights(suffix, build, transformers_names, tmp_path):
    state_dict = {key: value.clone() for key, value in transformers_names(numbered(build, classes=2), 4).items()}
    path = tmp_path / {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "helmet", "1": "vest"}}))
    target = build(NUM_CLASSES=1)
    DeformableDETRCheckpointer(target, class_names=["Vest"]).load(str(path))
    assert target.class_embed[0].bias.tolist() == [1]


def test_placeholder_names_of_transformers_are_no_names(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    assert "class_names" not in read_checkpoint(str(tmp_path / "model.safetensors"))


def test_rows_that_transformers_calls_not_available_have_no_name_and_a_broken_file_is_named(tmp_path):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({"a": torch.zeros(1)}, path)
    config.write_text(json.dumps({"id2label": {"0": "N/A", "1": "person", "2": "N/A"}}))
    assert read_checkpoint(str(path))["class_names"] == [None, "person", None]
    config.write_text('{"id2label": ')
    with pytest.raises(
        CheckpointError, match="config.json, in which transformers names the classes, is broken .*Expec"
    ):
        read_checkpoint(str(path))


@pytest.mark.parametrize("meta", ({"dataset_meta": {"classes": ("cat", "dog")}}, {"CLASSES": ["cat", "dog"]}))
def test_files_of_mmdetection_name_their_classes(meta, build, mmdetection_names, tmp_path):
    theirs, ours = numbered(build, classes=2), build(NUM_CLASSES=2)
    torch.save({"meta": {"epoch": 50, **meta}, "state_dict": mmdetection_names(theirs, 3)}, tmp_path / "x.pth")
    DeformableDETRCheckpointer(ours, class_names=["dog", "cat"]).load(str(tmp_path / "x.pth"))
    assert ours.class_embed[0].bias.tolist() == [1, 0]
