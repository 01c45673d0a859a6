"""What DINO and H-DETR change in the transformer and in the heads, switch by switch."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model

from deformable_detr import load_config
from deformable_detr.layers.position_encoding import sine_embedding
from deformable_detr.modeling.proposals import propose

SWITCHES = (
    "two_stage",
    "with_box_refine",
    "multiclass_proposals",
    "mixed_query_selection",
    "anchor_query_pos",
    "look_forward_twice",
    "decoder_norm",
    "shared_heads",
)
NEEDS = {
    "multiclass_proposals": {"two_stage"},
    "mixed_query_selection": {"two_stage"},
    "anchor_query_pos": {"two_stage", "with_box_refine"},
    "look_forward_twice": {"with_box_refine"},
}
COMBINATIONS = [
    {name for name, value in zip(SWITCHES, values, strict=True) if value}
    for values in itertools.product([False, True], repeat=len(SWITCHES))
]


def missing(switches: set[str]) -> set[str]:
    return set().union(*(NEEDS.get(name, set()) for name in switches)) - switches


def named(switches):
    """The same in every process of a run, as the order of a set is not."""
    return "+".join(sorted(switches))


@pytest.mark.parametrize("switches", [c for c in COMBINATIONS if not missing(c)], ids=named)
def test_a_combination_with_a_meaning_trains_every_parameter_and_detects(make_model, make_input, switches):
    model = make_model(**dict.fromkeys(switches, True), num_decoder_layers=2, levels=2, in_features=("res4", "res5"))
    losses = model([make_input(64, 64, [[4, 8, 30, 36]], [2])])
    sum(losses.values()).backward()
    assert len(losses) == (9 if "two_stage" in switches else 6)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(model.eval()([make_input(64, 70)])[0]["instances"]) > 0


@pytest.mark.parametrize("switches", [c for c in COMBINATIONS if missing(c)], ids=named)
def test_a_combination_without_a_meaning_is_refused_with_what_it_needs(make_model, switches):
    with pytest.raises(ValueError, match="needs") as refused:
        make_model(**dict.fromkeys(switches, True))
    name, _, needed, _, value = str(refused.value).replace(",", "").split()[:5]
    assert needed in NEEDS[name] & missing(switches) and value == "is"
    assert str(refused.value).endswith("False")


# Proposals and queries


def decoder_inputs(model, images):
    """Contents, positions and reference points that the decoder starts from, and its predictions."""
    given = {}
    hook = model.transformer.decoder.register_forward_pre_hook(
        lambda module, args: given.update(zip(("content", "position", "boxes"), args, strict=False))
    )
    outputs = model.predict_raw(images)
    hook.remove()
    return SimpleNamespace(**given, **outputs)


@pytest.fixture
def two_stage(make_model, randomize):
    """A two-stage model with random weights that refines boxes."""

    def build(**options):
        return randomize(make_model(two_stage=True, with_box_refine=True, **options))

    return build


def test_mixed_queries_have_contents_by_rank_and_positions_of_proposals(two_stage, make_input):
    model = two_stage(mixed_query_selection=True)
    images = [make_input(64, 96), make_input(96, 64, seed=1)]
    queries = decoder_inputs(model, images)
    assert model.query_embed.weight.shape == (11, 32)
    assert torch.equal(queries.content, model.query_embed.weight.expand(2, -1, -1))
    assert not torch.equal(queries.boxes[0], queries.boxes[1])
    # Positions: first half of the embedding of (x, y, w, h), which plain two-stage has too; its second is the content.
    transformer = model.transformer
    sines = sine_embedding(queries.boxes * 2 * math.pi, 16).flatten(-2)
    position, content = transformer.pos_trans_norm(transformer.pos_trans(sines)).split(32, dim=-1)
    torch.testing.assert_close(queries.position, position)
    plain = two_stage()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "query_embed.weight"})
    same = decoder_inputs(plain, images)
    assert torch.equal(same.boxes, queries.boxes) and torch.equal(same.position, queries.position)
    torch.testing.assert_close(same.content, content)


def test_contents_of_mixed_queries_do_not_come_from_proposals(two_stage, make_input):
    model = two_stage(mixed_query_selection=True)
    sum(model([make_input(64, 64, [[4, 8, 30, 36]], [2])]).values()).backward()
    # The half of the embedding that would be the content is there, as in H-DETR's files, and is not used.
    first, second = model.transformer.pos_trans_norm.weight.grad.split(32)
    assert first.abs().max() > 0 and second.abs().max() == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_anchors_replace_the_embedded_positions_alone(two_stage, make_input, mixed):
    model = two_stage(anchor_query_pos=True, mixed_query_selection=mixed)
    queries = decoder_inputs(model, [make_input(64, 64)])
    assert queries.position is None
    assert hasattr(model.transformer, "pos_trans") is not mixed
    if not mixed:
        plain = two_stage()
        shared = plain.state_dict().keys()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in shared})
        assert torch.equal(decoder_inputs(plain, [make_input(64, 64)]).content, queries.content)


def test_an_image_of_fewer_cells_than_queries_uses_the_first_contents(two_stage, make_input):
    model = two_stage(mixed_query_selection=True, anchor_query_pos=True, multiclass_proposals=True, num_queries=100)
    queries = decoder_inputs(model, [make_input(64, 64)])
    cells = 8 * 8 + 4 * 4 + 2 * 2 + 1
    assert torch.equal(queries.content[0], model.query_embed.weight[:cells])
    assert queries.pred_logits.shape[2] == queries.enc_chosen.shape[1] == cells
    losses = model([make_input(64, 64, [[4, 8, 30, 36]], [2])])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("multiclass", "expected"), [(False, [1, 2]), (True, [0, 1])])
def test_proposals_are_ranked_by_the_first_class_or_by_the_best(multiclass, expected):
    logits = torch.tensor([[[0.0, 5.0], [3.0, -1.0], [1.0, 2.0]]])
    anchors = torch.logit(torch.tensor([0.1, 0.2, 0.3]))[:, None].expand(1, 3, 4)
    for all_proposals in (True, False):
        found = propose(
            logits,
            anchors,
            class_head=torch.nn.Identity(),
            bbox_head=lambda features: torch.zeros(*features.shape[:2], 4),
            num_queries=2,
            multiclass=multiclass,
            all_proposals=all_proposals,
        )
        assert found.chosen.tolist() == [expected]
        torch.testing.assert_close(found.boxes[0, :, 0], torch.tensor([0.1, 0.2, 0.3])[expected])


def test_the_loss_of_proposals_with_classes_is_that_of_a_decoder_layer_of_them(two_stage, make_input):
    model = two_stage(multiclass_proposals=True)
    images = [make_input(64, 96, [[4, 8, 60, 36], [40, 2, 90, 60]], [2, 4]), make_input(96, 64)]
    outputs, targets = model.predict_raw(images), model.prepare_targets(images)
    losses = model.criterion(outputs, targets)
    chosen = outputs["enc_chosen"]
    assert chosen.shape == (2, 11)
    # The best cells by their best class; ranks of equal scores, such as those of border cells, are anybody's.
    best = outputs["enc_logits"].max(-1).values
    torch.testing.assert_close(best.gather(1, chosen), best.topk(11).values)
    layer = {
        "pred_logits": torch.stack([logits[rows] for logits, rows in zip(outputs["enc_logits"], chosen, strict=True)]),
        "pred_boxes": torch.stack([boxes[rows] for boxes, rows in zip(outputs["enc_boxes"], chosen, strict=True)]),
    }
    alone = model.criterion({name: value[None] for name, value in layer.items()}, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_enc"], alone[name])
    outputs.pop("enc_chosen")
    assert losses["loss_ce_enc"] != model.criterion(outputs, targets)["loss_ce_enc"]


def test_only_proposals_that_become_matching_queries_are_supervised_with_classes(two_stage, make_input):
    model = two_stage(multiclass_proposals=True)
    images = [make_input(64, 96, [[4, 8, 60, 36]], [2])]
    outputs, targets = model.predict_raw(images), model.prepare_targets(images)
    before = model.criterion(outputs, targets)
    others = torch.ones(outputs["enc_logits"].shape[:2], dtype=torch.bool).scatter(1, outputs["enc_chosen"], False)
    outputs["enc_logits"][others] += 3.0
    # One-to-many queries are next in rank.
    outputs["enc_chosen"] = torch.cat((outputs["enc_chosen"], others.nonzero()[:4, 1][None]), dim=1)
    torch.testing.assert_close(model.criterion(outputs, targets), before)


@pytest.mark.parametrize("options", [{}, {"two_stage": True}, {"two_stage": True, "mixed_query_selection": True}])
def test_evaluation_uses_the_first_of_the_queries(make_model, make_input, randomize, options):
    model = randomize(make_model(num_queries_test=4, **options))
    images = [make_input(64, 64, [[4, 8, 30, 36]], [2])]
    some = decoder_inputs(model, images)
    model.num_queries_test = 11
    all_of_them = decoder_inputs(model, images)
    assert some.pred_logits.shape[2] == 4 and all_of_them.pred_logits.shape[2] == 11
    for name in ("content", "position", "boxes"):
        torch.testing.assert_close(getattr(some, name), getattr(all_of_them, name)[:, :4])
    # Training does not know of it.
    model.num_queries_test = 4
    with_four = model(images)
    model.num_queries_test = 11
    torch.testing.assert_close(model(images), with_four, rtol=0, atol=0)


def test_queries_in_evaluation_are_at_most_those_that_were_learned(make_model, make_input):
    with pytest.raises(ValueError, match=r"num_queries_test \(12\) must be at most .* learned queries \(11\)"):
        make_model(num_queries_test=12)
    with pytest.raises(ValueError, match="num_queries_test must be at least 0, got -1"):
        make_model(num_queries_test=-1, two_stage=True)
    model = make_model(num_queries_test=40, two_stage=True)
    assert model.predict_raw([make_input(64, 64)])["pred_logits"].shape[2] == 40


# Heads and initial weights


@pytest.mark.parametrize("two_stage", [False, True])
def test_shared_heads_are_one_pair_for_the_decoder_and_one_for_the_encoder(make_model, two_stage):
    model = make_model(with_box_refine=True, two_stage=two_stage, shared_heads=True)
    for heads in (model.class_embed, model.bbox_embed):
        assert len(heads) == 3 + two_stage and len({id(head) for head in heads}) == 1 + two_stage
    assert all(torch.equal(head.layers[-1].bias, torch.zeros(4)) for head in model.bbox_embed)


def test_learned_contents_start_as_in_the_papers(make_model):
    """Standard normal in H-DETR; in DINO uniform within sqrt(6 / (rows + columns)), as all matrices are."""
    h_detr = make_model(two_stage=True, mixed_query_selection=True, num_queries=300)
    assert h_detr.query_embed.weight.std().item() == pytest.approx(1, abs=0.05)
    dino = make_model(
        two_stage=True, with_box_refine=True, mixed_query_selection=True, anchor_query_pos=True, num_queries=300
    )
    bound = (6 / (300 + 32)) ** 0.5
    assert 0.95 * bound < dino.query_embed.weight.abs().max() <= bound


H_DETR = {"DIM_FEEDFORWARD": 2048, "MIXED_QUERY_SELECTION": True, "LOOK_FORWARD_TWICE": True}
DINO = H_DETR | {
    "ANCHOR_QUERY_POS": True,
    "DECODER_NORM": True,
    "MULTICLASS_PROPOSALS": True,
    "SHARED_HEADS": True,
    "NUM_QUERIES": 900,
    "DN_NUMBER": 100,
}
FIVE_SCALES = {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "NUM_FEATURE_LEVELS": 5}


@pytest.mark.parametrize(
    ("values", "total", "trainable", "tensors"),
    [
        (H_DETR | {"NUM_ONE2MANY_QUERIES": 1500}, 47_946_073, 47_723_673, 575),
        # DINO's code has a label more than there are classes: 256 numbers that it never uses.
        (DINO, 46_893_182 - 256, 46_670_782 - 256, 538),
        (DINO | FIVE_SCALES, 47_255_806 - 256, None, None),
    ],
    ids=["h_detr", "dino_4scale", "dino_5scale"],
)
def test_models_of_the_papers_have_their_number_of_parameters(values, total, trainable, tensors):
    cfg = load_config("configs/COCO-Detection/deformable_detr_R_50_two_stage.yaml", ["MODEL.DEVICE", "meta"])
    cfg.MODEL.DEFORMABLE_DETR.update({"NUM_CLASSES": 91, **values})
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.DEFORMABLE_DETR.IN_FEATURES
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == total
    if trainable is not None:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
        assert len({id(tensor) for tensor in model.state_dict(keep_vars=True).values()}) == tensors


# Against the model without a switch


def first_step(model, images):
    """Losses, and gradients by name."""
    losses = model.train()(images)
    sum(losses.values()).backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "switch",
    [
        {"look_forward_twice": True},
        {"multiclass_proposals": True},
        {"inverse_sigmoid_eps": 1e-3},
        {"num_queries_test": 5},
        {"shared_heads": True},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_switches_without_parameters_change_no_initial_value(make_model, switch):
    """Nor how many random numbers are drawn."""
    plain, random = make_model(two_stage=True, with_box_refine=True), torch.rand(1)
    model = make_model(two_stage=True, with_box_refine=True, **switch)
    assert torch.equal(torch.rand(1), random)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def test_looking_twice_changes_gradients_and_no_loss(make_model, make_input, randomize):
    images = [make_input(64, 96, [[4, 8, 60, 36]], [2]), make_input(96, 64)]
    options = {"two_stage": True, "with_box_refine": True}
    losses, gradients = first_step(randomize(make_model(**options)), images)
    same, others = first_step(randomize(make_model(**options, look_forward_twice=True)), images)
    assert losses == same
    # The last head has no layer after it; those before it have.
    name = "bbox_embed.{}.layers.2.bias"
    torch.testing.assert_close(others[name.format(2)], gradients[name.format(2)])
    for layer in (0, 1):
        assert (others[name.format(layer)] - gradients[name.format(layer)]).abs().max() > 1e-3


def test_the_gradient_of_a_shared_head_is_the_sum_over_the_layers_own(make_model, make_input):
    """Own heads start as copies of one, so that a first step predicts the same."""
    images = [make_input(64, 96, [[4, 8, 60, 36]], [2]), make_input(96, 64)]
    options = {"two_stage": True, "with_box_refine": True}
    losses, gradients = first_step(make_model(**options), images)
    shared_losses, shared = first_step(make_model(**options, shared_heads=True), images)
    assert losses == shared_losses
    for kind, rest in (("class_embed", "weight"), ("bbox_embed", "layers.2.weight"), ("bbox_embed", "layers.2.bias")):
        own = sum(gradients[f"{kind}.{layer}.{rest}"] for layer in range(3))
        torch.testing.assert_close(shared[f"{kind}.0.{rest}"], own)
        torch.testing.assert_close(shared[f"{kind}.3.{rest}"], gradients[f"{kind}.3.{rest}"])


def test_a_decoder_norm_that_does_nothing_changes_nothing(make_model, make_input, randomize):
    images = [make_input(64, 96, [[4, 8, 60, 36]], [2]), make_input(96, 64)]
    options = {"two_stage": True, "with_box_refine": True}
    plain = randomize(make_model(**options))
    normed = make_model(**options, decoder_norm=True)
    assert normed.state_dict().keys() - plain.state_dict().keys() == {
        "transformer.decoder.norm.weight",
        "transformer.decoder.norm.bias",
    }
    normed.load_state_dict(plain.state_dict(), strict=False)
    normed.transformer.decoder.norm = torch.nn.Identity()
    expected, found = plain.predict_raw(images), normed.predict_raw(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
