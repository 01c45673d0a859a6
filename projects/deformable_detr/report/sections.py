"""What a report shows, part by part: from a run's numbers to paragraphs, tables and figures."""

import math
import re
from collections.abc import Mapping
from dataclasses import astuple
from datetime import timedelta

import numpy as np

from ..detect.drawing import missing_letters
from ..training.metrics import series, training_seconds
from ..wording import counted
from . import figures
from .evaluation import IN_CROWD, Evaluation
from .gallery import draw_pair, evenly_spaced, group_coco_detections
from .page import Chart, Grid, Heading, Pair, Part, Table, Text, Verbatim
from .run import NoData, Run

# "loss_ce" of the last decoder layer, "loss_ce_0", "loss_ce_enc"; "loss_ce_dn", "loss_ce_dn_0" of further queries.
_TERM = re.compile(r"(?P<term>loss_[a-z_]*?[a-z](?P<queries>_dn|_one2many)?)(?:_(?P<layer>\d+|enc))?$")
_QUERIES = {"_dn": "denoising queries", "_one2many": "one-to-many queries"}
# "bbox/AP", with several test datasets "coco_2017_val/bbox/AP"; "AP-cat" for a category, "bbox_layer_0" for a layer.
_AP = re.compile(
    r"(?:(?P<dataset>.+)/)?bbox(?:_layer_(?P<layer>\d+))?/(?P<name>AP(?P<size>[sml])?(?:50|75)?|AP-(?P<category>.*))$"
)
_SIZES = {"s": "small (under 32² pixels)", "m": "medium (32² to 96² pixels)", "l": "large (over 96² pixels)"}
_TIMES = {"time": "iteration", "data_time": "waiting for data", "rank_data_time": "waiting for data, by process"}
_MEANINGS = {
    "loss_ce": "focal loss of the classes",
    "loss_bbox": "L1 distance of the boxes, as shares of the image",
    "loss_giou": "1 minus the generalised IoU of the boxes",
    "class_error": "% of the queries with an object whose best class is another one",
    "cardinality_error": "detections (a class above 0.5) that an image has more or less than objects, on average",
    "grad_norm": "norm of all gradients, before they are clipped",
    "skipped_steps": "steps left out until then, as a gradient was not finite",
}
_AP_MEANS = (
    "AP, in percent: precision (the share of detections that are right) averaged over recalls (the share of objects "
    "that are found) from 0 to 1, over the categories, and over the overlaps (IoU .50, .55, ..., .95) from which on a "
    "detection is right. AP50 and AP75 ask for one overlap."
)
# Small precision-recall curves, rows in the table of confusions.
_MAX_CLASSES, _MAX_CONFUSIONS = 20, 10
_PICTURE_SIDE = 640  # px of each picture of a pair


def metric_names(run: Run) -> list[str]:
    """All names in metrics.json, sorted."""
    return sorted({name for row in run.metrics.values() for name in row})


def summary(run: Run) -> list[Part]:
    """Return the run in a table of few lines: what, how much, and what that means."""
    rows = [("Progress", str(run.progress()), "one iteration is one step of the optimizer")]
    iterations, losses = series(run.metrics, "total_loss")
    if losses:
        rows.append(("Total loss", f"{losses[-1]:.3f} at iteration {iterations[-1]:,}", "weighted sum of all terms"))
    for name in metric_names(run):
        match = _AP.match(name)
        if match and match["name"] == "AP" and match["layer"] is None:
            where = f" on {match['dataset']}" if match["dataset"] else ""
            meaning = "percent, the higher the better: see Average precision"
            rows.append((f"Box AP{where}", _last_and_best(*series(run.metrics, name)), meaning))
    if seconds := training_seconds(run.metrics):
        rows.append(("Time of the iterations", str(timedelta(seconds=round(seconds))), "without evaluations"))
    if times := run.log_times():
        starts = run.log.count("Command line arguments:")
        text = f"{times[0]} to {times[1]}, {counted(starts, 'start')}"
        rows.append(("Log", text, "month/day and time of the training machine"))
    settings = {
        "Images per iteration": (run.setting("batch"), "on all devices together"),
        "Learning rate": (run.setting("lr"), "the highest of the schedule, for most of the layers"),
        "Started from": (run.setting("weights"), "initial weights"),
        "Trained on": (", ".join(run.dataset_names("train")), ""),
        "Evaluated on": (", ".join(run.dataset_names("test")), ""),
    }
    rows += [(label, str(value), meaning) for label, (value, meaning) in settings.items() if value]
    return [Table(rows), *_not_finite(run)]


