"""Other projects' weights -> ours: renames, then class rows, then a check that nothing was lost on the way."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..wording import name_first
from .backbones import find_absent_parts, find_backbone, fit_position_tables
from .classes import ENCODER_OUTPUT, HEAD, Names, cut_label_embeddings, fit_class_heads, is_encoder_head
from .coverage import COUNTER, TRAINING_ONLY, CheckpointError, ConversionReport
from .sources import BOTTOM_UP, DENSE_ATTENTION, SOURCES, TORCHVISION, Source, count_on, detect_source
from .variants import (
    LEVEL_EMBED,
    QUERIES,
    compare_variants,
    count_background,
    has_multiclass_proposals,
    note_differences,
)

_HEAD_ALIAS = re.compile(r"^transformer\.decoder\.((?:class|bbox)_embed\.)")
_QKV = re.compile(r"^(?P<stem>.*\.(?:self|multihead)_attn)\.(?P<letter>[qkv])_proj\.(?P<rest>weight|bias)$")
# Also in DETR's code for Detectron2, where all names begin with "detr.".
_MASKS = re.compile(r"^(detr\.)?(mask_head|bbox_attention)\.")
_CLASS_HEADS_OF_DETR = ("class_embed.weight", "detr.class_embed.weight", "class_labels_classifier.weight")
# 250 ids and "no object".
_PANOPTIC_OUTPUTS = 251
_BOOKKEEPING = {
    re.compile(r"(^|\.)total_(params|ops)$"): "a counter of the profiler thop, not a weight",
    re.compile(r"^criterion\.empty_weight$"): "weights of DETR's loss, which the configuration gives",
    re.compile(r"\.num_batches_tracked$"): "a counter of batch norm, not used at inference",
}


def convert(
    state_dict: Mapping[str, Any],
    *,
    model: nn.Module,
    class_names: Names | None = None,
    file_class_names: Names | None = None,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename a checkpoint's parameters to ours and fit its classes to the model's.

    Known are the names of the official repositories of DETR (also for Detectron2), Deformable DETR, H-Deformable-DETR
    and DINO, of transformers 4.x and 5.x, of detrex and mmdetection, of torchvision's and Detectron2's ImageNet
    backbones, and our own. The class heads of a model with other classes are treated so:

    - Where the classes of both are known, every class of the model takes the row of its name, whatever its position;
      the others keep the rows that the model was initialised with. 91 rows are known as raw COCO category ids, and a
      model of 80 outputs whose classes are not given is taken to have the 80 COCO categories, in the order of
      Detectron2's built-in datasets.
    - The encoder's head of a two-stage model scores proposals by channel 0, whatever the classes are; its rows keep
      their positions. DINO's has a row for every class, and so have the embeddings that its denoising starts from:
      they follow the names.
    - DETR's last row, "no object", is nobody's class and stays the last.
    - Where the classes are not known, as many rows are kept in their order; of any other number, the model keeps
      its own. The report says so.

    Args:
        state_dict: name -> tensor or numpy array. It is left as it is.
        model: the model that shall load the result. It is left as it is.
        class_names: of the model's classes, such as ``thing_classes`` of its dataset; None where they are not known.
        file_class_names: of the checkpoint's classes, where the caller knows them.

    Returns:
        The parameters to load, by our names (those in ``report.missing`` are left out), and the report.

    Raises:
        ValueError: if ``class_names`` are not as many as the model's outputs.
        CheckpointError: if the names are of no known kind, if the file is a DETR for panoptic segmentation, or if the
            backbone or the transformer are not covered completely. A pretrained backbone need not cover more than the
            backbone.
    """
    target = model.state_dict(keep_vars=True)
    background = count_background(model)
    # A backbone alone has none.
    outputs = len(target.get("class_embed.0.bias", ())) - background
    if class_names is not None and len(class_names) != outputs:
        raise ValueError(f"{len(class_names)} class_names for {outputs} class outputs")
    tensors = _as_tensors(state_dict)
    _refuse_panoptic(tensors)
    source = detect_source(tensors) or find_backbone(tensors, target)
    if source is None and "layer1.0.conv1.weight" in tensors:
        # The backbone is none; saying what it lacks tells more than that nothing fits.
        source = TORCHVISION
    if source is None:
        known = ", ".join(known.name for known in SOURCES)
        raise CheckpointError(
            f"The parameter names of this checkpoint are of no known kind ({known}); "
            f"it has {len(tensors)} of them: {name_first(sorted(tensors))}"
        )
    report = ConversionReport(source.name)
    tensors = _rename(tensors, source, report)
    report.note = note_differences(source, tensors, model)
    _join_query_key_value(tensors, report)
    _spread_shared_heads(tensors, target, report)
    _fill_in_zeros(tensors, target, source, report)
    fit_position_tables(tensors, target, report)
    _fit_queries(tensors, target, report, one2many=getattr(model, "num_one2many_queries", 0))
    cut_label_embeddings(tensors, report)
    fit_class_heads(
        tensors,
        target,
        report,
        source=source,
        file_classes=file_class_names,
        model_classes=class_names,
        multiclass_proposals=has_multiclass_proposals(model),
        background=background,
    )
    _drop_what_has_no_place(tensors, target, source, report)
    _note_what_is_missing(tensors, target, source, report)
    _raise_unless_covered(tensors, model, source, report)
    return tensors, report


