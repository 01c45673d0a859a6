"""Small models of the five variants, and their parameters in the names of other projects."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from deformable_detr import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"
SMALL_NODE = {"ENC_LAYERS": 1, "DEC_LAYERS": 2, "HIDDEN_DIM": 64, "DIM_FEEDFORWARD": 32, "NUM_QUERIES": 7}
SMALL_RESNET = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8}

Build = Callable[..., nn.Module]
StateDict = dict[str, Tensor]


@pytest.fixture
def build() -> Build:
    """A function (variant, **keys of MODEL.DEFORMABLE_DETR) -> a small model with random parameters and buffers.

    A variant is what follows in the name of the configuration, or its name itself as ``stem``.
    """

    def build_variant(variant: str = "", *, stem: str = "", small_resnet: bool = True, **node) -> nn.Module:
        opts = ["MODEL.DEVICE", "cpu"]
        opts += as_opts("MODEL.DEFORMABLE_DETR", SMALL_NODE | node)
        opts += as_opts("MODEL.RESNETS", SMALL_RESNET if small_resnet else {})
        model = build_model(load_config(str(CONFIGS / f"{stem or f'deformable_detr_R_50{variant}'}.yaml"), opts))
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        return model.eval()

    return build_variant


@pytest.fixture
def build_h_detr(build: Build) -> Build:
    """As ``build``, an H-Deformable-DETR; five of its queries are for the one-to-many branch."""

    def build_variant(*, one2many: int = 5, **node) -> nn.Module:
        return build(stem="h_deformable_detr_R_50", NUM_ONE2MANY_QUERIES=one2many, **node)

    return build_variant


@pytest.fixture
def build_dino(build: Build) -> Build:
    """As ``build``, a DINO with one head for all decoder layers."""

    def build_variant(**node) -> nn.Module:
        return build(stem="dino_R_50_4scale", **node)

    return build_variant


def as_opts(node: str, values: dict[str, int]) -> list[str]:
    return [str(x) for key, value in values.items() for x in (f"{node}.{key}", value)]


def rename(state_dict: StateDict, rules: dict[str, str]) -> StateDict:
    renamed = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor.clone()
    return renamed


RESNET = {
    r"stem\.conv1\.norm": "bn1",
    r"stem\.conv1": "conv1",
    **{rf"res{i}\.": f"layer{i - 1}." for i in range(2, 6)},
    r"conv(\d)\.norm": r"bn\1",
    r"shortcut\.norm": "downsample.1",
    r"shortcut": "downsample.0",
}


@pytest.fixture
def official_names() -> Callable[[nn.Module], StateDict]:
    """A function model -> its parameters as the official repository saves them, profiler counters included."""

    def convert_back(model: nn.Module) -> StateDict:
        rules = {**RESNET, r"^backbone\.bottom_up\.": "backbone.0.body.", r"^backbone\.input_proj": "input_proj"}
        state_dict = rename(model.state_dict(), rules)
        state_dict |= {f"transformer.decoder.{key}": state_dict[key] for key in heads_known_to_decoder(model)}
        return state_dict | {"total_ops": torch.zeros(1), "transformer.encoder.total_params": torch.zeros(1)}

    return convert_back


@pytest.fixture
def transformers_names() -> Callable[..., StateDict]:
    """A function (model, version) -> its parameters as transformers names them in memory."""

    def convert_back(model: nn.Module, version: int) -> StateDict:
        modern = version >= 5
        rules = {
            **RESNET,
            r"^backbone\.bottom_up\.": "model.backbone.model." if modern else "model.backbone.conv_encoder.model.",
            r"^backbone\.input_proj": "model.input_proj",
            r"^query_embed": "model.query_position_embeddings",
            r"^transformer\.": "model.",
            r"linear([12])": r"mlp.fc\1" if modern else r"fc\1",
            r"(encoder.*)norm1": r"\1self_attn_layer_norm",
            r"(encoder.*)norm2": r"\1final_layer_norm",
            r"(decoder.*)norm1": r"\1encoder_attn_layer_norm",
            r"(decoder.*)norm2": r"\1self_attn_layer_norm",
            r"(decoder.*)norm3": r"\1final_layer_norm",
            r"cross_attn": "encoder_attn",
            **({r"self_attn\.out_proj": "self_attn.o_proj"} if modern else {}),
        }
        state_dict = rename(model.state_dict(), rules)
        for key in [key for key in state_dict if "in_proj_" in key]:
            for letter, part in zip("qkv", state_dict.pop(key).chunk(3), strict=True):
                state_dict[key.replace("in_proj_", f"{letter}_proj.")] = part
        state_dict |= {f"model.decoder.{key}": state_dict[key] for key in heads_known_to_decoder(model)}
        counter = next(key for key in state_dict if key.endswith("downsample.1.weight"))
        return state_dict | {counter.replace("weight", "num_batches_tracked"): torch.tensor(0)}

    return convert_back


@pytest.fixture
def detrex_names() -> Callable[[nn.Module], StateDict]:
    """A function model -> its parameters as detrex saves them."""

    def convert_back(model: nn.Module) -> StateDict:
        rules = {
            r"^backbone\.bottom_up\.": "backbone.",
            r"^backbone\.input_proj\.3": "neck.extra_convs.0",
            r"^backbone\.input_proj": "neck.convs",
            r"^(neck\..*)\.0\.(weight|bias)": r"\1.conv.\2",
            r"^(neck\..*)\.1\.(weight|bias)": r"\1.norm.\2",
            r"level_embed": "level_embeds",
            r"query_embed": "query_embedding",
            r"linear1": "ffns.0.layers.0.0",
            r"linear2": "ffns.0.layers.1",
            r"(encoder.*)self_attn": r"\1attentions.0",
            r"(decoder.*)self_attn": r"\1attentions.0.attn",
            r"cross_attn": "attentions.1",
            r"(encoder.*)norm1": r"\1norms.0",
            r"(encoder.*)norm2": r"\1norms.1",
            r"(decoder.*)norm1": r"\1norms.1",
            r"(decoder.*)norm2": r"\1norms.0",
            r"(decoder.*)norm3": r"\1norms.2",
        }
        state_dict = rename(model.state_dict(), rules)
        return state_dict | {f"transformer.decoder.{key}": state_dict[key] for key in heads_known_to_decoder(model)}

    return convert_back


@pytest.fixture
def mmdetection_names() -> Callable[..., StateDict]:
    """A function (model, version) -> its parameters as mmdetection saves them; its ``input_proj`` have no biases."""

    def convert_back(model: nn.Module, version: int) -> StateDict:
        rules = {
            **RESNET,
            r"^backbone\.bottom_up\.": "backbone.",
            r"^backbone\.input_proj\.3": "neck.extra_convs.0",
            r"^backbone\.input_proj": "neck.convs",
            r"^(neck\..*)\.0\.weight": r"\1.conv.weight",
            r"^(neck\..*)\.1\.(weight|bias)": r"\1.gn.\2",
            r"^query_embed": "query_embedding",
            r"^class_embed": "bbox_head.cls_branches",
            r"^bbox_embed\.(\d+)\.layers\.(\d)": lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}",
            r"(decoder.*self_attn)\.": r"\1.attn.",
            r"(encoder.*)norm1": r"\1norms.0",
            r"(encoder.*)norm2": r"\1norms.1",
            r"(decoder.*)norm1": r"\1norms.1",
            r"(decoder.*)norm2": r"\1norms.0",
            r"(decoder.*)norm3": r"\1norms.2",
        }
        rules |= MMDETECTION_2 if version == 2 else MMDETECTION_3
        state_dict = {
            k: v for k, v in model.state_dict().items() if not re.match(r"backbone\.input_proj\.\d\.0\.bias", k)
        }
        return rename(state_dict, rules) | {"backbone.bn1.num_batches_tracked": torch.tensor(7)}

    return convert_back


MMDETECTION_3 = {
    r"^transformer\.reference_points": "reference_points_fc",
    r"^transformer\.enc_output_norm": "memory_trans_norm",
    r"^transformer\.enc_output": "memory_trans_fc",
    r"^transformer\.pos_trans_norm": "pos_trans_norm",
    r"^transformer\.pos_trans": "pos_trans_fc",
    r"^transformer\.": "",
    r"linear1": "ffn.layers.0.0",
    r"linear2": "ffn.layers.1",
}
MMDETECTION_2 = {
    r"^transformer\.level_embed": "transformer.level_embeds",
    r"^(transformer|query_embedding)": r"bbox_head.\1",
    r"linear1": "ffns.0.layers.0.0",
    r"linear2": "ffns.0.layers.1",
    r"self_attn": "attentions.0",
    r"cross_attn": "attentions.1",
}


def heads_known_to_decoder(model: nn.Module) -> list[str]:
    """The heads that the other projects hold twice: the box heads with refinement, all heads with two stages."""
    kinds = ()
    if model.transformer.with_box_refine:
        kinds = ("bbox_embed.", "class_embed.") if model.transformer.two_stage else ("bbox_embed.",)
    return [key for key in model.state_dict() if key.startswith(kinds)] if kinds else []
