"""Our weights in the names of other projects: the opposite direction of ``convert``."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classes import COCO_CLASSES, COCO_CLASSES_BY_ID, HEAD, LABEL_EMBEDDING, is_encoder_head
from .coverage import TRAINING_ONLY, CheckpointError
from .sources import DENSE_ATTENTION, DETR, DINO, OFFICIAL, Rule, Source
from .variants import (
    QUERIES,
    SWITCHES,
    count_background,
    describe_other_settings,
    describe_variant,
    has_multiclass_proposals,
)

# A class that does not exist must never be detected: sigmoid(-20) is 2e-9.
_UNUSED_CLASS_BIAS = -20.0

# Detectron2's ResNet names -> torchvision's, below either project's prefix.
_RESNET: tuple[Rule, ...] = (
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "BACKBONE.bn1."),
    (r"^backbone\.bottom_up\.stem\.conv1\.", "BACKBONE.conv1."),
    *((rf"^backbone\.bottom_up\.res{i + 1}\.", f"BACKBONE.layer{i}.") for i in range(1, 5)),
    (r"^(BACKBONE\.layer.*)conv([123])\.norm\.", r"\1bn\2."),
    (r"^(BACKBONE\.layer.*)shortcut\.norm\.", r"\1downsample.1."),
    (r"^(BACKBONE\.layer.*)shortcut\.", r"\1downsample.0."),
    # What is left is no ResNet.
    (r"^backbone\.bottom_up\.", "BACKBONE."),
)
_TRANSFORMERS_BACKBONE: tuple[Rule, ...] = (*_RESNET, (r"^BACKBONE\.", "model.backbone.conv_encoder.model."))
_TRANSFORMERS_LAYERS: tuple[Rule, ...] = (
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
)
# One of each for all levels and layers.
_DETR_NAMES: tuple[Rule, ...] = (
    (r"^backbone\.input_proj\.0\.0\.", "input_proj."),
    (r"^(class|bbox)_embed\.0\.", r"\1_embed."),
)
_RULES: dict[str, tuple[Rule, ...]] = {
    "official": (
        *_RESNET,
        (r"^BACKBONE\.", "backbone.0.body."),
        (r"^backbone\.input_proj\.", "input_proj."),
    ),
    # Also of the official code, where the model is DINO; its Swins have no "body".
    "DINO": (
        *_RESNET,
        (r"^BACKBONE\.(conv1|bn1|layer\d)\.", r"backbone.0.body.\1."),
        (r"^BACKBONE\.", "backbone.0."),
        (r"^backbone\.input_proj\.", "input_proj."),
        (r"^query_embed\.", "transformer.tgt_embed."),
        (r"^denoising\.", ""),
    ),
    "DETR": (*_RESNET, (r"^BACKBONE\.", "backbone.0.body."), *_DETR_NAMES),
    "transformers DETR": (
        *_TRANSFORMERS_BACKBONE,
        *_DETR_NAMES,
        (r"^input_proj\.", "model.input_projection."),
        (r"^class_embed\.", "class_labels_classifier."),
        (r"^bbox_embed\.", "bbox_predictor."),
        *_TRANSFORMERS_LAYERS,
        (r"^(model\.decoder)\.norm\.", r"\1.layernorm."),
        (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
        (r"\.multihead_attn\.", ".encoder_attn."),
    ),
    "transformers": (
        *_TRANSFORMERS_BACKBONE,
        (r"^backbone\.input_proj\.", "model.input_proj."),
        *_TRANSFORMERS_LAYERS,
        (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
        (r"\.cross_attn\.", ".encoder_attn."),
    ),
}
FORMATS = ("official", "transformers")
# What makes the models of the official codes: Deformable DETR has none of them, DINO has all.
_SWITCHES = (*SWITCHES, "multiclass_proposals")
_H_DEFORMABLE_DETR = {"mixed_query_selection"}


def export(model: nn.Module, *, to: str, coco_ids: bool = False) -> dict[str, Tensor]:
    """Return a model's parameters in the names of another project, its second names of the heads included.

    What only trains and has no place there is left out: one-to-many queries, and class embeddings for denoising.

    Args:
        model: with a ResNet or, for the official codes but DETR's, a Swin. It is left as it is.
        to: "official" (the value under "model" of a ``.pth`` of the official code of DETR, of Deformable DETR, of
            H-Deformable-DETR or of DINO, whichever the model is) or "transformers" (version 4; version 5 reads and
            writes the same files).
        coco_ids: spread the 80 COCO classes over 91 outputs, the raw category ids that these projects evaluate by. The
            ids that name no category are never detected.

    Raises:
        ValueError: if ``to`` is unknown, or ``coco_ids`` is asked of a model without 80 outputs.
        CheckpointError: if the model has a part that the other project does not have, or computes otherwise.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {FORMATS}, got {to!r}")
    tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    names = _find_names(model, tensors, to)
    _leave_out_what_they_lack(model, tensors, names)
    if coco_ids:
        _spread_over_coco_ids(
            tensors, multiclass_proposals=has_multiclass_proposals(model), background=count_background(model)
        )
    if names == "DINO":
        # Its table has a row more than there are classes, which nothing reads.
        tensors[LABEL_EMBEDDING] = F.pad(tensors[LABEL_EMBEDDING], (0, 0, 0, 1))
    second_names = _second_names(model, tensors, names)
    exported = {_rename(key, names): tensor for key, tensor in tensors.items()}
    if names == "DINO":
        exported = _name_encoder_heads(model, exported)
    if to == "transformers":
        _split_query_key_value(exported)
    # Copies, because safetensors does not take two names of one memory.
    return exported | {name: tensors[key].clone() for name, key in second_names.items()}


