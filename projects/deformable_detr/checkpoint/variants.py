"""Which model a set of parameters is of, read off names and shapes, and what makes two of them different."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..wording import counted
from .classes import ENCODER_OUTPUT
from .sources import BOTTOM_UP, DENSE_ATTENTION, Source

LEVEL_EMBED = "transformer.level_embed"
QUERIES = "query_embed.weight"

# (family, backbone, levels) -> what the user calls the configuration of such a model.
_CONFIGURATIONS = {
    ("DETR", "ResNet-50", 1): "detr_R_50, or its _DC5",
    ("DETR", "ResNet-101", 1): "detr_R_101, or its _DC5",
    ("Deformable DETR", "ResNet-50", 1): "deformable_detr_R_50_single_scale, or its _dc5",
    ("Deformable DETR", "ResNet-50", 4): "deformable_detr_R_50",
    ("Deformable DETR with box refinement", "ResNet-50", 4): "deformable_detr_R_50_box_refine",
    ("two-stage Deformable DETR", "ResNet-50", 4): "deformable_detr_R_50_two_stage",
    ("H-Deformable-DETR", "ResNet-50", 4): "h_deformable_detr_R_50",
    ("H-Deformable-DETR", "Swin-T", 4): "h_deformable_detr_swin_tiny",
    ("H-Deformable-DETR", "Swin-L", 4): "h_deformable_detr_swin_large",
    ("DINO", "ResNet-50", 4): "dino_R_50_4scale",
    ("DINO", "ResNet-50", 5): "dino_R_50_5scale",
    ("DINO", "Swin-L", 4): "dino_swin_large_4scale",
}
# Those of which files tell.
SWITCHES = ("mixed_query_selection", "anchor_query_pos", "decoder_norm")
# By the number of blocks in res4; by the width of the first embedding and the number of blocks in the third stage.
_RESNETS = {6: "ResNet-50", 23: "ResNet-101"}
_SWINS = {(96, 6): "Swin-T", (96, 18): "Swin-S", (128, 18): "Swin-B", (192, 18): "Swin-L"}


def family_of(facts: Mapping[str, Any]) -> str:
    """Name the kind of model that has these :func:`facts <describe_variant>`."""
    if facts["dense_attention"]:
        return "DETR"
    switches = {switch for switch in SWITCHES if facts[switch]}
    if switches == set(SWITCHES):
        return "DINO"
    if switches == {"mixed_query_selection"}:
        return "H-Deformable-DETR"
    name = "two-stage Deformable DETR" if facts["two_stage"] else "Deformable DETR"
    if switches:
        # Of no project, such as a recipe of the user's own.
        return f"{name} with {', '.join(sorted(switches))}"
    return f"{name} with box refinement" if not facts["two_stage"] and facts.get("with_box_refine") else name


def compare_variants(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], *, source: Source, model: nn.Module
) -> str:
    """Return what makes the file another variant of the model than ours, in sentences; empty if nothing does."""
    # A model shares one head between its layers; a file holds equal copies of it.
    theirs = describe_variant(tensors, same=torch.equal)
    ours = describe_variant(target, same=operator.is_)
    if ours["two_stage"]:
        # Before training, the box heads of a two-stage model are equal although not shared.
        if ours.pop("with_box_refine", None) is False and theirs.get("with_box_refine"):
            fact = "shared_heads" if model.transformer.with_box_refine else "with_box_refine"
            theirs[fact] = fact != "shared_heads"
            ours[fact] = not theirs[fact]
        if source.is_foreign:
            theirs["multiclass_proposals"] = family_of(theirs) == "DINO"
            ours["multiclass_proposals"] = has_multiclass_proposals(model)
    differences = [
        f"{fact} is {theirs[fact]} in the file and {ours[fact]} in the model"
        for fact in ours.keys() & theirs.keys()
        if ours[fact] != theirs[fact]
    ]
    if not differences:
        return ""
    theirs_is, ours_is = _name_model(theirs, tensors), _name_model(ours, target)
    names = f"The file holds {theirs_is}, the model is {ours_is}. " if theirs_is != ours_is else ""
    return f"{names}They are different variants: {', '.join(sorted(differences))}. "


def has_multiclass_proposals(model: nn.Module) -> bool:
    """Whether the encoder's class head scores real classes; otherwise its channel 0 means "object"."""
    return getattr(getattr(model, "transformer", None), "multiclass_proposals", False)


