import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deformable_detr.modeling import HungarianMatcher, SetCriterion, focal_loss
from deformable_detr.modeling.criterion import matching_errors
from deformable_detr.modeling.denoising import ContrastiveDenoising
from deformable_detr.modeling.focal_loss import matched_focal_loss


def target(labels, boxes):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}


def random_outputs(layers=3, images=2, queries=6, classes=4, cells=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    return {
        "pred_logits": rand(layers, images, queries, classes) * 4 - 2,
        "pred_boxes": rand(layers, images, queries, 4) * 0.4 + 0.3,
        "enc_logits": rand(images, cells, classes) * 4 - 2,
        "enc_boxes": rand(images, cells, 4) * 0.4 + 0.3,
    }


TARGETS = [target([1, 3], [[0.5, 0.5, 0.2, 0.3], [0.4, 0.6, 0.3, 0.1]]), target([2], [[0.3, 0.3, 0.2, 0.2]])]


def test_losses_equal_hand_computed_numbers():
    # Two queries, one class, one object: query 0 (p = 0.75) is near the object and matches, query 1 has p = 0.5.
    outputs = {
        "pred_logits": torch.tensor([[[[math.log(3.0)], [0.0]]]]),
        "pred_boxes": torch.tensor([[[[0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]]),
    }
    losses = SetCriterion(HungarianMatcher())(outputs, [target([0], [[0.5, 0.5, 0.2, 0.2]])])
    positive = 0.25 * 0.25**2 * -math.log(0.75)
    negative = 0.75 * 0.5**2 * -math.log(0.5)
    assert losses["loss_ce"].item() == pytest.approx(2 * (positive + negative), abs=1e-6)
    assert losses["loss_bbox"].item() == pytest.approx(5 * 0.1, abs=1e-6)
    assert losses["loss_giou"].item() == pytest.approx(2 * (1 - 1 / 3), abs=1e-5)


def test_every_layer_gets_the_losses_it_would_get_alone():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion({k: outputs[k] for k in ("pred_logits", "pred_boxes")}, TARGETS)
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_0", "_1")}
    for layer, suffix in enumerate(("_0", "_1", "")):
        alone = {k: outputs[k][layer : layer + 1] for k in ("pred_logits", "pred_boxes")}
        for name, value in criterion(alone, TARGETS).items():
            torch.testing.assert_close(losses[name + suffix], value)


def test_encoder_proposals_are_supervised_as_class_zero():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion(outputs, TARGETS)
    as_layer = {"pred_logits": outputs["enc_logits"][None], "pred_boxes": outputs["enc_boxes"][None]}
    agnostic = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in TARGETS]
    for name, value in criterion(as_layer, agnostic).items():
        torch.testing.assert_close(losses[f"{name}_enc"], value)


def denoising_outputs(targets, *, groups, layers=3):
    """Predictions of so many groups for targets, each group with those of the first."""
    size = 2 * max(len(t["labels"]) for t in targets)
    outputs = random_outputs(layers=layers, images=len(targets), queries=size, seed=1)
    return {f"dn_{kind}": outputs[f"pred_{kind}"].repeat(1, 1, groups, 1) for kind in ("logits", "boxes")}


def test_denoising_queries_are_supervised_with_the_objects_they_were_made_of():
    # Two pairs: positives 0 and 1, negatives 2 and 3. The second image has one object: its queries 1 and 3 are empty.
    outputs = random_outputs() | denoising_outputs(TARGETS, groups=1)
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion(outputs, TARGETS)
    assert set(losses) - set(criterion(random_outputs(), TARGETS)) == {
        f"loss_{n}_dn{s}" for n in ("ce", "bbox", "giou") for s in ("", "_0", "_1")
    }
    wanted = torch.zeros(2, 4, 4)
    wanted[0, 0, 1] = wanted[0, 1, 3] = wanted[1, 0, 2] = 1
    for layer, suffix in enumerate(("_dn_0", "_dn_1", "_dn")):
        focal = sigmoid_focal_loss(outputs["dn_logits"][layer], wanted, alpha=0.25, gamma=2.0, reduction="sum")
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], 2 * focal / 3)
        boxes = outputs["dn_boxes"][layer]
        l1 = (boxes[0, :2] - TARGETS[0]["boxes"]).abs().sum() + (boxes[1, 0] - TARGETS[1]["boxes"][0]).abs().sum()
        torch.testing.assert_close(losses[f"loss_bbox{suffix}"], 5 * l1 / 3)


