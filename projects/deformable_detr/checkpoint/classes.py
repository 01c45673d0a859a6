"""Which row of a class head belongs to which class: by names, so that a model of other classes keeps what it can."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..wording import name_first
from .coverage import ConversionReport
from .sources import Source

ENCODER_OUTPUT = "transformer.enc_output.weight"
LABEL_EMBEDDING = "denoising.label_enc.weight"
HEAD = re.compile(r"^(?P<kind>class_embed|bbox_embed)\.(?P<index>\d+)\.(?P<rest>.+)$")

# The 91 outputs of the official models are raw COCO category ids; None names no category.
COCO_CLASSES_BY_ID: tuple[str | None, ...] = tuple(
    None if name == "-" else name
    for name in (
        "-, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, "
        "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, "
        "backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
        "baseball glove, skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, "
        "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, "
        "bed, -, dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
        "toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
    ).split(", ")
)
# The contiguous order of Detectron2's built-in COCO datasets.
COCO_CLASSES = tuple(name for name in COCO_CLASSES_BY_ID if name is not None)

Names = Sequence[str | None]
_MAX_LISTED = 20


def fit_class_heads(
    tensors: dict[str, Tensor],
    target: Mapping[str, Tensor],
    report: ConversionReport,
    *,
    source: Source,
    file_classes: Names | None,
    model_classes: Names | None,
    multiclass_proposals: bool = False,
    background: int = 0,
) -> None:
    """Put the rows of every class head of a checkpoint where the model has the class of that name.

    The embeddings of the classes that denoising queries start from are treated like another head.

    Args:
        tensors: the checkpoint by our names; changed.
        target: the model's parameters.
        report: is told what happened.
        file_classes: names of the checkpoint's rows; None where it does not say.
        model_classes: names of the model's rows; None where they are not known.
        multiclass_proposals: whether the encoder's head has the classes of the others; else its rows keep their places.
        background: how many of the last rows are of no class.
    """
    for key in [key for key in tensors if key.startswith(("class_embed.", LABEL_EMBEDDING)) and key in target]:
        tensor, initial = tensors[key], target[key].detach()
        if tensor.dim() != initial.dim() or tensor.shape[1:] != initial.shape[1:]:
            continue  # reported later, as a model of another width
        if is_encoder_head(key, target) and not multiclass_proposals:
            _fit_encoder_head(key, tensors, initial, report)
            continue
        rows, wanted = len(tensor) - background, len(initial) - background
        tensors[key] = tensor[:rows]
        names = _resolve_names(rows, wanted, source, file_classes, model_classes)
        _fit_head(key, tensors, initial[:wanted], report, *names)
        if background and key in tensors:
            tensors[key] = torch.cat([tensors[key], tensor[rows:]])


def _fit_head(
    key: str,
    tensors: dict[str, Tensor],
    initial: Tensor,
    report: ConversionReport,
    theirs: Names | None,
    ours: Names | None,
) -> None:
    """Fit the rows of one head, of which all are of classes."""
    rows, wanted = len(tensors[key]), len(initial)
    report.class_names = ours or (theirs if rows == wanted else None)
    if theirs is not None and ours is not None:
        _take_rows_by_name(key, tensors, initial, theirs=theirs, ours=ours, report=report)
    elif rows != wanted:
        reason = f"{rows} classes in the file, {wanted} in the model: which row is which is not known"
        _drop(key, tensors, report, reason)
        named = f" ({name_first([name for name in theirs if name])})" if theirs else ""
        report.mismatch = (
            f"The file has {rows} classes{named}, the configuration {wanted}: set "
            "MODEL.DEFORMABLE_DETR.NUM_CLASSES (model.num_classes), or --train-json, which finds classes by name"
        )
    elif ours is not None:
        report.class_note = f"The file does not name its {rows} classes; their order is taken to be the model's"


def cut_label_embeddings(tensors: dict[str, Tensor], report: ConversionReport) -> None:
    """Leave the rows of the classes; DINO's table has more, of which none is ever used.

    Args:
        tensors: the checkpoint by our names; changed.
        report: is told what happened.
    """
    table, classes = tensors.get(LABEL_EMBEDDING), tensors.get("class_embed.0.bias")
    if table is not None and classes is not None and classes.dim() == 1 and table.dim() == 2:
        if (unused := len(table) - len(classes)) > 0:
            tensors[LABEL_EMBEDDING] = table[: len(classes)]
            report.mapped[LABEL_EMBEDDING] = f"without its last {unused} of {len(table)} rows, which are of no class"


def match_rows(names: Names, file_names: Names) -> list[int | None]:
    """Return for every name the row of the same name; case, spaces, "_" and "-" do not count."""
    exact = {name: row for row, name in enumerate(file_names) if name is not None}
    loose = {_normalize(name): row for name, row in exact.items()}
    return [None if name is None else exact.get(name, loose.get(_normalize(name))) for name in names]


def is_encoder_head(key: str, target: Mapping[str, Tensor]) -> bool:
    """Whether ``key`` belongs to the head that scores proposals: the last one of a two-stage model."""
    if ENCODER_OUTPUT not in target:
        return False
    last = max(int(match["index"]) for name in target if (match := HEAD.match(name)))
    return key.split(".")[1] == str(last)


def _normalize(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _resolve_names(
    rows: int, wanted: int, source: Source, file_classes: Names | None, model_classes: Names | None
) -> tuple[Names | None, Names | None]:
    """Return the names of the file's and of the model's rows, COCO's where their numbers say so; None if unknown."""
    theirs = tuple(file_classes) if file_classes is not None and len(file_classes) == rows else None
    ours = tuple(model_classes) if model_classes is not None else None
    if theirs is None and rows == len(COCO_CLASSES_BY_ID):
        theirs = COCO_CLASSES_BY_ID
    if theirs is None and rows == len(COCO_CLASSES) and source.has_contiguous_classes:
        theirs = COCO_CLASSES
    if ours is None and theirs is not None and rows != wanted:
        by_number = {len(names): names for names in (COCO_CLASSES, COCO_CLASSES_BY_ID)}
        ours = by_number.get(wanted)
    return theirs, ours