def _as_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a plain dict of tensors without the prefix that DistributedDataParallel adds.

    Plain, because the metadata of a torchvision state dict makes Detectron2's FrozenBatchNorm2d subtract eps from
    the running variances.
    """
    tensors = {}
    wrapped = bool(state_dict) and all(key.startswith("module.") for key in state_dict)
    for key, value in state_dict.items():
        try:
            tensors[key.removeprefix("module.") if wrapped else key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{key} is a {type(value).__name__}, not a tensor") from error
    return tensors


def _refuse_panoptic(tensors: Mapping[str, Tensor]) -> None:
    """Say of DETR's files for panoptic segmentation what they are: their names alone would be of no known kind."""
    outputs = [len(tensors[key]) for key in _CLASS_HEADS_OF_DETR if key in tensors]
    if _PANOPTIC_OUTPUTS in outputs or any(_MASKS.match(key) for key in tensors):
        raise CheckpointError(
            "This is a DETR for panoptic segmentation, with masks or with the 250 ids of things and stuff: it is no "
            "detector of objects. Take one of the files for detection, such as detr-r50-e632da11.pth"
        )


def _rename(tensors: Mapping[str, Tensor], source: Source, report: ConversionReport) -> dict[str, Tensor]:
    """Apply the source's renames. The decoder's aliases of the heads count where the heads themselves are absent."""
    renamed: dict[str, Tensor] = {}
    aliases = {}
    names = count_on({key: source.rename(key) for key in tensors})
    for key, tensor in tensors.items():
        name = names[key]
        if _HEAD_ALIAS.match(name):
            aliases[key] = _HEAD_ALIAS.sub(r"\1", name)
            continue
        renamed[name] = tensor
        report.used[name] = (key,)
    for key, name in aliases.items():
        if name in renamed:
            report.dropped[key] = "a second name of the same head"
        else:
            renamed[name] = tensors[key]
            report.used[name] = (key,)
    return renamed