def _last_and_best(iterations: list[int], values: list[float]) -> str:
    last = f"{values[-1]:.1f} at iteration {iterations[-1]:,}"
    if not (finite := [value for value in values if math.isfinite(value)]):
        return last
    # The first of equal ones, as the checkpoint of the best.
    best = max(finite)
    return f"{last}; best {best:.1f} at iteration {iterations[values.index(best)]:,}"


def _not_finite(run: Run) -> list[Part]:
    notes = []
    for name in metric_names(run):
        points = zip(*series(run.metrics, name), strict=True) if name == "total_loss" or _TERM.match(name) else ()
        bad = [iteration for iteration, value in points if not math.isfinite(value)]
        if bad:
            notes.append(Text(f"{name} is not finite in {len(bad)} lines, first at iteration {bad[0]:,}."))
    return notes


def _curves(run: Run, labels: Mapping[str, str], caption: str, *, alt: str, **style: str) -> Chart:
    return Chart(figures.curves(run.metrics, labels, **style), alt, caption)


def _meaning(name: str) -> str:
    queries = (match := _TERM.match(name)) and match["queries"]
    meaning = _MEANINGS.get(name.removesuffix(queries or ""))
    if meaning is None:
        return f"{name}, as it was logged."
    return f"{name}: {meaning}, of the {_QUERIES[queries]}." if queries else f"{name}: {meaning}."


def losses(run: Run) -> list[Part]:
    """Total loss, and the terms of the last decoder layer by kind of queries."""
    iterations, values = series(run.metrics, "total_loss")
    if not values:
        raise NoData("metrics.json holds no total_loss: no line of training has been written yet.")
    alt = f"Total loss from {values[0]:.3g} to {values[-1]:.3g} over {iterations[-1] + 1} iterations"
    drawn = [_curves(run, {"total_loss": "total"}, "Total loss: the weighted sum over all layers.", alt=alt)]
    terms = [match for name in metric_names(run) if (match := _TERM.match(name)) and match["layer"] is None]
    for queries in (None, *_QUERIES):
        names = [match["term"] for match in terms if match["queries"] == queries]
        if names:
            whose = f" for the {_QUERIES[queries]}" if queries else ""
            caption = " ".join([f"Terms of the last decoder layer{whose}, weighted.", *map(_meaning, names)])
            alt = f"{', '.join(names)} of the last decoder layer over the iterations"
            drawn.append(_curves(run, {name: name for name in names}, caption, alt=alt))
    return [Grid(drawn)]


def layers(run: Run) -> list[Part]:
    """Every loss term by decoder layer."""
    terms: dict[str, dict[str, str]] = {}
    for name in metric_names(run):
        if match := _TERM.match(name):
            terms.setdefault(match["term"], {})[match["layer"] or "last"] = name
    drawn = []
    for term, by_layer in terms.items():
        if len(by_layer) < 2:
            continue
        numbers = sorted(int(layer) for layer in by_layer if layer.isdigit())
        labels = {by_layer["enc"]: "encoder"} if "enc" in by_layer else {}
        labels |= {by_layer[str(number)]: f"decoder {number + 1}" for number in numbers}
        if "last" in by_layer:
            labels[by_layer["last"]] = f"decoder {len(numbers) + 1}"
        alt = f"{term} of {', '.join(labels.values())} over the iterations"
        drawn.append(_curves(run, labels, _meaning(term), alt=alt))
    if not drawn:
        raise NoData("Only the last decoder layer has losses: the model is trained without auxiliary losses.")
    text = "Every layer's predictions are trained alike; “encoder” are the proposals of two stages."
    return [Text(text), Grid(drawn)]


