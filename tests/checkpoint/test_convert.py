import pytest
import torch
import torchvision
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from deformable_detr.checkpoint import CheckpointError, convert
from deformable_detr.checkpoint.classes import COCO_CLASSES, COCO_CLASSES_BY_ID

COCO_CATEGORY_IDS = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]

VARIANTS = ("_single_scale", "_single_scale_dc5", "", "_box_refine", "_two_stage")


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_weights_are_taken_over_completely(variant, build, official_names):
    theirs, ours = build(variant), build(variant)
    converted, report = convert(official_names(theirs), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "official Deformable-DETR" and not report.missing and not report.mapped
    assert all("counter" in reason or "second name" in reason for reason in report.dropped.values())


@pytest.mark.parametrize("version", (4, 5))
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_weights_are_taken_over_completely(variant, version, build, transformers_names):
    theirs, ours = build(variant), build(variant)
    converted, report = convert(transformers_names(theirs, version), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "transformers" and not report.missing
    assert len(report.mapped) == 2 * ours.transformer.num_decoder_layers


@pytest.mark.parametrize("variant", ("", "_box_refine", "_two_stage"))
def test_detrex_weights_are_taken_over_completely(variant, build, detrex_names):
    theirs, ours = build(variant), build(variant)
    converted, report = convert(detrex_names(theirs), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "detrex" and not report.missing and not report.mapped


def test_detrex_weights_are_said_to_give_other_boxes_in_detrex(build, detrex_names):
    report = str(convert(detrex_names(build("_two_stage")), model=build("_two_stage"))[1])
    assert "detrex clamps at 1e-3 in inverse_sigmoid, the official code and this one at 1e-5" in report


@pytest.mark.parametrize("version", (2, 3))
@pytest.mark.parametrize("variant", ("", "_box_refine", "_two_stage"))
def test_mmdetection_weights_give_equal_outputs(variant, version, build, mmdetection_names):
    theirs, ours = build(variant, small_resnet=False), build(variant, small_resnet=False)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
        for projection in theirs.backbone.input_proj:
            projection[0].bias.zero_()
    converted, report = convert(mmdetection_names(theirs, version), model=ours)
    assert report.source == "mmdetection" and not report.missing
    assert report.mapped == {
        f"backbone.input_proj.{level}.0.bias": "0: mmdetection has no such parameter" for level in range(4)
    }
    ours.load_state_dict(converted)
    images = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)} for size in ((64, 96), (96, 64))]
    expected, actual = theirs.predict_raw(images), ours.predict_raw(images)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert expected["pred_logits"].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_weights_are_taken_over_exactly(variant, build):
    theirs, ours = build(variant), build(variant)
    converted, report = convert(theirs.state_dict(), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.exact


def test_the_prefix_of_distributed_training_is_removed(build):
    model = build()
    converted, report = convert({f"module.{key}": value for key, value in model.state_dict().items()}, model=model)
    assert_equal(converted, model.state_dict())
    assert report.exact


@pytest.mark.parametrize("kept", ("alias", "first layer"))
def test_heads_saved_once_reach_every_decoder_layer(kept, build, transformers_names):
    model = build("_box_refine" if kept == "alias" else "")
    saved = transformers_names(model, 4)
    absent = ("bbox_embed.",) if kept == "alias" else ("bbox_embed.1.", "class_embed.1.")
    saved = {key: value for key, value in saved.items() if not key.startswith(absent)}
    assert_equal(convert(saved, model=model)[0], model.state_dict())


def test_neither_the_checkpoint_nor_the_model_is_changed(build, official_names):
    theirs, ours = build("_two_stage", NUM_CLASSES=91), build("_two_stage")
    state_dict = official_names(theirs)
    before = {key: value.clone() for key, value in state_dict.items()}
    model_before = {key: value.clone() for key, value in ours.state_dict().items()}
    convert(state_dict, model=ours)
    assert_equal(state_dict, before)
    assert_equal(ours.state_dict(), model_before)


def test_torchvision_backbone_computes_the_same_features(build):
    resnet = torchvision.models.resnet50(weights=None).eval()
    for key, tensor in resnet.state_dict().items():
        if "running" in key:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    model = build(small_resnet=False)
    converted, report = convert(resnet.state_dict(), model=model)
    model.load_state_dict(converted, strict=False)
    assert set(converted) == {key for key in model.state_dict() if key.startswith("backbone.bottom_up.")}
    assert "fc.weight" in report.dropped and "transformer.level_embed" in report.missing

    image = torch.rand(1, 3, 64, 96)
    expected = torch.nn.Sequential(*list(resnet.children())[:-2])(image)
    torch.testing.assert_close(model.backbone.bottom_up(image)["res5"], expected)


def test_detectron2_backbone_of_numpy_arrays_is_taken_over(build):
    model = build()
    prefix = "backbone.bottom_up."
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    arrays = {key.removeprefix(prefix): value.numpy() for key, value in expected.items()}
    converted, report = convert(arrays | {"stem.fc.bias": torch.zeros(1000).numpy()}, model=build())
    assert_equal(converted, expected)
    assert list(report.dropped) == ["stem.fc.bias"]


def test_incomplete_backbone_is_an_error_that_names_keys_and_count(build):
    model = build()
    prefix = "backbone.bottom_up."
    weights = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    # Detectron2's frozen norms would fill in what is absent here, without a word.
    weights = {key: value for key, value in weights.items() if "running" not in key}
    first = r"backbone\.bottom_up\.stem\.conv1\.norm\.running_mean"
    with pytest.raises(CheckpointError, match=f"106 missing in the file: {first}.* and 101 more"):
        convert(weights, model=model)


def test_coco_names_and_ids_are_those_of_detectron2():
    names = {category["id"]: category["name"] for category in COCO_CATEGORIES if category["isthing"]}
    assert {i: name for i, name in enumerate(COCO_CLASSES_BY_ID) if name} == names
    assert COCO_CLASSES == tuple(names.values()) and len(COCO_CLASSES_BY_ID) == 91


def test_80_classes_take_the_rows_of_their_category_ids(build, official_names):
    theirs, ours = build(NUM_CLASSES=91), build(NUM_CLASSES=80)
    theirs.class_embed[0].bias.data = torch.arange(91.0)
    converted, report = convert(official_names(theirs), model=ours)
    assert converted["class_embed.0.bias"].tolist() == COCO_CATEGORY_IDS
    # Hand-picked: person, stop sign (after the unused 12) and toothbrush (the last id).
    assert [converted["class_embed.1.bias"][i].item() for i in (0, 11, 79)] == [1, 13, 90]
    assert converted["class_embed.0.weight"].shape == (80, 64)
    assert report.mapped["class_embed.0.bias"] == "rows of 80 of the model's 80 classes, by name out of 91"


@pytest.mark.parametrize("names", ("detrex", "mmdetection"))
def test_80_rows_of_mmcvs_projects_are_the_coco_classes_in_their_order(names, build, detrex_names, mmdetection_names):
    theirs, ours = build(NUM_CLASSES=80), build(NUM_CLASSES=91)
    theirs.class_embed[0].bias.data = torch.arange(80.0)
    weights = detrex_names(theirs) if names == "detrex" else mmdetection_names(theirs, 3)
    bias = convert(weights, model=ours)[0]["class_embed.0.bias"]
    assert bias[COCO_CATEGORY_IDS].tolist() == list(range(80))


@pytest.mark.parametrize("num_classes", (80, 3, 120))
def test_two_stage_encoder_head_keeps_its_objectness_channel(num_classes, build, official_names):
    theirs, ours = build("_two_stage", NUM_CLASSES=91), build("_two_stage", NUM_CLASSES=num_classes)
    theirs.class_embed[2].bias.data = torch.arange(91.0)
    converted, _ = convert(official_names(theirs), model=ours)
    bias = converted["class_embed.2.bias"]
    assert bias[:3].tolist() == [0, 1, 2]
    assert torch.equal(bias[91:], ours.class_embed[2].bias[91:]) and len(bias) == num_classes


def test_a_counter_of_batch_norm_is_nothing_that_detections_depend_on(build):
    theirs, ours = build(), build()
    ours.backbone.bottom_up.stem.conv1.norm = torch.nn.BatchNorm2d(8)
    report = convert(theirs.state_dict(), model=ours)[1]
    assert list(report.missing) == ["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"]
    assert report.undetermined == []


def test_heads_of_unrelated_classes_stay_as_initialised_and_are_reported(build, official_names):
    theirs, ours = build(NUM_CLASSES=91), build(NUM_CLASSES=5)
    converted, report = convert(official_names(theirs), model=ours)
    heads = {f"class_embed.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert set(report.missing) == heads == ours.state_dict().keys() - converted.keys()
    assert heads <= set(report.dropped)
    assert "91 classes in the file, 5 in the model" in report.missing["class_embed.0.bias"]
    assert (
        "The file has 91 classes (person, bicycle, car, motorcycle, airplane and 75 more), the configuration 5: "
        in str(report)
    )


@pytest.mark.parametrize(
    ("file", "model", "difference"),
    (
        ("_single_scale", "", "num_feature_levels is 1 in the file and 4 in the model"),
        ("_two_stage", "_box_refine", "two_stage is True in the file and False in the model"),
        ("", "_two_stage", "two_stage is False in the file and True in the model"),
        ("_box_refine", "", "with_box_refine is True in the file and False in the model"),
        ("", "_box_refine", "with_box_refine is False in the file and True in the model"),
    ),
)
def test_weights_of_another_variant_are_refused_with_the_difference(file, model, difference, build, official_names):
    with pytest.raises(CheckpointError, match=difference):
        convert(official_names(build(file)), model=build(model))


@pytest.mark.parametrize(
    ("node", "cause"),
    (
        ({"NUM_QUERIES": 9}, "num_queries is 7 in the file and 9 in the model"),
        ({"ENC_LAYERS": 2}, "num_encoder_layers is 1 in the file and 2 in the model"),
        ({"DEC_LAYERS": 1}, "num_decoder_layers is 2 in the file and 1 in the model"),
        ({"DEC_N_POINTS": 2}, r"cross_attn.sampling_offsets.weight is \(256, 64\) in the file and \(128, 64\)"),
        ({"HIDDEN_DIM": 32}, "hidden_dim is 64 in the file and 32 in the model"),
    ),
)
def test_other_sizes_are_refused_with_the_difference(node, cause, build):
    with pytest.raises(CheckpointError, match=cause):
        convert(build().state_dict(), model=build(**node))


def test_a_parameter_without_a_place_is_an_error(build):
    model = build()
    state_dict = model.state_dict() | {"transformer.extra.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 without a place in the model: transformer\.extra\.weight"):
        convert(state_dict, model=model)


@pytest.mark.parametrize("names", ((), ("conv1_w", "res2_0_branch2a_w")))
def test_unknown_names_are_refused_with_examples(names, build):
    with pytest.raises(CheckpointError, match=f"no known kind .* it has {len(names)} of them.*{'.*'.join(names)}"):
        convert({name: torch.zeros(1) for name in names}, model=build())


def test_a_value_that_is_no_tensor_is_named(build):
    with pytest.raises(CheckpointError, match="epoch is a str, not a tensor"):
        convert({"epoch": "fifty"}, model=build())


def test_report_groups_the_keys_by_what_became_of_them(build, official_names):
    theirs, ours = build("_two_stage", NUM_CLASSES=91), build("_two_stage", NUM_CLASSES=5)
    text = str(convert(official_names(theirs), model=ours)[1])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[3:]]
    assert text.startswith("Checkpoint with official Deformable-DETR names")
    assert [(outcome, int(keys)) for outcome, keys, *_ in rows] == [
        ("used", len(ours.state_dict()) - 4),
        ("mapped", 2),  # the encoder's head
        ("dropped", 24),  # the decoder's second names of 3 heads with 8 tensors each
        ("dropped", 4),  # the class heads of 2 decoder layers
        ("dropped", 2),  # the profiler's counters
        ("missing", 4),
    ]