def test_losses_of_denoising_are_means_over_the_groups():
    criterion = SetCriterion(HungarianMatcher())
    one, five = (criterion(random_outputs() | denoising_outputs(TARGETS, groups=groups), TARGETS) for groups in (1, 5))
    torch.testing.assert_close(one, five)


def test_one_to_many_queries_are_supervised_with_repeated_objects():
    many = {f"one2many_{kind}": random_outputs(queries=20, seed=2)[f"pred_{kind}"] for kind in ("logits", "boxes")}
    criterion = SetCriterion(HungarianMatcher(), one2many_repeat=3, one2many_weight=0.5)
    losses = criterion(random_outputs() | many, TARGETS)
    repeated = [{name: torch.cat([value] * 3) for name, value in t.items()} for t in TARGETS]
    expected = criterion({f"pred_{k}": many[f"one2many_{k}"] for k in ("logits", "boxes")}, repeated)
    for term in ("ce", "bbox", "giou"):
        for layer in ("", "_0", "_1"):
            torch.testing.assert_close(losses[f"loss_{term}_one2many{layer}"], 0.5 * expected[f"loss_{term}{layer}"])


def test_further_queries_change_no_loss_of_the_others():
    criterion = SetCriterion(HungarianMatcher())
    plain = criterion(random_outputs(), TARGETS)
    many = {f"one2many_{kind}": random_outputs(queries=20)[f"pred_{kind}"] for kind in ("logits", "boxes")}
    losses = criterion(random_outputs() | denoising_outputs(TARGETS, groups=2) | many, TARGETS)
    assert all(torch.equal(losses[name], value) for name, value in plain.items())


def test_without_auxiliary_losses_further_queries_are_supervised_in_the_last_layer_alone():
    outputs = random_outputs() | denoising_outputs(TARGETS, groups=2)
    losses = SetCriterion(HungarianMatcher(), aux_loss=False)(outputs, TARGETS)
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_enc", "_dn")}


def test_nothing_to_denoise_costs_nothing_and_keeps_the_names():
    nothing = {"dn_logits": torch.zeros(3, 2, 0, 4), "dn_boxes": torch.zeros(3, 2, 0, 4)}
    nothing = {name: value.requires_grad_() for name, value in nothing.items()}
    losses = SetCriterion(HungarianMatcher())(random_outputs() | nothing, [target([], [])] * 2)
    denoising = {name: loss for name, loss in losses.items() if "_dn" in name}
    assert len(denoising) == 9 and all(loss == 0 for loss in denoising.values())
    sum(denoising.values()).backward()
    assert all(value.grad is not None for value in nothing.values())


def test_normalisation_of_a_step_holds_for_further_queries_too():
    many = {f"one2many_{kind}": random_outputs(queries=20)[f"pred_{kind}"] for kind in ("logits", "boxes")}
    outputs = random_outputs() | denoising_outputs(TARGETS, groups=2) | many
    criterion = SetCriterion(HungarianMatcher())
    own = criterion(outputs, TARGETS)
    with criterion.normalise_by(12):
        torch.testing.assert_close(criterion(outputs, TARGETS), {name: loss / 4 for name, loss in own.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one2many_repeat": 0}, "one2many_repeat must be at least 1, got 0"),
        ({"one2many_weight": 0.0}, "one2many_weight must be positive and finite, got 0.0"),
    ],
)
def test_a_one_to_many_branch_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SetCriterion(HungarianMatcher(), **options)


def test_without_auxiliary_losses_the_encoder_is_still_trained():
    losses = SetCriterion(HungarianMatcher(), aux_loss=False)(random_outputs(), TARGETS)
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_enc")}


def test_losses_are_normalised_by_the_number_of_objects():
    outputs = random_outputs(layers=1, images=1)
    criterion = SetCriterion(HungarianMatcher())
    one = criterion(outputs, TARGETS[:1])
    doubled = {k: torch.cat((v, v), dim=0 if k.startswith("enc") else 1) for k, v in outputs.items()}
    two = criterion(doubled, TARGETS[:1] * 2)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_micro_batches_normalised_together_sum_to_the_losses_of_the_whole_batch():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    whole = criterion(outputs, TARGETS)
    with criterion.normalise_by(3):
        parts = [
            criterion({k: v[i : i + 1] if k.startswith("enc") else v[:, i : i + 1] for k, v in outputs.items()}, [t])
            for i, t in enumerate(TARGETS)
        ]
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_the_number_to_normalise_by_is_at_least_one_and_lasts_as_long_as_its_context():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    own = criterion(outputs, TARGETS)["loss_ce"]
    with criterion.normalise_by(6):
        with pytest.raises(RuntimeError), criterion.normalise_by(0):
            torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own * 3)
            raise RuntimeError("ends the inner context")
        torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own / 2)
    torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own)