def schedule(run: Run) -> list[Part]:
    """Learning rate, times, memory, and whatever else was logged."""
    names = metric_names(run)
    drawn = []
    if "lr" in names:
        alt = f"Learning rate, at last {series(run.metrics, 'lr')[1][-1]:.2g}"
        drawn.append(_curves(run, {"lr": "lr"}, "Learning rate of most of the layers.", alt=alt))
    times = {name: label for name, label in _TIMES.items() if name in names}
    if times:
        last = ", ".join(f"{label} {series(run.metrics, name)[1][-1]:.3f} s" for name, label in times.items())
        alt = f"Seconds per iteration; at last: {last}"
        drawn.append(_curves(run, times, f"{alt}.", alt=alt, ylabel="seconds"))
    drawn_already = {"total_loss", "lr", "eta_seconds", *_TIMES}
    for name in names:
        if name not in drawn_already and not _TERM.match(name) and not _AP.match(name):
            alt = f"{name} over the iterations, at last {series(run.metrics, name)[1][-1]:.4g}"
            drawn.append(_curves(run, {name: name}, _meaning(name), alt=alt))
    note = "GPU memory is not in log.txt: Detectron2 writes it when it trains on a GPU."
    if memory := [int(found) for found in re.findall(r"max_mem: (\d+)M", run.log)]:
        note = f"Most GPU memory in use: {max(memory):,} MiB."
    return [Grid(drawn), Text(note)]


def average_precision(run: Run) -> list[Part]:
    """AP over the iterations: overall, by size of the objects, by decoder layer, by category."""
    by_dataset: dict[str, dict[str, re.Match]] = {}
    for name in metric_names(run):
        if match := _AP.match(name):
            by_dataset.setdefault(match["dataset"] or "", {})[name] = match
    if not by_dataset:
        raise NoData("No evaluation yet: metrics.json holds no bbox/AP.")
    parts: list[Part] = [Text(_AP_MEANS)]
    for dataset, matches in by_dataset.items():
        if dataset:
            parts.append(Heading(dataset))
        layers = {int(m["layer"]): n for n, m in matches.items() if m["layer"] and m["name"] == "AP"}
        final = {n: m for n, m in matches.items() if m["layer"] is None}
        overall = {n: m["name"] for n, m in final.items() if not m["size"] and m["category"] is None}
        sizes = {n: label for size, label in _SIZES.items() for n, m in final.items() if m["size"] == size}
        drawn = [
            *_ap_curves(run, overall, "AP on the test images (%)."),
            *_ap_curves(run, sizes, "AP by the size of objects (%)."),
            *_ap_curves(run, {layers[i]: f"decoder {i + 1}" for i in sorted(layers)}, "AP by decoder layer (%)."),
            *_categories(run, final),
        ]
        parts.append(Grid(drawn))
        without = [label for name, label in sizes.items() if not _has_finite(run, name)]
        if without:
            parts.append(Text(f"The test images have no object that is {', or '.join(without)}."))
    return parts


def _ap_curves(run: Run, labels: Mapping[str, str], caption: str) -> list[Part]:
    """One figure, or none where no value is a number."""
    finite = {name: label for name, label in labels.items() if _has_finite(run, name)}
    if not finite:
        return []
    last = ", ".join(f"{label} {series(run.metrics, name)[1][-1]:.1f}" for name, label in finite.items())
    text = f"{caption} At last: {last}"
    return [_curves(run, finite, f"{text}.", alt=text, ylabel="AP (%)", marker="o")]


def _has_finite(run: Run, name: str) -> bool:
    return any(math.isfinite(value) for value in series(run.metrics, name)[1])


def _categories(run: Run, matches: Mapping[str, re.Match]) -> list[Part]:
    points = {m["category"]: series(run.metrics, n)[1] for n, m in matches.items() if m["category"] is not None}
    last = {category: values[-1] for category, values in points.items() if math.isfinite(values[-1])}
    if points and not last:
        return [Text("No category has an AP at the last evaluation: none has an object in it.", missing=True)]
    if not last:
        # AP of rare categories, and by the size of objects: what the evaluators of LVIS and COCO alone write.
        of_lvis = any(f"{name}r" in metric_names(run) for name in matches)
        of_coco = any(match["size"] for match in matches.values())
        where = "for LVIS" if of_lvis else "for a single category" if of_coco else "for Pascal VOC"
        return [Text(f"AP per category is not in metrics.json: Detectron2 leaves it out {where}.", missing=True)]
    earlier = {category: values[-2] for category, values in points.items() if len(values) > 1}
    best, worst = max(last, key=last.get), min(last, key=last.get)
    alt = f"AP of {len(last)} categories, from {worst} ({last[worst]:.1f}) to {best} ({last[best]:.1f})"
    caption = "AP per category at the last evaluation; rings: at the one before."
    if absent := len(points) - len(last):
        caption += f" {absent} categories have no object in the test images."
    return [Chart(figures.bars(last, earlier), alt, caption)]


