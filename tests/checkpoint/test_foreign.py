import pytest
import torch
from safetensors.torch import load, save

from deformable_detr.checkpoint import CheckpointError, convert, export

VARIANTS = ("_single_scale", "_single_scale_dc5", "", "_box_refine", "_two_stage")
HF_OPTIONS = {
    "_single_scale": {"num_feature_levels": 1},
    "_single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
    "": {},
    "_box_refine": {"with_box_refine": True},
    "_two_stage": {"with_box_refine": True, "two_stage": True},
}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_names_are_those_of_the_official_code(variant, build, official_names):
    model = build(variant)
    expected = {key: value for key, value in official_names(model).items() if "total_" not in key}
    assert_equal(export(model, to="official"), expected)


@pytest.mark.parametrize("to", ("official", "transformers"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_weights_come_back_unchanged(variant, to, build):
    model = build(variant)
    converted, report = convert(load(save(export(model, to=to))), model=build(variant))
    assert_equal(converted, model.state_dict())
    assert not report.missing


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_predicts_the_same_with_exported_weights(variant, build):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    model = build(variant, small_resnet=False)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.5 + noise.sigmoid() if key.endswith(("weight", "running_var")) else 0.2 * noise)
    config = transformers.DeformableDetrConfig(
        num_labels=80,
        use_timm_backbone=True,
        backbone="resnet50",
        use_pretrained_backbone=False,
        disable_custom_kernels=True,
        encoder_layers=1,
        decoder_layers=2,
        d_model=64,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        two_stage_num_proposals=7,
        **HF_OPTIONS[variant],
    )
    theirs = transformers.DeformableDetrForObjectDetection(config).eval()
    theirs.load_state_dict(export(model, to="transformers"), strict=True)

    image = torch.randint(0, 256, (3, 128, 160), generator=generator, dtype=torch.uint8)
    ours = model.predict_raw([{"image": image}])
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        outputs = theirs(pixel_values=((image / 255 - mean) / std)[None])
    torch.testing.assert_close(ours["pred_logits"][-1], outputs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pred_boxes"][-1], outputs.pred_boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ("", "_two_stage"))
def test_80_classes_go_to_their_raw_ids_and_back(variant, build):
    model = build(variant)
    exported = export(model, to="official", coco_ids=True)
    assert exported["class_embed.0.bias"].shape == (91,)
    # Unused ids never fire; person is 1, the unused 12 comes before stop sign.
    assert exported["class_embed.0.bias"][[0, 12]].tolist() == [-20, -20]
    assert torch.equal(exported["class_embed.1.weight"][[1, 13, 90]], model.class_embed[1].weight[[0, 11, 79]])
    assert_equal(convert(exported, model=build(variant))[0], model.state_dict())


def test_raw_ids_are_given_to_models_of_80_classes_alone(build):
    with pytest.raises(ValueError, match="needs a model of the 80 COCO classes, got 3 outputs"):
        export(build(NUM_CLASSES=3), to="official", coco_ids=True)


def test_the_model_is_not_changed_by_what_is_done_to_its_export(build):
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for tensor in export(model, to="official").values():
        tensor.zero_()
    assert_equal(model.state_dict(), before)


def test_what_the_other_projects_do_not_have_is_told(build):
    with pytest.raises(ValueError, match="to must be one of .*official.*, got 'detrex'"):
        export(build(), to="detrex")
    with pytest.raises(CheckpointError, match="two_stage without with_box_refine"):
        export(build("_two_stage", WITH_BOX_REFINE=False), to="official")
    model = build()
    model.backbone.bottom_up.extra = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"Only ResNets.*backbone\.bottom_up\.extra\.weight"):
        export(model, to="official")
