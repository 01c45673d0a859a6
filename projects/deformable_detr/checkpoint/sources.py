"""How other projects name the parameters of Deformable DETR: one table of renames per source, nothing else.

Our own names are the official ones, except that the ResNet is Detectron2's (``backbone.bottom_up.*``) and
``input_proj`` belongs to the backbone adaptor.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

BOTTOM_UP = "backbone.bottom_up."

Rule = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """A naming scheme of a checkpoint.

    Attributes:
        name: what the report calls it.
        rules: (regular expression, replacement) pairs, all applied in order to every name.
        backbone_only: whether files of this kind hold a pretrained backbone and nothing of the transformer.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    backbone_only: bool = False

    def rename(self, key: str) -> str:
        """Return our name of the parameter that this source calls ``key``."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


# torchvision's (and timm's) ResNet names -> Detectron2's; expects and keeps the prefix ``backbone.bottom_up.``.
_RESNET: tuple[Rule, ...] = (
    (r"^(backbone\.bottom_up\.)(conv1|bn1)\.", r"\1stem.\2."),
    *((rf"^(backbone\.bottom_up\.)layer{i}\.", rf"\1res{i + 1}.") for i in range(1, 5)),
    (r"^(backbone\.bottom_up\..*)bn([123])\.", r"\1conv\2.norm."),
    (r"^(backbone\.bottom_up\..*)downsample\.0\.", r"\1shortcut."),
    (r"^(backbone\.bottom_up\..*)downsample\.1\.", r"\1shortcut.norm."),
)

OURS = Source("deformable_detr")

OFFICIAL = Source(
    "official Deformable-DETR",
    rules=(
        (r"^backbone\.0\.body\.", BOTTOM_UP),
        *_RESNET,
        (r"^input_proj\.", "backbone.input_proj."),
    ),
)

# Version 5 renamed a few modules in memory (the optional parts below); its saved files keep the names of version 4.
TRANSFORMERS = Source(
    "transformers",
    rules=(
        (r"^model\.backbone\.(conv_encoder\.)?model\.", BOTTOM_UP),
        *_RESNET,
        (r"^model\.input_proj\.", "backbone.input_proj."),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^model\.(encoder|decoder|level_embed|reference_points|enc_output|pos_trans)", r"transformer.\1"),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
        (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
        (r"\.encoder_attn\.", ".cross_attn."),
    ),
)

# detrex's Deformable DETR has three backbone levels; the coarser ones are counted from zero again.
DETREX = Source(
    "detrex",
    rules=(
        (r"^backbone\.", BOTTOM_UP),
        (r"^neck\.convs\.", "backbone.input_proj."),
        *((rf"^neck\.extra_convs\.{i}\.", f"backbone.input_proj.{i + 3}.") for i in range(3)),
        (r"^(backbone\.input_proj\.\d+)\.conv\.", r"\1.0."),
        (r"^(backbone\.input_proj\.\d+)\.norm\.", r"\1.1."),
        (r"^transformer\.level_embeds$", "transformer.level_embed"),
        (r"^query_embedding\.", "query_embed."),
        (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
        (r"\.ffns\.0\.layers\.1\.", ".linear2."),
        (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
        (r"(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
        (r"(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
        (r"(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
        # In the order of use, while the official numbers say cross-attention, self-attention, feed-forward.
        (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
        (r"(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    ),
)

TORCHVISION = Source("torchvision ResNet", rules=((r"^", BOTTOM_UP), *_RESNET), backbone_only=True)

DETECTRON2 = Source("Detectron2 backbone", rules=((r"^(?!backbone\.)", BOTTOM_UP),), backbone_only=True)

SOURCES = (OURS, OFFICIAL, TRANSFORMERS, DETREX, TORCHVISION, DETECTRON2)


def detect_source(keys: Collection[str], *, model_keys: Collection[str]) -> Source | None:
    """Tells by the names in a checkpoint which project wrote it.

    Args:
        keys: the names in the checkpoint.
        model_keys: the names in our model, by which Detectron2 backbones of any architecture are known.

    Returns:
        The source, or None where no known naming scheme fits.
    """
    if any(key.startswith("backbone.0.body.") for key in keys):
        return OFFICIAL
    if any(key.startswith("model.backbone.") for key in keys):
        return TRANSFORMERS
    if any(key.startswith("neck.convs.") for key in keys):
        return DETREX
    if "transformer.level_embed" in keys and any(key.startswith("backbone.input_proj.") for key in keys):
        return OURS
    if "layer1.0.conv1.weight" in keys:
        return TORCHVISION
    if any(DETECTRON2.rename(key) in model_keys for key in keys):
        return DETECTRON2
    return None
