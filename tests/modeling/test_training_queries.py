"""Denoising and one-to-many queries in the model: what they see, and who sees them."""

import pytest
import torch

from deformable_detr.modeling import ContrastiveDenoising, DeformableDETR

TWO_STAGE = {"with_box_refine": True, "two_stage": True}
PAIRS = 4
BRANCHES = {"denoising": {"dn_number": PAIRS}, "num_one2many_queries": 9}
ALL = TWO_STAGE | BRANCHES
# With all that changes contents, positions, boxes or proposals.
DINO = ALL | dict.fromkeys(
    (
        "multiclass_proposals",
        "mixed_query_selection",
        "anchor_query_pos",
        "look_forward_twice",
        "decoder_norm",
        "shared_heads",
    ),
    True,
)
H_DETR = ALL | dict.fromkeys(("mixed_query_selection", "look_forward_twice"), True)
MODELS = pytest.mark.parametrize("options", [ALL, H_DETR, DINO], ids=["two_stage", "h_detr", "dino"])
# Of random_boxes: at most two objects in an image.
NUM_DENOISING, NUM_MATCHING = 2 * PAIRS, 11
ROWS = {
    "dn": slice(0, NUM_DENOISING),
    "pred": slice(NUM_DENOISING, NUM_DENOISING + NUM_MATCHING),
    "one2many": slice(NUM_DENOISING + NUM_MATCHING, None),
}


@pytest.fixture
def images(make_input):
    return [make_input(96, 64, [[4, 8, 40, 60], [10, 5, 60, 30]], [2, 0]), make_input(70, 90, [[3, 3, 50, 60]], [4])]


def predict(model, images, *, seed=0):
    torch.manual_seed(seed)
    return model.train().predict_for_training(model.preprocess_image(images), model.prepare_targets(images))


def predict_with_others(model, images, kind):
    """Predict with other contents, positions and boxes of the queries of a kind."""

    def replace(_, args, kwargs):
        tgt, query_pos, boxes, *rest = args
        generator = torch.Generator().manual_seed(5)
        others = []
        for tensor, draw in ((tgt, torch.randn), (query_pos, torch.randn), (boxes, torch.rand)):
            # DINO's decoder makes its positions itself.
            if tensor is not None:
                tensor = tensor.clone()
                tensor[:, ROWS[kind]] = draw(tensor[:, ROWS[kind]].shape, generator=generator)
            others.append(tensor)
        return (*others, *rest), kwargs

    handle = model.transformer.decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return predict(model, images)
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "seen_by"), [("dn", {"dn"}), ("pred", {"dn", "pred"}), ("one2many", {"one2many"})])
def test_queries_are_seen_by_those_that_may_see_them_and_change_no_bit_of_the_others(
    make_model, randomize, images, kind, seen_by
):
    model = randomize(make_model(**ALL))
    before, after = predict(model, images), predict_with_others(model, images, kind)
    for other in ROWS:
        for name in ("logits", "boxes"):
            is_same = torch.equal(before[f"{other}_{name}"], after[f"{other}_{name}"])
            assert is_same == (other not in seen_by), (other, name)
    assert all(torch.equal(before[name], after[name]) for name in ("enc_logits", "enc_boxes"))