def precision_recall(evaluation: Evaluation) -> list[Part]:
    """Curves over all categories, and for those with the most objects."""
    result = evaluation.precision_recall()
    overall = result.curves()
    last = ", ".join(f"AP {100 * values.mean():.1f} at {label}" for label, values in overall.items())
    alt = f"Precision over recall, mean of all categories: {last}"
    caption = "Mean over the categories, by COCO's rules; all detections of an image count."
    counts, ap = evaluation.objects_per_class(), result.ap_per_class()
    present = [index for index in np.argsort(-counts, kind="stable") if not np.isnan(ap[index])]
    drawn = []
    for index in present[:_MAX_CLASSES]:
        curves = result.curves(index)
        at_50, at_75, _ = (100 * values.mean() for values in curves.values())
        name = evaluation.class_names[index]
        caption_of_one = (
            f"{name}: AP {ap[index]:.1f} ({at_50:.1f} at IoU .50, {at_75:.1f} at .75), {counts[index]:,} objects"
        )
        shown = figures.precision_recall(result.recall, curves, small=True)
        drawn.append(Chart(shown, f"Precision over recall of {caption_of_one}", caption_of_one))
    most = f"The {_MAX_CLASSES} categories with the most objects, of {len(present)}"
    few = most if len(present) > len(drawn) else "By category"
    text = f"{few}, in the colours of the figure above. The area under a curve is its AP."
    mean = Chart(figures.precision_recall(result.recall, overall), alt, caption)
    return [Grid([mean]), Text(text), Grid(drawn, small=True)]


def best_scores(evaluation: Evaluation) -> list[Part]:
    """From which score on detections are worth showing."""
    overall, by_class = evaluation.best_scores()
    if overall is None:
        raise NoData("No detection of the last evaluation is right, whatever its score.")
    text = (
        "Show detections from this score on, and F1 is at its best: 2 · right / (shown + objects), 1 where all objects "
        "are found and nothing else. Right: an IoU of at least 0.5 with an object of the category that no surer "
        "detection has. Precision: the share of shown detections that are right; recall: the share of objects found. "
        f"“python -m deformable_detr.detect --score best” takes {overall.score:.2f}, that of all categories together."
    )
    counts = evaluation.objects_per_class()
    named = [("all together", counts.sum(), overall)]
    named += [(evaluation.class_names[index], counts[index], by_class[index]) for index in np.flatnonzero(counts)]
    rows = [(name, int(n), *(astuple(best) if best else ("never right", 0.0, 0.0, 0.0))) for name, n, best in named]
    return [Text(text), Table(rows, ("category", "objects", "best score", "F1", "precision", "recall"))]


def confusion(evaluation: Evaluation, score: float) -> list[Part]:
    """Which category is taken for which."""
    counts = evaluation.matches.confusion(score)
    used = np.flatnonzero((counts.sum(axis=0) + counts.sum(axis=1))[:-1])
    if not len(used):
        raise NoData(f"There is no object, and no detection with a score from {score:g}.")
    index = [*used, len(counts) - 1]
    names = [evaluation.class_names[i] for i in used]
    right, total = np.trace(counts), counts[:-1].sum()
    text = (
        f"Detections with a score from {score:g}, the surest first, each given the free object that it overlaps most, "
        "with an IoU of at least 0.5, whatever its category. Rows are what is there, the last one the background; "
        "columns what was detected, the last one objects that were missed. Shades: share of the row."
    )
    alt = f"Confusion of {len(names)} categories: {right} of {total} objects detected as what they are"
    shown = figures.confusion(counts[np.ix_(index, index)], [*names, "background"], [*names, "missed"])
    parts = [Text(text), Chart(shown, alt, f"{alt}.")]
    wrong = counts.copy()
    wrong[-1] = wrong[:, -1] = 0
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(cell), len(counts)) for cell in order if wrong.flat[cell]]
    if pairs:
        rows = [(evaluation.class_names[i], evaluation.class_names[j], int(wrong[i, j])) for i, j in pairs]
        parts.append(Table(rows, ("is", "detected as", "times")))
    return parts


