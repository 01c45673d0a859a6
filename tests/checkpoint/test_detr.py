"""DETR's files: the official ones and those of transformers, read, written and refused."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deformable_detr.checkpoint import CheckpointError, convert
from deformable_detr.checkpoint.classes import COCO_CLASSES_BY_ID
from deformable_detr.checkpoint.foreign import export
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer

TORCHVISION = {
    r"stem\.conv1\.norm": "bn1",
    r"stem\.conv1": "conv1",
    r"res(\d)\.": lambda match: f"layer{int(match[1]) - 1}.",
    r"conv(\d)\.norm": r"bn\1",
    r"shortcut\.norm": "downsample.1",
    r"shortcut": "downsample.0",
}
# The ResNet of transformers' own, which its models have where they do not use timm's.
HUGGING_FACE = {
    r"(stem\.conv1|conv\d|shortcut)\.norm": r"\1.normalization",
    r"(stem\.conv1|conv\d|shortcut)\.weight": r"\1.convolution.weight",
    r"stem\.conv1": "embedder.embedder",
    r"res(\d)\.": lambda match: f"encoder.stages.{int(match[1]) - 2}.layers.",
    r"\.conv(\d)": lambda match: f".layer.{int(match[1]) - 1}",
}
NAMES = {
    "official": {
        r"^backbone\.bottom_up\.": "backbone.0.body.",
        r"^backbone\.input_proj\.0\.0\.": "input_proj.",
        r"_embed\.0\.": "_embed.",
    },
    "transformers": {
        r"^backbone\.bottom_up\.": "model.backbone.conv_encoder.model.",
        r"^backbone\.input_proj\.0\.0\.": "model.input_projection.",
        r"^query_embed": "model.query_position_embeddings",
        r"^class_embed\.0": "class_labels_classifier",
        r"^bbox_embed\.0": "bbox_predictor",
        r"^transformer\.decoder\.norm": "model.decoder.layernorm",
        r"^transformer": "model",
        r"linear(\d)": r"fc\1",
        r"(encoder\.layers\.\d+\.)norm1": r"\1self_attn_layer_norm",
        r"(encoder\.layers\.\d+\.)norm2": r"\1final_layer_norm",
        r"(decoder\.layers\.\d+\.)norm1": r"\1self_attn_layer_norm",
        r"(decoder\.layers\.\d+\.)norm2": r"\1encoder_attn_layer_norm",
        r"(decoder\.layers\.\d+\.)norm3": r"\1final_layer_norm",
        r"multihead_attn": "encoder_attn",
    },
}


@pytest.fixture
def detr(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A function (**keys of MODEL.DEFORMABLE_DETR) -> a small DETR with random parameters and buffers."""
    return lambda **node: build(stem="detr_R_50", **node)


def renamed(model: nn.Module, to: str, resnet: dict = TORCHVISION) -> dict[str, Tensor]:
    """The parameters of a model as another project names them, with one head of each kind."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        if re.match(r"(class|bbox)_embed\.[^0]", key):
            continue
        for pattern, replacement in {**(resnet if "bottom_up" in key else {}), **NAMES[to]}.items():
            key = re.sub(pattern, replacement, key)
        if to == "transformers" and "in_proj" in key:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[key] = tensor
    return renamed


def assert_same(converted: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    assert converted.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(converted[key], expected[key])] == []


@pytest.mark.parametrize(
    "to, resnet, source",
    [
        ("official", TORCHVISION, "official DETR"),
        ("transformers", TORCHVISION, "transformers DETR"),
        ("transformers", HUGGING_FACE, "transformers DETR"),
    ],
    ids=["official", "timm", "transformers' ResNet"],
)
def test_all_weights_are_taken_over(detr, to, resnet, source):
    theirs, ours = detr(), detr()
    converted, report = convert(renamed(theirs, to, resnet), model=ours)
    assert_same(converted, theirs)
    assert report.source == source and not report.missing and not report.dropped and not report.note


def test_own_files_are_known_and_exact(detr, tmp_path):
    theirs, ours = detr(), detr()
    DeformableDETRCheckpointer(theirs, str(tmp_path)).save("model_final", iteration=3)
    checkpointer = DeformableDETRCheckpointer(ours, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    assert checkpointer.report.source == "deformable_detr" and checkpointer.report.exact
    assert_same(ours.state_dict(), theirs)


@pytest.mark.parametrize("to", NAMES)
def test_the_80_classes_take_their_rows_of_91_and_no_object_stays_the_last(detr, to):
    theirs, ours = detr(NUM_CLASSES=91), detr(NUM_CLASSES=80)
    converted, report = convert(renamed(theirs, to), model=ours)
    rows = [index for index, name in enumerate(COCO_CLASSES_BY_ID) if name is not None] + [91]
    for layer in range(2):
        for part in ("weight", "bias"):
            key = f"class_embed.{layer}.{part}"
            assert torch.equal(converted[key], theirs.state_dict()[key][rows])
    assert report.class_names[-1] == "toothbrush" and len(report.class_names) == 80 and not report.missing


def test_classes_are_found_by_name_and_no_object_is_no_class(detr):
    theirs, ours = detr(NUM_CLASSES=3), detr(NUM_CLASSES=2)
    converted, report = convert(
        theirs.state_dict(), model=ours, class_names=["dog", "cat"], file_class_names=["cat", "cow", "dog"]
    )
    assert torch.equal(converted["class_embed.0.bias"], theirs.class_embed[0].bias[[2, 0, 3]])
    with pytest.raises(ValueError, match="3 class_names for 2 class outputs"):
        convert(theirs.state_dict(), model=ours, class_names=["dog", "cat", "no object"])


def test_classes_without_names_leave_the_head_as_initialised(detr):
    converted, report = convert(detr(NUM_CLASSES=5).state_dict(), model=detr(NUM_CLASSES=3))
    assert "class_embed.0.bias" not in converted and "bbox_embed.0.layers.0.bias" in converted
    assert report.mismatch.startswith("The file has 5 classes, the configuration 3: set")


def for_detectron2(model: nn.Module, prefix: str = "detr.") -> dict[str, Tensor]:
    """The parameters as DETR's own code for Detectron2 saves them."""
    names = renamed(model, "official", resnet={})
    return {prefix + key.replace("backbone.0.body.", "backbone.0.backbone."): names[key] for key in names}