def _fit_encoder_head(key: str, tensors: dict[str, Tensor], initial: Tensor, report: ConversionReport) -> None:
    """Keep the positions: channel 0 of this head means "object", and taking the rows by class would lose it."""
    rows, wanted = len(tensors[key]), len(initial)
    if rows != wanted:
        tensors[key] = torch.cat([tensors[key][:wanted], initial[rows:].to(tensors[key])])
        report.mapped[key] = f"encoder head: rows keep their positions, {rows} -> {wanted}"


def _take_rows_by_name(
    key: str, tensors: dict[str, Tensor], initial: Tensor, *, theirs: Names, ours: Names, report: ConversionReport
) -> None:
    """Take the rows of the model's classes; those the file does not have keep the model's initial values."""
    rows = match_rows(ours, theirs)
    if theirs == ours or rows == list(range(len(theirs))):
        return
    taken = {position: row for position, row in enumerate(rows) if row is not None}
    report.class_note = _describe_rows(ours, theirs, taken)
    if not taken:
        _drop(key, tensors, report, f"none of the file's {len(theirs)} classes has a name of the model's")
        return
    fitted = initial.clone().to(tensors[key])
    fitted[list(taken)] = tensors[key][list(taken.values())]
    report.mapped[key] = f"rows of {len(taken)} of the model's {len(ours)} classes, by name out of {len(theirs)}"
    tensors[key] = fitted


def _describe_rows(ours: Names, theirs: Names, taken: Mapping[int, int]) -> str:
    by_name = [f"{ours[position]} <- row {row} ({theirs[row]})" for position, row in taken.items()]
    fresh = [str(name) for position, name in enumerate(ours) if name is not None and position not in taken]
    return (
        f"Classes that continue from the file's row of that name: {name_first(by_name, limit=_MAX_LISTED)}\n"
        f"Classes that start from their initialisation: {name_first(fresh, limit=_MAX_LISTED)}"
    )


def _drop(key: str, tensors: dict[str, Tensor], report: ConversionReport, reason: str) -> None:
    del tensors[key]
    report.dropped.update(dict.fromkeys(report.used.pop(key), reason))
    report.missing[key] = f"initialised: {reason}"
