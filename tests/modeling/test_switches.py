"""What DINO and H-DETR change in the transformer and in the heads, switch by switch."""

import itertools

import pytest

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


@pytest.mark.parametrize("switches", [c for c in COMBINATIONS if not missing(c)], ids="+".join)
def test_a_combination_with_a_meaning_trains_every_parameter_and_detects(make_model, make_input, switches):
    model = make_model(**dict.fromkeys(switches, True), num_decoder_layers=2, levels=2, in_features=("res4", "res5"))
    losses = model([make_input(64, 64, [[4, 8, 30, 36]], [2])])
    sum(losses.values()).backward()
    assert len(losses) == (9 if "two_stage" in switches else 6)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(model.eval()([make_input(64, 70)])[0]["instances"]) > 0


@pytest.mark.parametrize("switches", [c for c in COMBINATIONS if missing(c)], ids="+".join)
def test_a_combination_without_a_meaning_is_refused_with_what_it_needs(make_model, switches):
    with pytest.raises(ValueError, match="needs") as refused:
        make_model(**dict.fromkeys(switches, True))
    name, _, needed, _, value = str(refused.value).replace(",", "").split()[:5]
    assert needed in NEEDS[name] & missing(switches) and value == "is"
    assert str(refused.value).endswith("False")