def scores(evaluation: Evaluation, score: float) -> list[Part]:
    """How sure the right and the wrong detections are."""
    matches = evaluation.matches
    counts = matches.matched != IN_CROWD
    values, correct = matches.scores[counts], matches.is_correct()[counts]
    if not len(values):
        raise NoData("The last evaluation detected nothing at all outside of crowd regions.")
    share = f"{correct[values >= score].mean():.0%}" if (values >= score).any() else "none"
    alt = f"Scores of {len(values):,} detections; of those from {score:g} (dotted), {share} are right"
    caption = "Share of right detections by score. On the dotted line a score is a probability."
    drawn = [
        Chart(figures.scores(values, correct, score), alt, f"{alt}."),
        Chart(figures.calibration(values, correct), "Share of right detections by score, in tenths", caption),
    ]
    text = (
        "Right: with an IoU of at least 0.5 on an object of its category, alone. Those in crowd regions do not count."
    )
    return [Text(text), Grid(drawn)]


def most_wrong(evaluation: Evaluation, score: float, num_images: int) -> list[Part]:
    """Return the images with the most errors, drawn."""
    missed, false = evaluation.matches.errors(score)
    order = np.argsort(-(missed + false), kind="stable")[:num_images]
    chosen = [index for index in order if missed[index] + false[index]]
    text = (
        f"Most errors first. Errors are objects without a detection of their category (IoU from 0.5, score from "
        f"{score:g}), and such detections without an object of theirs; one with a wrong category counts as both. "
        f"{int(((missed + false) == 0).sum()):,} of {len(missed):,} images have none."
    )
    captions = [f"{missed[index]} missed, {false[index]} false" for index in chosen]
    return [Text(text), Grid(_pairs(evaluation, [evaluation.dicts[index] for index in chosen], captions, score))]


def examples(evaluation: Evaluation, score: float, num_images: int) -> list[Part]:
    """Images as they come."""
    if not evaluation.dicts:
        raise NoData(f"The dataset {evaluation.name} has no image.")
    chosen = evenly_spaced(evaluation.dicts, num_images)
    source = evaluation.metadata.json_file
    text = f"{len(chosen)} of {len(evaluation.dicts):,} images of {source}, evenly spaced; scores from {score:g}."
    if unknown := missing_letters(evaluation.class_names):
        text += (
            f" In place of the letters {unknown} pictures show boxes: no font on the machine of the report has them."
        )
    return [Text(text), Grid(_pairs(evaluation, chosen, [""] * len(chosen), score))]


def _pairs(evaluation: Evaluation, images: list[dict], captions: list[str], score: float) -> list[Part]:
    """Ground truth and detections of images; a sentence in place of one that cannot be read."""
    predictions = group_coco_detections(evaluation.detections, images, evaluation.metadata)
    drawn: list[Part] = []
    for image, caption in zip(images, captions, strict=True):
        name = image["file_name"].rpartition("/")[2]
        found = predictions[image["image_id"]]
        try:
            pictures = draw_pair(image, evaluation.metadata, found, score_threshold=score, side=_PICTURE_SIDE)
        except OSError as error:
            drawn.append(Text(f"{name} cannot be read: {error}", missing=True))
        else:
            drawn.append(Pair(pictures, f"{name}: {caption}" if caption else name))
    return drawn


def inference_speed(run: Run) -> list[Part]:
    """Return what log.txt has about the time of an evaluation."""
    found = re.findall(
        r"Total inference (pure compute )?time: \S+(?: days?, \S+)? \(([\d.]+) s / iter per device", run.log
    )
    latest = {kind: float(seconds) for kind, seconds in found}
    note = "The slowest images are not known: Detectron2 records no time for single images, only their mean."
    if not latest:
        raise NoData(f"{note} log.txt has none yet.")
    labels = {"": "with loading the image and post-processing", "pure compute ": "in the model alone"}
    rows = [(labels[kind], f"{1000 * seconds:.1f} ms") for kind, seconds in latest.items()]
    return [Table(rows), Text(f"Mean time of a batch in the last evaluation. {note}")]


def environment(run: Run) -> list[Part]:
    """Return configuration and versions."""
    parts: list[Part] = []
    path = run.folder / "config.yaml"
    if path.is_file():
        parts.append(Verbatim("config.yaml", path.read_text(encoding="utf-8", errors="replace")))
    else:
        parts.append(Text(f"There is no {path}, in which train_net.py leaves the configuration.", missing=True))
    commands = re.findall(r"Command line arguments: (Namespace\(.*\))", run.log)
    if commands:
        parts.append(Verbatim(f"Command lines ({len(commands)})", "\n\n".join(commands)))
    try:
        parts.append(Verbatim("Versions", run.environment()))
    except NoData as reason:
        parts.append(Text(str(reason), missing=True))
    return parts
