"""Our weights in the names of other projects: the opposite direction of ``convert``."""

import re

from torch import Tensor, nn

from .classes import COCO_CLASSES, COCO_CLASSES_BY_ID, is_encoder_head
from .coverage import CheckpointError
from .sources import Rule

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
)
_RULES: dict[str, tuple[Rule, ...]] = {
    "official": (
        *_RESNET,
        (r"^BACKBONE\.", "backbone.0.body."),
        (r"^backbone\.input_proj\.", "input_proj."),
    ),
    "transformers": (
        *_RESNET,
        (r"^BACKBONE\.", "model.backbone.conv_encoder.model."),
        (r"^backbone\.input_proj\.", "model.input_proj."),
        (r"^query_embed\.", "model.query_position_embeddings."),
        (r"^transformer\.", "model."),
        (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
        (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
        (r"\.cross_attn\.", ".encoder_attn."),
        (r"\.linear([12])\.", r".fc\1."),
    ),
}
FORMATS = tuple(_RULES)


def export(model: nn.Module, *, to: str, coco_ids: bool = False) -> dict[str, Tensor]:
    """Return a model's parameters in the names of another project, its second names of the heads included.

    Args:
        model: a DeformableDETR with a ResNet. It is left as it is.
        to: "official" (the value under "model" of an official ``.pth``) or "transformers" (version 4; version 5 reads
            and writes the same files).
        coco_ids: spread the 80 COCO classes over 91 outputs, the raw category ids that both projects evaluate by. The
            ids that name no category are never detected.

    Raises:
        ValueError: if ``to`` is unknown, or ``coco_ids`` is asked of a model without 80 outputs.
        CheckpointError: if the model has a part that the other project does not have.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {FORMATS}, got {to!r}")
    tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    _check_known_elsewhere(model, tensors)
    if coco_ids:
        _spread_over_coco_ids(tensors)
    exported = {_rename(key, to): tensor for key, tensor in tensors.items()}
    if to == "transformers":
        _split_query_key_value(exported)
    stem = {"official": "transformer.decoder.", "transformers": "model.decoder."}[to]
    # Copies, because safetensors does not take two names of one memory.
    return exported | {stem + key: tensors[key].clone() for key in _heads_known_to_decoder(model, tensors)}


def _check_known_elsewhere(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    if model.transformer.two_stage and not model.transformer.with_box_refine:
        raise CheckpointError("Elsewhere two-stage models refine boxes; this one has two_stage without with_box_refine")
    resnet = re.compile(r"backbone\.bottom_up\.(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))\.")
    foreign = [key for key in tensors if key.startswith("backbone.bottom_up.") and not resnet.match(key)]
    if foreign:
        raise CheckpointError(f"Only ResNets have names elsewhere; the backbone has {foreign[0]}")


def _rename(key: str, to: str) -> str:
    for pattern, replacement in _RULES[to]:
        key = re.sub(pattern, replacement, key)
    return key


def _split_query_key_value(tensors: dict[str, Tensor]) -> None:
    """Replace nn.MultiheadAttention's ``in_proj_*`` by separate query, key and value projections."""
    for key in [key for key in tensors if ".self_attn.in_proj_" in key]:
        parts = tensors.pop(key).chunk(3)
        for letter, part in zip("qkv", parts, strict=True):
            tensors[key.replace("in_proj_", f"{letter}_proj.")] = part.clone()


def _heads_known_to_decoder(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return the heads that both other projects hold a second time: those by which the decoder refines and proposes."""
    transformer = model.transformer
    held = (("bbox_embed.", transformer.with_box_refine), ("class_embed.", transformer.two_stage))
    return [key for key in tensors if key.startswith(tuple(kind for kind, is_held in held if is_held))]


def _spread_over_coco_ids(tensors: dict[str, Tensor]) -> None:
    ids = [i for i, name in enumerate(COCO_CLASSES_BY_ID) if name is not None]
    for key in [key for key in tensors if key.startswith("class_embed.")]:
        tensor = tensors[key]
        if len(tensor) != len(COCO_CLASSES):
            raise ValueError(
                f"coco_ids needs a model of the {len(COCO_CLASSES)} COCO classes, got {len(tensor)} outputs"
            )
        unused = _UNUSED_CLASS_BIAS if key.endswith(".bias") else 0.0
        spread = tensor.new_full((len(COCO_CLASSES_BY_ID), *tensor.shape[1:]), unused)
        # The encoder's head keeps its channel 0, which means "object".
        spread[list(range(len(ids))) if is_encoder_head(key, tensors) else ids] = tensor
        tensors[key] = spread