def test_detrs_own_code_for_detectron2_has_its_names_and_contiguous_classes(detr):
    theirs = detr(NUM_CLASSES=80)
    weights = for_detectron2(theirs)
    assert {"detr.backbone.0.backbone.stem.conv1.norm.weight", "detr.class_embed.bias"} <= weights.keys()
    converted, report = convert(weights | {"criterion.empty_weight": torch.ones(81)}, model=detr(NUM_CLASSES=80))
    assert_same(converted, theirs)
    assert report.source == "official DETR for Detectron2" and not report.note
    assert report.dropped.keys() == {"criterion.empty_weight"}
    assert len(report.class_names) == 80 and report.class_names[11] == "stop sign"


@pytest.mark.parametrize("of", ["masks", "masks in Detectron2", "ids"])
def test_panoptic_files_are_refused_for_what_they_are(detr, of):
    weights = renamed(detr(NUM_CLASSES=250), "official")
    if of == "masks":
        weights = {f"detr.{key}": tensor for key, tensor in weights.items()}
        weights["mask_head.lay1.weight"] = torch.zeros(1)
    if of == "masks in Detectron2":
        weights = for_detectron2(detr(), "detr.detr.") | {"detr.bbox_attention.q_linear.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="a DETR for panoptic segmentation.*such as detr-r50-e632da11.pth"):
        convert(weights, model=detr())


def test_a_detr_is_no_deformable_detr(detr, build):
    deformable = build("_single_scale")
    with pytest.raises(CheckpointError, match=r"file holds DETR .*the model is Deformable DETR .*dense_attention is"):
        convert(renamed(detr(), "official"), model=deformable)
    with pytest.raises(CheckpointError, match=r"file holds Deformable DETR .*the model is DETR .*dense_attention is"):
        convert(deformable.state_dict(), model=detr())


def test_another_number_of_layers_or_queries_is_named(detr):
    with pytest.raises(CheckpointError, match="num_decoder_layers is 3 in the file and 2 in the model, num_queries is"):
        convert(renamed(detr(DEC_LAYERS=3, NUM_QUERIES=9), "official"), model=detr())


def test_another_position_encoding_is_told(detr):
    report = convert(renamed(detr(), "official"), model=detr(POSITION_OFFSET=-0.5))[1]
    assert report.note == "official DETR computes with offset 0; this model with offset -0.5"


@pytest.mark.parametrize("to", NAMES)
def test_what_is_exported_has_their_names_and_comes_back(detr, to):
    ours = detr()
    exported = export(ours, to=to)
    theirs = renamed(ours, to)
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[key], theirs[key]) for key in theirs)
    assert_same(convert(exported, model=detr())[0], ours)


def test_coco_ids_are_spread_before_no_object(detr):
    ours = detr(NUM_CLASSES=80)
    exported = export(ours, to="official", coco_ids=True)
    bias = exported["class_embed.bias"]
    assert len(bias) == 92 and bias[91] == ours.class_embed[0].bias[80] and bias[0] == -20
    assert_same(convert(exported, model=detr(NUM_CLASSES=80))[0], ours)