def test_groups_of_denoising_queries_do_not_see_each_other(make_model, randomize, images, monkeypatch):
    model = randomize(make_model(**ALL))
    before = predict(model, images)
    # The first of two groups is another.
    monkeypatch.setitem(ROWS, "dn", slice(0, NUM_DENOISING // 2))
    after = predict_with_others(model, images, "dn")
    first, second = (before["dn_logits"] == after["dn_logits"]).chunk(2, dim=2)
    assert not first.all(3).any() and second.all()


@pytest.mark.parametrize("options", [{}, {"with_box_refine": True}, TWO_STAGE])
def test_matching_queries_predict_what_they_predict_alone(make_model, randomize, images, options):
    branches = dict(BRANCHES) if options.get("two_stage") else {"num_one2many_queries": 9}
    # The first queries have the same weights in both.
    plain, model = randomize(make_model(**options)), make_model(**options, **branches)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        state[name][: len(value)] = value
    model.load_state_dict(state)
    outputs = predict(model, images)
    for name, expected in predict(plain, images).items():
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-5)
    for name, expected in plain.predict_raw(images).items():
        assert torch.equal(model.predict_raw(images)[name], expected)


def test_every_kind_of_queries_has_its_shapes_and_losses(make_model, images):
    model = make_model(**ALL)
    outputs = predict(model, images)
    shapes = {name: tuple(value.shape) for name, value in outputs.items() if not name.startswith("enc")}
    counts = {"dn": NUM_DENOISING, "pred": NUM_MATCHING, "one2many": 9}
    assert shapes == {
        f"{kind}_{name}": (3, 2, count, size)
        for kind, count in counts.items()
        for name, size in (("logits", 5), ("boxes", 4))
    }
    layers = ["", "_0", "_1"]
    suffixes = {f"{kind}{layer}" for kind in ("", "_dn", "_one2many") for layer in layers} | {"_enc"}
    assert model(images).keys() == {f"loss_{term}{suffix}" for term in ("ce", "bbox", "giou") for suffix in suffixes}


def test_further_queries_are_the_proposals_next_in_rank(make_model, randomize, images):
    """What the first layer starts from: boxes of the best twenty, of which the first eleven are matched one to one."""
    model = randomize(make_model(**TWO_STAGE, num_one2many_queries=9))
    seen = []
    model.transformer.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    outputs = predict(model, images)
    best = outputs["enc_logits"][..., 0].topk(20, dim=1).indices
    expected = outputs["enc_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    assert torch.equal(seen[0], expected)


def test_small_images_have_fewer_further_queries(make_model, make_input):
    # 2 x 2 + 1 + 1 + 1 cells, of which the matching queries take five.
    image = [make_input(16, 16, [[2, 2, 9, 9]], [1])]
    outputs = predict(make_model(**TWO_STAGE, num_queries=5, num_one2many_queries=9), image)
    assert (outputs["pred_boxes"].shape[2], outputs["one2many_boxes"].shape[2]) == (5, 2)
    model = make_model(**ALL)
    outputs = predict(model, image)
    assert (outputs["pred_boxes"].shape[2], outputs["one2many_boxes"].shape[2]) == (7, 0)
    assert all(loss.isfinite() for loss in model(image).values())


@MODELS
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (300, 1)])
def test_batches_of_any_number_of_objects_train_every_parameter(make_model, make_input, counts, options):
    generator = torch.Generator().manual_seed(0)
    images = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * 50
        boxes = torch.cat((corners[:, 0], corners[:, 1] + 2), dim=1)
        images.append(make_input(64, 64, boxes.tolist(), torch.randint(5, (count,), generator=generator).tolist()))
    model = make_model(**options).train()
    losses = model(images)
    sum(losses.values()).backward()
    assert len(losses) == 3 * (3 * 3 + 1) and all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all((losses[f"loss_ce_dn{layer}"] > 0) == (max(counts) > 0) for layer in ("", "_0", "_1"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_checkpointing_and_half_precision_do_with_all_queries_what_they_do_without(
    make_model, randomize, images, dtype
):
    results = []
    for checkpointed in (False, True):
        model = randomize(make_model(activation_checkpoint=checkpointed, dropout=0.3, **ALL)).train()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses = model(images)
        sum(losses.values()).backward()
        results.append((losses, [p.grad for p in model.parameters()]))
    (losses, gradients), (again, gradients_again) = results
    assert losses == again and all(map(torch.equal, gradients, gradients_again))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_losses_in_half_precision_are_close_to_those_of_float32(make_model, randomize, images):
    model = randomize(make_model(**ALL)).train()
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images)
    # The bound of test_mixed_precision.
    assert all(abs(losses[name] - value) < 1e-2 * max(1, value) for name, value in expected.items())


def test_random_numbers_of_denoising_are_those_of_the_step(make_model, images):
    model = make_model(**ALL)
    first, again, other = (predict(model, images, seed=seed)["dn_boxes"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoising": {}}, "denoising queries have boxes as reference points, which needs two_stage; it is False"),
        ({"num_one2many_queries": -1}, "num_one2many_queries must be at least 0, got -1"),
    ],
)
def test_branches_that_do_not_fit_are_refused(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_denoising_of_other_classes_width_or_eps_is_refused(make_model):
    model = make_model(**TWO_STAGE)
    parts = {
        "backbone": model.backbone,
        "position_embedding": model.position_embedding,
        "transformer": model.transformer,
        "criterion": model.criterion,
    }
    with pytest.raises(ValueError, match=r"eps of denoising is 0.001, that of the decoder 1e-05"):
        denoising = ContrastiveDenoising(num_classes=5, embed_dim=32, inverse_sigmoid_eps=1e-3)
        DeformableDETR(num_classes=5, denoising=denoising, **parts)
    with pytest.raises(ValueError, match=r"must have \(num_classes, embed_dim\) \(5, 32\), .*got \(6, 32\)"):
        DeformableDETR(num_classes=5, denoising=ContrastiveDenoising(num_classes=6, embed_dim=32), **parts)