def _find_names(model: nn.Module, tensors: dict[str, Tensor], to: str) -> str:
    """Return which of the tables of names the model needs.

    Raises:
        CheckpointError: if there is none.
    """
    if model.transformer.two_stage and not model.transformer.with_box_refine:
        raise CheckpointError("Elsewhere two-stage models refine boxes; this one has two_stage without with_box_refine")
    if DENSE_ATTENTION in tensors:
        _check_settings(DETR, model)
        _check_backbone(tensors, "transformers")
        return "DETR" if to == "official" else "transformers DETR"
    facts = describe_variant(tensors, same=torch.equal) | {"multiclass_proposals": has_multiclass_proposals(model)}
    on = {switch for switch in _SWITCHES if facts[switch]}
    if on not in (set(), _H_DEFORMABLE_DETR, set(_SWITCHES)):
        off = [switch for switch in _SWITCHES if switch not in on]
        raise CheckpointError(f"No other project has models with {', '.join(sorted(on))} and without {', '.join(off)}")
    if on and to == "transformers":
        raise CheckpointError(f"transformers has no model with {', '.join(sorted(on))}")
    names, source = ("DINO", DINO) if on == set(_SWITCHES) else (to, OFFICIAL)
    if names == "DINO" and LABEL_EMBEDDING not in tensors:
        raise CheckpointError("DINO has class embeddings for denoising; this model has no denoising queries")
    _check_settings(source, model)
    _check_backbone(tensors, to)
    return names


def _check_settings(source: Source, model: nn.Module) -> None:
    if difference := describe_other_settings(source, model):
        raise CheckpointError(f"{difference}: with the same weights it would detect something else")


def _check_backbone(tensors: dict[str, Tensor], to: str) -> None:
    known, pattern = "ResNets", r"stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut)"
    if to == "official":
        known, pattern = "ResNets and Swins", rf"{pattern}|patch_embed|layers\.\d+\.(blocks|downsample)|norm\d"
    theirs = re.compile(rf"backbone\.bottom_up\.({pattern})\.")
    foreign = [key for key in tensors if key.startswith("backbone.bottom_up.") and not theirs.match(key)]
    if foreign:
        raise CheckpointError(f"Only {known} have names elsewhere; the backbone has {foreign[0]}")


def _leave_out_what_they_lack(model: nn.Module, tensors: dict[str, Tensor], names: str) -> None:
    if names != "DINO":
        for key in [key for key in tensors if key.startswith(TRAINING_ONLY)]:
            del tensors[key]
    if names in ("DETR", "transformers DETR"):
        for key in [key for key in tensors if (match := HEAD.match(key)) and match["index"] != "0"]:
            del tensors[key]
    # H-Deformable-DETR keeps the queries of its one-to-many branch; the official code of that name reads them.
    if QUERIES in tensors and names != "official":
        tensors[QUERIES] = tensors[QUERIES][: model.num_queries]


def _second_names(model: nn.Module, tensors: dict[str, Tensor], names: str) -> dict[str, str]:
    """Return names that the other projects give to heads a second time, by which the decoder refines and proposes."""
    transformer = model.transformer
    held = (("bbox_embed.", transformer.with_box_refine), ("class_embed.", transformer.two_stage))
    keys = [key for key in tensors if key.startswith(tuple(kind for kind, is_held in held if is_held))]
    if names == "DINO":
        keys = [key for key in keys if not is_encoder_head(key, tensors)]
    stem = "model.decoder." if names == "transformers" else "transformer.decoder."
    return {stem + key: key for key in keys}


def _name_encoder_heads(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = model.transformer.num_decoder_layers
    pattern = re.compile(rf"^(class|bbox)_embed\.{last}\.")
    return {pattern.sub(r"transformer.enc_out_\1_embed.", key): tensor for key, tensor in tensors.items()}


def _rename(key: str, to: str) -> str:
    for pattern, replacement in _RULES[to]:
        key = re.sub(pattern, replacement, key)
    return key


def _split_query_key_value(tensors: dict[str, Tensor]) -> None:
    """Replace nn.MultiheadAttention's ``in_proj_*`` by separate query, key and value projections."""
    for key in [key for key in tensors if "_attn.in_proj_" in key]:
        parts = tensors.pop(key).chunk(3)
        for letter, part in zip("qkv", parts, strict=True):
            tensors[key.replace("in_proj_", f"{letter}_proj.")] = part.clone()


def _spread_over_coco_ids(tensors: dict[str, Tensor], *, multiclass_proposals: bool, background: int) -> None:
    ids = [i for i, name in enumerate(COCO_CLASSES_BY_ID) if name is not None]
    for key in [key for key in tensors if key.startswith(("class_embed.", LABEL_EMBEDDING))]:
        rows = len(tensors[key]) - background
        tensor, no_object = tensors[key][:rows], tensors[key][rows:]
        if len(tensor) != len(COCO_CLASSES):
            raise ValueError(
                f"coco_ids needs a model of the {len(COCO_CLASSES)} COCO classes, got {len(tensor)} outputs"
            )
        unused = _UNUSED_CLASS_BIAS if key.endswith(".bias") else 0.0
        spread = tensor.new_full((len(COCO_CLASSES_BY_ID), *tensor.shape[1:]), unused)
        # A head that scores objects keeps its channel 0, which means "object".
        keeps_places = is_encoder_head(key, tensors) and not multiclass_proposals
        spread[list(range(len(ids))) if keeps_places else ids] = tensor
        tensors[key] = torch.cat([spread, no_object])