def test_alone_the_objects_of_other_processes_do_not_count(monkeypatch):
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    own = criterion(outputs, TARGETS)["loss_ce"]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    # The other process has 9 objects, this one 3: 6 each.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.add_(9))
    torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own / 2)
    with pytest.raises(RuntimeError), criterion.alone():
        torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own)
        raise RuntimeError("ends the context")
    torch.testing.assert_close(criterion(outputs, TARGETS)["loss_ce"], own / 2)


@pytest.mark.parametrize("number", [-1, math.nan, math.inf])
def test_a_number_that_cannot_normalise_is_refused(number):
    with pytest.raises(ValueError, match=f"num_objects must be finite and at least 0, got {number}"):
        with SetCriterion(HungarianMatcher()).normalise_by(number):
            pass


def test_a_batch_without_objects_has_finite_losses_and_gradients_everywhere():
    outputs = {k: v.requires_grad_() for k, v in random_outputs().items()}
    losses = SetCriterion(HungarianMatcher())(outputs, [target([], [])] * 2)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_ce"] > 0
    assert all(v.grad is not None and v.grad.isfinite().all() for v in outputs.values())


def test_half_precision_predictions_give_float32_losses():
    outputs = {k: v.bfloat16() for k, v in random_outputs().items()}
    losses = SetCriterion(HungarianMatcher())(outputs, TARGETS)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


def test_focal_loss_without_focusing_is_half_the_binary_cross_entropy():
    outputs = random_outputs(layers=1)
    criterion = SetCriterion(HungarianMatcher(), focal_alpha=0.5, focal_gamma=0.0, class_weight=1.0)
    loss = criterion(outputs, TARGETS)["loss_ce"]
    logits = outputs["pred_logits"][0]
    one_hot = torch.zeros_like(logits)
    for image, (rows, columns) in enumerate(criterion.matcher(logits, outputs["pred_boxes"][0], TARGETS)):
        one_hot[image, rows, TARGETS[image]["labels"][columns]] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / 2 / 3
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_sparse_focal_loss_and_its_gradient_equal_the_dense_one(monkeypatch, gamma, chunk):
    monkeypatch.setattr(focal_loss, "LOGITS_AT_ONCE", chunk)
    torch.manual_seed(0)
    logits = (torch.randn(3, 40) * 6).requires_grad_()
    positives = torch.stack([torch.randperm(40)[:5] for _ in range(3)])
    weights = torch.tensor([1.0, -2.0, 0.5])
    ours = matched_focal_loss(logits, positives, alpha=0.3, gamma=gamma)
    (ours_grad,) = torch.autograd.grad(ours @ weights, logits)
    dense = torch.zeros_like(logits).scatter(1, positives, 1.0)
    theirs = sigmoid_focal_loss(logits, dense, alpha=0.3, gamma=gamma).sum(1)
    (theirs_grad,) = torch.autograd.grad(theirs @ weights, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-7)


def test_sparse_focal_loss_is_the_integral_of_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    positives = torch.tensor([[0, 4], [8, 2]])
    # The loss is computed in float32, so the differences must be large.
    torch.autograd.gradcheck(
        lambda x: matched_focal_loss(x, positives, alpha=0.25, gamma=2.0).double(), logits, eps=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_half_precision_logits_survive_a_loss_scale(dtype):
    logits = torch.full((1, 50), -6.0, dtype=dtype, requires_grad=True)
    loss = matched_focal_loss(logits, torch.empty(1, 0, dtype=torch.int64), alpha=0.25, gamma=2.0)
    (loss.sum() * 2**16).backward()
    p = 1 / (1 + math.exp(6.0))
    expected = 2**16 * 0.75 * p**2 * (p + 2 * (1 - p) * -math.log1p(-p))
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.float(), torch.full((1, 50), expected), rtol=1e-2, atol=0)


def test_large_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[-1e4, -60.0, 60.0, 1e4]], requires_grad=True)
    loss = matched_focal_loss(logits, torch.tensor([[0]]), alpha=0.25, gamma=2.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.25 * 1e4 + 0.75 * (60 + 1e4))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.0, 0.75, 0.75]]))