def _join_query_key_value(tensors: dict[str, Tensor], report: ConversionReport) -> None:
    """Concatenates separate query, key and value projections into nn.MultiheadAttention's ``in_proj_*``."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        if match := _QKV.match(key):
            groups[f"{match['stem']}.in_proj_{match['rest']}"][match["letter"]] = key
    for name, parts in groups.items():
        if set(parts) != set("qkv"):
            continue  # the incomplete ones stay as they are, and are reported as having no place
        keys = [parts[letter] for letter in "qkv"]
        tensors[name] = torch.cat([tensors.pop(key) for key in keys])
        report.used[name] = tuple(original for key in keys for original in report.used.pop(key))
        report.mapped[name] = "query, key and value projections joined"


def _spread_shared_heads(tensors: dict[str, Tensor], target: Mapping[str, Tensor], report: ConversionReport) -> None:
    """Give every decoder layer its head where the file holds one for all (saved files leave out the copies)."""
    for kind in ("class_embed", "bbox_embed"):
        if any(key.startswith(f"{kind}.1.") for key in tensors):
            continue
        for key in target:
            match = HEAD.match(key)
            if match is None or match["kind"] != kind or key in tensors or is_encoder_head(key, target):
                continue
            first = f"{kind}.0.{match['rest']}"
            if first in tensors:
                tensors[key] = tensors[first]
                report.used[key] = report.used[first]
                report.mapped[key] = "the file's one head for all decoder layers"


def _fill_in_zeros(
    tensors: dict[str, Tensor], target: Mapping[str, Tensor], source: Source, report: ConversionReport
) -> None:
    """Add the parameters that the other project does without because they would be 0."""
    for key, parameter in target.items():
        if source.zeros and key not in tensors and re.search(source.zeros, key):
            tensors[key] = torch.zeros_like(parameter.detach(), device="cpu")
            report.mapped[key] = f"0: {source.name} has no such parameter"


def _fit_queries(
    tensors: dict[str, Tensor], target: Mapping[str, Tensor], report: ConversionReport, *, one2many: int
) -> None:
    """Fit learned contents to another number of queries, where each belongs to a rank of the proposals.

    Those behind the model's queries are of a one-to-many branch, which only trains, or of worse ranks.

    Args:
        one2many: how many of the model's contents, the last ones, only train.
    """
    if QUERIES not in tensors or QUERIES not in target or ENCODER_OUTPUT not in target:
        return
    theirs, initial = tensors[QUERIES], target[QUERIES].detach()
    if theirs.dim() != 2 or theirs.shape[1] != initial.shape[1] or len(theirs) == len(initial):
        return
    if one2many == 0 and len(theirs) > len(initial):
        tensors[QUERIES] = theirs[: len(initial)]
        report.mapped[QUERIES] = f"the contents of the best {len(initial)} of {len(theirs)} ranks"
    elif len(theirs) == len(initial) - one2many:
        tensors[QUERIES] = torch.cat([theirs, initial[len(theirs) :].to(theirs)])
        report.mapped[QUERIES] = f"with {one2many} more as initialised, of one-to-many queries, which only train"


def _drop_what_has_no_place(
    tensors: dict[str, Tensor], target: Mapping[str, Tensor], source: Source, report: ConversionReport
) -> None:
    """Remove what may be absent from the model without loss. What remains without a place is an error later."""
    for key in [key for key in tensors if key not in target]:
        reason = next((reason for pattern, reason in _BOOKKEEPING.items() if pattern.search(key)), None)
        if reason is None and source.backbone_only:
            reason = "the model has no such parameter"
        if reason is None and key.startswith(TRAINING_ONLY):
            reason = "only trains, and the model has no denoising queries"
        if reason is not None:
            del tensors[key]
            report.mapped.pop(key, None)
            report.dropped.update(dict.fromkeys(report.used.pop(key), reason))


def _note_what_is_missing(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], source: Source, report: ConversionReport
) -> None:
    """Record what the model keeps as it is, where that is to be expected."""
    if source.backbone_only:
        report.missing |= dict.fromkeys(find_absent_parts(target, tensors), "initialised: not in the file's backbone")
    for key in target:
        if key in tensors or key in report.missing:
            continue
        if source.backbone_only and not key.startswith(BOTTOM_UP):
            report.missing[key] = "initialised: not part of a pretrained backbone"
        elif key.startswith(TRAINING_ONLY):
            report.missing[key] = "initialised: only trains, and the file is of a model without denoising queries"
        elif key.endswith(COUNTER):
            report.missing[key] = "initialised: a counter of batch norm"


def _raise_unless_covered(
    tensors: Mapping[str, Tensor], model: nn.Module, source: Source, report: ConversionReport
) -> None:
    target = model.state_dict(keep_vars=True)
    missing = [key for key in target if key not in tensors and key not in report.missing]
    misshaped = [
        f"{key} is {tuple(tensor.shape)} in the file and {tuple(target[key].shape)} in the model"
        for key, tensor in tensors.items()
        if key in target and tensor.shape != target[key].shape
    ]
    unplaced = [_with_origin(key, report.used[key]) for key in tensors if key not in target]
    counts = {
        "missing in the file": missing,
        "of another shape": misshaped,
        "without a place in the model": unplaced,
        "different in the file but one parameter in the model": _conflicts_in_shared_parameters(tensors, target),
    }
    problems = [f"{len(keys)} {what}: {name_first(keys)}" for what, keys in counts.items() if keys]
    holds_detector = LEVEL_EMBED in tensors or DENSE_ATTENTION in tensors
    variant = compare_variants(tensors, target, source=source, model=model) if holds_detector else ""
    if problems or variant:
        raise CheckpointError(
            f"The checkpoint ({report.source} names) does not fit the model. {variant}"
            + "; ".join(f"Parameters {problem}" for problem in problems)
        )


def _with_origin(key: str, originals: tuple[str, ...]) -> str:
    return key if originals == (key,) else f"{key} ({', '.join(originals)})"


def _conflicts_in_shared_parameters(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters that the model shares (one head for all layers) while the file's differ."""
    first_name: dict[int, str] = {}
    conflicts = []
    for key, parameter in target.items():
        first = first_name.setdefault(id(parameter), key)
        if first in tensors and key in tensors and not torch.equal(tensors[first], tensors[key]):
            conflicts.append(key)
    return conflicts