def count_background(model: nn.Module) -> int:
    """Return how many class outputs are of no class: DETR's last one, "no object"."""
    classification = getattr(model, "classification", None)
    return classification.num_outputs(0) if classification else 0


def find_other_settings(source: Source, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return what the project and the model compute with otherwise: name -> (project's, model's)."""
    if not source.settings:  # As of a pretrained backbone, whose model need not have more than one itself.
        return {}
    ours = {
        # A decoder of the user's own may know no other than the standard one.
        "inverse_sigmoid_eps": getattr(model.transformer.decoder, "inverse_sigmoid_eps", 1e-5),
        "temperature": model.position_embedding.temperature,
        "offset": model.position_embedding.offset,
    }
    return {name: (value, ours[name]) for name, value in source.settings.items() if ours[name] != value}


def describe_other_settings(source: Source, model: nn.Module) -> str:
    """Say what the project and the model compute with otherwise; empty where nothing is known to differ."""
    others = find_other_settings(source, model)
    theirs, ours = (", ".join(f"{name} {pair[i]:g}" for name, pair in others.items()) for i in (0, 1))
    return f"{source.name} computes with {theirs}; this model with {ours}" if others else ""


def note_differences(source: Source, tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """Say for the report what the file's project computes otherwise with the same weights."""
    difference = describe_other_settings(source, model)
    is_dino = family_of(describe_variant(tensors, same=torch.equal)) == "DINO"
    return "\n".join(filter(None, (difference and (source.note or difference), source.note_on_dino if is_dino else "")))


def describe_variant(tensors: Mapping[str, Tensor], *, same: Callable[[Tensor, Tensor], bool]) -> dict[str, int | bool]:
    """Read switches and sizes off parameters by our names.

    Args:
        same: whether two heads are one.
    """

    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    two_stage = ENCODER_OUTPUT in tensors
    facts: dict[str, int | bool] = {
        "num_feature_levels": count(r"backbone\.input_proj\.(\d+)\."),
        "num_encoder_layers": count(r"transformer\.encoder\.layers\.(\d+)\."),
        "num_decoder_layers": count(r"transformer\.decoder\.layers\.(\d+)\."),
        "dense_attention": DENSE_ATTENTION in tensors,
        "two_stage": two_stage,
        "mixed_query_selection": two_stage and QUERIES in tensors,
        "anchor_query_pos": count(r"transformer\.decoder\.(ref_point_head)\.") > 0,
        "decoder_norm": "transformer.decoder.norm.weight" in tensors,
    }
    # Nothing can be read off a matrix that is none.
    matrices = {key for key, tensor in tensors.items() if tensor.dim() == 2}
    if LEVEL_EMBED in matrices:
        facts["hidden_dim"] = tensors[LEVEL_EMBED].shape[1]
    if QUERIES in matrices:
        # Contents of proposals are followed by those of the one-to-many branch.
        facts["num_queries + num_one2many_queries" if two_stage else "num_queries"] = len(tensors[QUERIES])
    second_head = {key.replace(".0.", ".1.", 1): tensors[key] for key in tensors if key.startswith("bbox_embed.0.")}
    if second_head.keys() <= tensors.keys():
        facts["with_box_refine"] = not all(same(tensor, tensors[key]) for key, tensor in second_head.items())
    return facts


def _name_model(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Name family, backbone and levels, and the configuration of such a model where there is one."""
    parts = (family_of(facts), _name_backbone(tensors), facts["num_feature_levels"])
    family, backbone, levels = parts
    example = f": configuration {_CONFIGURATIONS[parts]}" if parts in _CONFIGURATIONS else ""
    return f"{family} ({backbone or 'another backbone'}, {counted(levels, 'level')}{example})"


def _name_backbone(tensors: Mapping[str, Tensor]) -> str | None:
    embedding = tensors.get(f"{BOTTOM_UP}patch_embed.proj.weight")
    stage, names = (r"res4\.", _RESNETS) if embedding is None else (r"layers\.2\.blocks\.", _SWINS)
    blocks = len({match[1] for key in tensors if (match := re.match(rf"{re.escape(BOTTOM_UP)}{stage}(\d+)\.", key))})
    return names.get(blocks if embedding is None else (len(embedding), blocks))