def peak_bytes(function):
    """Most memory that a function allocates on the CPU at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(live.cumsum(0).max())


def test_losses_of_many_proposals_need_little_more_memory_than_the_gradients():
    outputs = random_outputs(layers=1, images=1, cells=20_000, classes=91)
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    criterion = SetCriterion(HungarianMatcher())
    peak = peak_bytes(lambda: sum(criterion(outputs, TARGETS[:1]).values()).backward())
    logits = outputs["enc_logits"].numel() * 4
    assert logits < peak < 2 * logits


def test_class_and_cardinality_error_equal_hand_computed_numbers():
    # Image 0: queries 0 and 1 match objects of classes 2 and 0; query 0 has it right, query 1 says class 1. One query
    # is more likely than not something, of two objects. Image 1: two detections, no object.
    logits = torch.tensor([[[-3.0, -2, 4], [-3, -1, -2], [-5, -5, -5]], [[1.0, -1, -1], [-1, -1, 2], [-1, -2, -3]]])
    targets = [target([0, 2], [[0.5] * 4] * 2), target([], [])]
    none = torch.empty(0, dtype=torch.int64)
    matches = [(torch.tensor([0, 1]), torch.tensor([1, 0])), (none, none)]
    class_error, cardinality_error = matching_errors(logits, targets, matches).tolist()
    assert class_error == 50 and cardinality_error == (1 + 2) / 2
    assert matching_errors(logits[1:], targets[1:], matches[1:]).tolist() == [0, 2]


def test_errors_are_logged_in_training_alone_and_never_among_the_losses():
    outputs = random_outputs()
    criterion = SetCriterion(HungarianMatcher())
    without = criterion(outputs, TARGETS)
    with EventStorage() as storage:
        criterion.eval()(outputs, TARGETS)
        assert not storage.histories()
        losses = criterion.train()(outputs, TARGETS)
    assert set(storage.histories()) == {"class_error", "cardinality_error"}
    assert losses.keys() == without.keys()
    last = outputs["pred_logits"][-1]
    expected = matching_errors(last, TARGETS, criterion.matcher(last, outputs["pred_boxes"][-1], TARGETS))
    assert [storage.latest()[name][0] for name in ("class_error", "cardinality_error")] == expected.tolist()


def test_all_matchings_of_a_step_are_copied_from_the_device_at_once(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or cpu(self))
    SetCriterion(HungarianMatcher())(random_outputs(), TARGETS)
    # Every image has room for as many objects as the one that has most.
    layers, queries, cells, images, objects = 3, 6, 9, 2, 2
    assert copies == [(layers * queries + cells) * images * objects]


# What waits for a GPU: reading a number (item, bool, int), and results whose size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal"}


class _Operators(TorchDispatchMode):
    """Record the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_else_in_a_step_reads_from_the_device():
    outputs = {name: value.requires_grad_() for name, value in random_outputs().items()}
    with _Operators() as operators:
        sum(SetCriterion(HungarianMatcher())(outputs, TARGETS).values()).backward()
    assert "sigmoid" in operators.names
    assert not operators.names & WAITING


def test_further_queries_wait_for_the_device_no_second_time(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or cpu(self))
    denoising = ContrastiveDenoising(num_classes=4, embed_dim=8, dn_number=4)
    many = {f"one2many_{kind}": random_outputs(queries=20)[f"pred_{kind}"] for kind in ("logits", "boxes")}
    with _Operators() as operators:
        assert denoising(TARGETS).num_groups == 2
        outputs = random_outputs() | denoising_outputs(TARGETS, groups=2) | many
        SetCriterion(HungarianMatcher())(outputs, TARGETS)
    layers, queries, cells, one2many, images, objects = 3, 6, 9, 20, 2, 2
    assert copies == [(layers * queries + cells + layers * one2many) * images * objects]
    assert not operators.names & WAITING


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("pred_boxes", (1, 0), "image 0 in the batch .*decoder layer 1: pred_boxes has 4"),
        ("pred_logits", (2, 1), "image 1 in the batch .*decoder layer 2: pred_logits has 24"),
        ("enc_boxes", (1,), "image 1 in the batch .*the encoder's proposals: pred_boxes has 4"),
    ],
)
def test_the_layer_with_non_finite_predictions_is_named(name, index, message):
    outputs = random_outputs()
    bad = outputs[name][index]
    (bad if name == "pred_logits" else bad[3]).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=message):
        SetCriterion(HungarianMatcher())(outputs, TARGETS)


def test_more_objects_than_queries_have_finite_losses():
    torch.manual_seed(0)
    crowd = [target([1] * 9, (torch.rand(9, 4) * 0.4 + 0.3).tolist()), TARGETS[1]]
    losses = SetCriterion(HungarianMatcher())(random_outputs(queries=6, cells=7), crowd)
    assert all(value.isfinite() for value in losses.values())
