"""How other projects name the parameters of Deformable DETR and DETR: one table of renames per source, nothing else.

Our own names are the official ones, except that the ResNet is Detectron2's (``backbone.bottom_up.*``) and
``input_proj`` belongs to the backbone adaptor.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

BOTTOM_UP = "backbone.bottom_up."
# DETR alone has it.
DENSE_ATTENTION = "transformer.decoder.layers.0.multihead_attn.in_proj_weight"

Rule = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """A naming scheme of a checkpoint.

    Attributes:
        name: what the report calls it.
        rules: (regular expression, replacement) pairs, all applied in order to every name.
        backbone_only: whether files of this kind hold a pretrained backbone and nothing of the transformer.
        has_contiguous_classes: whether 80 rows of a class head are COCO's categories in Detectron2's order.
        zeros: regular expression of our parameters that the project does without, which is as if they were 0.
        settings: what the project computes with that no file says, by our names: "inverse_sigmoid_eps", and
            "temperature" and "offset" of the position encoding. Those that are not the project's alone are left out.
        note: what a model with other settings computes otherwise, for the report.
        note_on_dino: what to know of the project's DINO, for the report.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    backbone_only: bool = False
    has_contiguous_classes: bool = False
    zeros: str | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    note_on_dino: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether files of this kind are of another project."""
        return self is not OURS

    def rename(self, key: str) -> str:
        """Return our name of the parameter that this source calls ``key``.

        A number with a plus, as in ``class_embed.+0.``, counts on from what comes before: see :func:`count_on`.
        """
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


# ResNet names of torchvision, timm and mmdetection -> Detectron2's; expects and keeps the prefix
# ``backbone.bottom_up.``.
RESNET: tuple[Rule, ...] = (
    (r"^(backbone\.bottom_up\.)(conv1|bn1)\.", r"\1stem.\2."),
    *((rf"^(backbone\.bottom_up\.)layer{i}\.", rf"\1res{i + 1}.") for i in range(1, 5)),
    (r"^(backbone\.bottom_up\..*)bn([123])\.", r"\1conv\2.norm."),
    (r"^(backbone\.bottom_up\..*)downsample\.0\.", r"\1shortcut."),
    (r"^(backbone\.bottom_up\..*)downsample\.1\.", r"\1shortcut.norm."),
)

# The ResNet of transformers' own, below the same prefix.
_TRANSFORMERS_RESNET: tuple[Rule, ...] = (
    (r"^(backbone\.bottom_up\.)embedder\.embedder\.", r"\1stem.conv1."),
    *((rf"^(backbone\.bottom_up\.)encoder\.stages\.{i}\.layers\.", rf"\1res{i + 2}.") for i in range(4)),
    *((rf"^(backbone\.bottom_up\..*)layer\.{i}\.", rf"\1conv{i + 1}.") for i in range(3)),
    (r"^(backbone\.bottom_up\..*)\.convolution\.", r"\1."),
    (r"^(backbone\.bottom_up\..*)\.normalization\.", r"\1.norm."),
)

OURS = Source("deformable_detr")

_STANDARD = {"inverse_sigmoid_eps": 1e-5, "temperature": 1e4, "offset": -0.5}

OFFICIAL = Source(
    "official Deformable-DETR",
    settings=_STANDARD,
    rules=(
        (r"^backbone\.0\.body\.", BOTTOM_UP),
        *RESNET,
        (r"^input_proj\.", "backbone.input_proj."),
    ),
)

# Two-stage models with learned queries; all other files of that project have the official names exactly.
H_DEFORMABLE_DETR = replace(OFFICIAL, name="H-Deformable-DETR")

# A head and a projection for all, where ours are numbered.
_DETR_NAMES: tuple[Rule, ...] = (
    (r"^input_proj\.", "backbone.input_proj.0.0."),
    (r"^(class|bbox)_embed\.", r"\1_embed.0."),
)

DETR = Source(
    "official DETR",
    settings={"temperature": 1e4, "offset": 0.0},
    rules=((r"^backbone\.0\.body\.", BOTTOM_UP), *RESNET, *_DETR_NAMES),
)

# DETR's own code for Detectron2, its trainings and what its converter makes of the official files.
DETR_FOR_DETECTRON2 = Source(
    "official DETR for Detectron2",
    settings=DETR.settings,
    rules=((r"^detr\.", ""), (r"^backbone\.0\.backbone\.", BOTTOM_UP), *_DETR_NAMES),
    has_contiguous_classes=True,
)

# What DINO has beyond two-stage models, there and in detrex.
_DINO_NAMES: tuple[Rule, ...] = (
    (r"^transformer\.tgt_embed\.", "query_embed."),
    (r"^label_enc\.", "denoising.label_enc."),
)

DINO = Source(
    "DINO",
    rules=(
        # Swins have no "body".
        (r"^backbone\.0\.(body\.)?", BOTTOM_UP),
        *RESNET,
        (r"^input_proj\.", "backbone.input_proj."),
        # The encoder's heads follow those of the decoder layers.
        (r"^transformer\.enc_out_(class|bbox)_embed\.", r"\1_embed.+0."),
        *_DINO_NAMES,
    ),
    settings={"inverse_sigmoid_eps": 1e-3, "temperature": 20.0, "offset": 0.0},
)

# Version 5 renamed a few modules in memory (the optional parts below); its saved files keep the names of version 4.
_TRANSFORMERS_BACKBONE: tuple[Rule, ...] = (
    (r"^model\.backbone\.(conv_encoder\.)?model\.", BOTTOM_UP),
    *RESNET,
    *_TRANSFORMERS_RESNET,
)
_TRANSFORMERS_LAYERS: tuple[Rule, ...] = (
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
)

TRANSFORMERS = Source(
    "transformers",
    settings=_STANDARD,
    rules=(
        *_TRANSFORMERS_BACKBONE,
        (r"^model\.input_proj\.", "backbone.input_proj."),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^model\.(encoder|decoder|level_embed|reference_points|enc_output|pos_trans)", r"transformer.\1"),
        *_TRANSFORMERS_LAYERS,
        (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
        (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
        (r"\.encoder_attn\.", ".cross_attn."),
    ),
)

TRANSFORMERS_DETR = Source(
    "transformers DETR",
    settings=DETR.settings,
    rules=(
        *_TRANSFORMERS_BACKBONE,
        (r"^model\.input_projection\.", "input_proj."),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^class_labels_classifier\.", "class_embed."),
        (r"^bbox_predictor\.", "bbox_embed."),
        *_DETR_NAMES,
        (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
        (r"^(transformer\.decoder)\.layernorm\.", r"\1.norm."),
        *_TRANSFORMERS_LAYERS,
        (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
        (r"\.encoder_attn\.o_proj\.", ".multihead_attn.out_proj."),
        (r"\.encoder_attn\.", ".multihead_attn."),
    ),
)

# The names of mmcv's transformer layers, which detrex and mmdetection share.
_NECK_AND_LAYERS: tuple[Rule, ...] = (
    (r"^neck\.convs\.", "backbone.input_proj."),
    # After the levels from the backbone the coarser ones are counted from zero again.
    (r"^neck\.extra_convs\.", "backbone.input_proj.+"),
    (r"^(backbone\.input_proj\.\+?\d+)\.conv\.", r"\1.0."),
    (r"^(backbone\.input_proj\.\+?\d+)\.(norm|gn)\.", r"\1.1."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"^query_embedding\.", "query_embed."),
    (r"\.ffn(s\.0)?\.layers\.0\.0\.", ".linear1."),
    (r"\.ffn(s\.0)?\.layers\.1\.", ".linear2."),
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    # In the order of use, while the official numbers say cross-attention, self-attention, feed-forward.
    (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
)

DETREX = Source(
    "detrex",
    rules=((r"^backbone\.", BOTTOM_UP), *_NECK_AND_LAYERS, *_DINO_NAMES),
    has_contiguous_classes=True,
    settings={"inverse_sigmoid_eps": 1e-3},
    note="detrex clamps at 1e-3 in inverse_sigmoid, the official code and this one at 1e-5: where a reference box has "
    "a value below 0.001 or above 0.999, boxes differ from detrex' own (by up to 0.0027 of the image's side)",
    note_on_dino="detrex trained most of its DINO models with temperature 10000 and offset -0.5 in the position "
    "encoding, dino_r50_4scale_24ep with 20 and 0 like the official code: set POSITION_TEMPERATURE and POSITION_OFFSET "
    "to those of the file's training",
)

# Version 3; version 2 keeps the transformer in its head, under the names that detrex took over.
MMDETECTION = Source(
    "mmdetection",
    rules=(
        (r"^backbone\.", BOTTOM_UP),
        *RESNET,
        (r"^bbox_head\.(transformer|query_embedding)\.", r"\1."),
        (r"^(encoder\.|decoder\.|level_embed$)", r"transformer.\1"),
        (r"^reference_points_fc\.", "transformer.reference_points."),
        (r"^memory_trans_fc\.", "transformer.enc_output."),
        (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
        (r"^pos_trans_fc\.", "transformer.pos_trans."),
        (r"^pos_trans_norm\.", "transformer.pos_trans_norm."),
        (r"^bbox_head\.cls_branches\.", "class_embed."),
        (r"^dn_query_generator\.label_embedding\.", "denoising.label_enc."),
        *((rf"^bbox_head\.reg_branches\.(\d+)\.{2 * i}\.", rf"bbox_embed.\1.layers.{i}.") for i in range(3)),
        *_NECK_AND_LAYERS,
    ),
    has_contiguous_classes=True,
    zeros=r"^backbone\.input_proj\.\d+\.0\.bias$",
)

TORCHVISION = Source("torchvision ResNet", rules=((r"^", BOTTOM_UP), *RESNET), backbone_only=True)
# Of any architecture; find_backbone knows the prefixes.
DETECTRON2 = Source("Detectron2 backbone", backbone_only=True)

SOURCES = (
    OURS,
    OFFICIAL,
    H_DEFORMABLE_DETR,
    DINO,
    DETR,
    DETR_FOR_DETECTRON2,
    TRANSFORMERS,
    TRANSFORMERS_DETR,
    DETREX,
    MMDETECTION,
    TORCHVISION,
    DETECTRON2,
)


def count_on(names: Mapping[str, str]) -> dict[str, str]:
    """Replace numbers with a plus in renamed names by those that count on from what comes before.

    Levels count on from those of the backbone, heads from those of the decoder layers.

    Args:
        names: names in the file -> what :meth:`Source.rename` makes of them.
    """

    def count(pattern: str) -> int:
        return len({match[1] for name in names.values() if (match := re.match(pattern, name))})

    levels, layers = count(r"backbone\.input_proj\.(\d+)\."), count(r"transformer\.decoder\.layers\.(\d+)\.")

    def number(match: re.Match) -> str:
        first = levels if match[1] == "backbone.input_proj" else layers
        return f"{match[1]}.{first + int(match[2])}."

    return {key: re.sub(r"^(.*)\.\+(\d+)\.", number, name) for key, name in names.items()}


def detect_source(keys: Collection[str]) -> Source | None:
    """Tell by the names in a checkpoint which project's detector it holds; None where it is none that is known."""
    if any(key.startswith("transformer.enc_out_class_embed.") for key in keys):
        return DINO
    if any(key.startswith("backbone.0.body.") for key in keys):
        if "input_proj.weight" in keys:
            return DETR
        has_learned_content = "query_embed.weight" in keys and "transformer.enc_output.weight" in keys
        return H_DEFORMABLE_DETR if has_learned_content else OFFICIAL
    if "detr.input_proj.weight" in keys and any(key.startswith("detr.backbone.0.backbone.") for key in keys):
        return DETR_FOR_DETECTRON2
    if any(key.startswith("model.backbone.") for key in keys):
        return TRANSFORMERS_DETR if "model.input_projection.weight" in keys else TRANSFORMERS
    if any(key.startswith("bbox_head.cls_branches.") for key in keys):
        return MMDETECTION
    if any(key.startswith("neck.convs.") for key in keys):
        return DETREX
    marks = ("transformer.level_embed", DENSE_ATTENTION)
    if any(mark in keys for mark in marks) and any(key.startswith("backbone.input_proj.") for key in keys):
        return OURS
    return None
