"""The optimiser: its groups, its clipping, its schedule."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

from deformable_detr import load_config
from deformable_detr.solver import (
    ClippedAdamW,
    build_lr_multiplier,
    build_lr_scheduler,
    build_optimizer,
    get_param_groups,
    layer_factors,
    lr_factor,
)

CONFIGS = Path(__file__).parents[1] / "configs" / "COCO-Detection"


def load(variant: str = "", *opts: object) -> CfgNode:
    opts = ["MODEL.DEVICE", "cpu", *map(str, opts)]
    return load_config(str(CONFIGS / f"deformable_detr_R_50{variant}.yaml"), opts)


@pytest.fixture(scope="module", params=["", "_two_stage"], ids=["base", "two_stage"])
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.optim.Optimizer]:
    cfg = load(request.param)
    model = build_model(cfg)
    return model, build_optimizer(cfg, model)


def names_by_lr(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["lr"], set()).update(names[id(p)] for p in group["params"])
    return groups


# Groups


def test_every_trainable_parameter_is_in_one_group(built):
    model, optimizer = built
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_backbone_and_locations_learn_ten_times_slower(built):
    model, optimizer = built
    groups = names_by_lr(model, optimizer)
    slow = groups.pop(min(groups))
    assert list(groups) == [2e-4]
    assert min(g["lr"] for g in optimizer.param_groups) == pytest.approx(2e-5)

    # ResNet-50 with FREEZE_AT 2: 3x3 and 1x1 weights of res3, res4, res5 and their three shortcuts; norms are frozen.
    backbone = {name for name in slow if name.startswith("backbone.bottom_up.")}
    assert len(backbone) == 3 * (4 + 6 + 3) + 3
    assert not any(".norm." in name or ".stem." in name or ".res2." in name for name in backbone)

    offsets = {name for name in slow if ".sampling_offsets." in name}
    assert len(offsets) == 24
    rest = slow - backbone - offsets
    if model.transformer.two_stage:
        assert not rest
    else:
        assert rest == {"transformer.reference_points.weight", "transformer.reference_points.bias"}
    assert any(name.startswith("backbone.input_proj.") for name in groups[2e-4])


def test_everything_decays_alike(built):
    _, optimizer = built
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_decay_of_norms_and_biases_can_be_set():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = get_param_groups(model, base_lr=1.0, weight_decay=0.1, weight_decay_norm=0.0, weight_decay_bias=0.3)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.1
    assert decay[id(model[0].bias)] == 0.3
    assert decay[id(model[1].weight)] == 0.0


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("backbone.bottom_up.res3.0.conv1.weight", 0.5),
        ("backbone.input_proj.0.0.weight", 1.0),
        ("transformer.encoder.layers.0.self_attn.sampling_offsets.bias", 0.25),
        ("transformer.reference_points.weight", 0.25),
        ("transformer.decoder.layers.0.cross_attn.attention_weights.weight", 1.0),
        ("my_backbone.weight", 1.0),
    ],
)
def test_factor_follows_the_name(name, factor):
    assert lr_factor(name, backbone_multiplier=0.5, location_multiplier=0.25) == factor


@pytest.mark.parametrize(
    "name",
    [
        "module.backbone.bottom_up.res3.0.conv1.weight",
        "_orig_mod.module.backbone.bottom_up.res3.0.conv1.weight",
        "backbone._orig_mod.bottom_up.res3._checkpoint_wrapped_module.0.conv1.weight",
    ],
)
def test_factor_is_that_of_the_model_inside_of_wrappers(name):
    assert lr_factor(name, backbone_multiplier=0.5, location_multiplier=0.25) == 0.5
    assert lr_factor(name.replace("bottom_up", "input_proj"), backbone_multiplier=0.5, location_multiplier=0.25) == 1


def named(**parameters: nn.Module | nn.Parameter) -> nn.Module:
    """A module of which ``vit__blocks`` is called "vit.blocks"."""
    root = nn.Module()
    for name, value in parameters.items():
        *parents, last = name.split("__")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                setattr(module, parent, nn.Module())
            module = getattr(module, parent)
        setattr(module, last, value)
    return root


def one() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def rates(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    by_parameter = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: by_parameter[id(p)] for name, p in model.named_parameters()}


def test_every_block_of_a_vit_learns_slower_than_the_next():
    vit = "backbone__bottom_up__net__"
    model = named(
        **{
            f"{vit}pos_embed": one(),
            f"{vit}patch_embed__proj__weight": one(),
            f"{vit}blocks": nn.ModuleList([named(weight=one(), residual__weight=one()) for _ in range(11)]),
        },
        backbone__input_proj__weight=one(),
        transformer__blocks__0__weight=one(),
    )
    groups = get_param_groups(
        model, base_lr=1.0, weight_decay=0.1, layer_decay=0.5, backbone_multiplier=0.1, location_multiplier=1.0
    )
    net = "backbone.bottom_up.net."
    expected = {f"{net}blocks.{n}.weight": 0.1 * 0.5 ** (11 - n) for n in range(11)}
    expected |= {f"{net}blocks.{n}.residual.weight": 0.1 for n in range(11)}
    expected |= dict.fromkeys((f"{net}pos_embed", f"{net}patch_embed.proj.weight"), 0.1 * 0.5**12)
    expected |= {"backbone.input_proj.weight": 1.0, "transformer.blocks.0.weight": 1.0}
    assert rates(model, groups) == pytest.approx(expected)


def test_blocks_of_a_swin_are_counted_through_its_stages():
    model = named(
        backbone__bottom_up__patch_embed__weight=one(),
        backbone__bottom_up__layers=nn.ModuleList(
            [
                named(blocks=nn.ModuleList([named(bias=one()), named(bias=one())]), downsample__weight=one()),
                named(blocks=nn.ModuleList([named(bias=one())])),
            ]
        ),
        backbone__bottom_up__norm1__weight=one(),
    )
    assert layer_factors(model, 0.5) == {
        "backbone.bottom_up.patch_embed.weight": 0.5**4,
        "backbone.bottom_up.layers.0.blocks.0.bias": 0.5**3,
        "backbone.bottom_up.layers.0.blocks.1.bias": 0.5**2,
        "backbone.bottom_up.layers.0.downsample.weight": 0.5**2,
        "backbone.bottom_up.layers.1.blocks.0.bias": 0.5,
    }
    wrapped = layer_factors(nn.DataParallel(model), 0.5)
    assert wrapped == {f"module.{name}": factor for name, factor in layer_factors(model, 0.5).items()}


def test_what_halves_at_the_beginning_of_a_stage_goes_with_the_last_block_of_the_stage_before():
    """timm's Swins, and with "stages" ConvNeXts."""
    for kind in ("layers", "stages"):
        first = named(blocks=nn.ModuleList([named(bias=one()), named(bias=one())]))
        second = named(blocks=nn.ModuleList([named(bias=one())]), downsample__weight=one())
        model = named(**{f"backbone__body__{kind}": nn.ModuleList([first, second])})
        assert layer_factors(model, 0.5) == {
            f"backbone.body.{kind}.0.blocks.0.bias": 0.5**3,
            f"backbone.body.{kind}.0.blocks.1.bias": 0.5**2,
            f"backbone.body.{kind}.1.downsample.weight": 0.5**2,
            f"backbone.body.{kind}.1.blocks.0.bias": 0.5,
        }


def test_decay_by_layers_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay \(0\.5\) needs a backbone with blocks"):
        layer_factors(named(backbone__conv=nn.Linear(1, 1)), 0.5)
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"layer_decay must be in \(0, 1\], got {decay}"):
            layer_factors(nn.Linear(1, 1), decay)


def test_parameters_are_overridden_by_the_last_part_of_their_names(caplog):
    model = named(backbone__bottom_up__table=one(), transformer__table=one(), transformer__weight=one())
    overrides = {"table": {"weight_decay": 0.0, "lr": 0.3}, "absent": {"lr": 0.5}}
    groups = get_param_groups(
        model, base_lr=1.0, weight_decay=0.1, overrides=overrides, lr_factor_func=lambda name: 0.5
    )
    # Its learning rate is a value, not a factor; the other's is halved.
    found = {name: 0.3 for name in ("backbone.bottom_up.table", "transformer.table")} | {"transformer.weight": 0.5}
    assert rates(model, groups) == pytest.approx(found)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.0, 0.0, 0.1]
    assert overrides == {"table": {"weight_decay": 0.0, "lr": 0.3}, "absent": {"lr": 0.5}}
    assert "The overrides of absent change nothing" in caplog.text


def test_a_slower_backbone_that_is_not_found_is_told_of(caplog):
    get_param_groups(named(backbone__weight=one()), base_lr=1.0, weight_decay=0.1)
    get_param_groups(named(head__weight=one()), base_lr=1.0, weight_decay=0.1, backbone_multiplier=1.0)
    assert not caplog.records
    get_param_groups(named(detector__backbone__weight=one()), base_lr=1.0, weight_decay=0.1)
    assert (
        'backbone_multiplier (0.1) changes nothing: no parameter\'s name begins with "backbone.", the first is '
        "detector.backbone.weight" in caplog.text
    )


def test_overrides_of_anything_else_are_refused():
    with pytest.raises(ValueError, match="overrides of weight must be of lr or weight_decay, got weigth_decay"):
        get_param_groups(nn.Linear(1, 1), base_lr=1.0, weight_decay=0.1, overrides={"weight": {"weigth_decay": 0.0}})
    with pytest.raises(ValueError, match=r"SOLVER\.OVERRIDES must be triples .*got \('pos_embed', 0\.0\)"):
        build_optimizer(load("", "SOLVER.OVERRIDES", "[('pos_embed', 0.0)]"), nn.Linear(1, 1))


def test_both_systems_override_by_name_and_decay_by_layer():
    """With a block that stands for a transformer's, in a backbone that is otherwise a convolution."""
    model = named(backbone__bottom_up__blocks__0__table=one(), transformer__table=one())
    cfg = load("", "SOLVER.OVERRIDES", "[('table', 'weight_decay', 0.5)]", "SOLVER.LAYER_DECAY", "0.25")
    lazy = load_config(
        str(CONFIGS / "deformable_detr_R_50.py"),
        ["optimizer.params.layer_decay=0.25", "+optimizer.params.overrides.table.weight_decay=0.5"],
    )
    lazy.optimizer.params.model = model
    for optimizer in (build_optimizer(cfg, model), instantiate(lazy.optimizer)):
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
        assert rates(model, optimizer.param_groups) == pytest.approx(
            {"backbone.bottom_up.blocks.0.table": 2e-4 * 0.1 * 0.25, "transformer.table": 2e-4}
        )


# Clipping


def step(optimizer_of, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parameters after one step from the same start with the given gradients."""
    parameters = [nn.Parameter(torch.linspace(-1, 1, g.numel()).view_as(g)) for g in gradients]
    optimizer = optimizer_of(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return [p.detach() for p in parameters]


def adamw(parameters):
    # An eps of the gradients' size makes the step depend on their scale, which Adam otherwise cancels.
    return torch.optim.AdamW(parameters, lr=0.1, eps=0.1)


def clipped(parameters):
    return ClippedAdamW(parameters, max_norm=0.1, lr=0.1, eps=0.1)


def gradients_of_norm(norm: float) -> list[torch.Tensor]:
    """Two tensors of different norm, (0.6, 0.8) of the whole."""
    small, large = torch.tensor([[0.36, 0.48]]), torch.tensor([0.0, -0.8, 0.0])
    return [small * norm, large * norm]


def test_large_gradients_are_scaled_to_the_limit_together():
    expected = step(adamw, gradients_of_norm(0.1))
    torch.testing.assert_close(step(clipped, gradients_of_norm(1.0)), expected, rtol=1e-5, atol=1e-7)
    # The identity can fail: unclipped the step differs, and so does a limit per parameter.
    assert not torch.allclose(step(adamw, gradients_of_norm(1.0))[0], expected[0], atol=1e-3)
    per_parameter = [g / g.norm() * 0.1 for g in gradients_of_norm(1.0)]
    assert not torch.allclose(step(adamw, per_parameter)[0], expected[0], atol=1e-3)


def test_gradients_within_the_limit_are_left_alone():
    torch.testing.assert_close(step(clipped, gradients_of_norm(0.09)), step(adamw, gradients_of_norm(0.09)))


def test_limit_holds_over_all_groups():
    def grouped(parameters):
        return ClippedAdamW([{"params": [p]} for p in parameters], max_norm=0.1, lr=0.1, eps=0.1)

    torch.testing.assert_close(step(grouped, gradients_of_norm(1.0)), step(clipped, gradients_of_norm(1.0)))


@pytest.mark.parametrize("max_norm, left", [(0.1, 0.1), (None, 1.0)])
def test_gradients_clipped_early_give_their_norm_and_are_not_clipped_again(max_norm, left):
    class ClippedEarly(ClippedAdamW):
        def step(self, closure=None):
            assert self.clip_gradients().item() == pytest.approx(1.0)
            # A second clipping would show.
            self.max_norm = 1e-3
            return super().step(closure)

    def early(parameters):
        return ClippedEarly(parameters, max_norm=max_norm, lr=0.1, eps=0.1)

    torch.testing.assert_close(step(early, gradients_of_norm(1.0)), step(adamw, gradients_of_norm(left)))


@pytest.mark.parametrize("max_norm", [None, 0.0])
def test_clipping_can_be_switched_off(max_norm):
    def unlimited(parameters):
        return ClippedAdamW(parameters, max_norm=max_norm, lr=0.1, eps=0.1)

    torch.testing.assert_close(step(unlimited, gradients_of_norm(1.0)), step(adamw, gradients_of_norm(1.0)))


def test_scaled_gradients_are_unscaled_before_they_are_clipped():
    def stepped_by_a_scaler(parameters):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        # The scaler begins to work with the first loss that it scales.
        scaler.scale(torch.zeros(()))
        optimizer = clipped(parameters)
        return SimpleNamespace(step=lambda: scaler.step(optimizer))

    scaled = [8.0 * gradient for gradient in gradients_of_norm(0.09)]
    torch.testing.assert_close(step(stepped_by_a_scaler, scaled), step(clipped, gradients_of_norm(0.09)))


def test_configuration_sets_the_limit():
    model = nn.Linear(2, 2)
    assert build_optimizer(load(), model).max_norm == 0.1
    assert build_optimizer(load("", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5), model).max_norm == 0.5
    assert build_optimizer(load("", "SOLVER.CLIP_GRADIENTS.ENABLED", False), model).max_norm is None


# Errors


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("OPTIMIZER", "SGD", r"SOLVER\.OPTIMIZER must be ADAMW, got 'SGD'"),
        ("CLIP_GRADIENTS.CLIP_TYPE", "norm", r"CLIP_TYPE full_model and NORM_TYPE 2\.0, got 'norm' and 2\.0"),
        ("BIAS_LR_FACTOR", 2.0, r"SOLVER\.BIAS_LR_FACTOR must be 1\.0, .*got 2\.0"),
        ("CLIP_GRADIENTS.NORM_TYPE", 1.0, r"CLIP_TYPE full_model and NORM_TYPE 2\.0, got 'full_model' and 1\.0"),
    ],
)
def test_what_this_optimizer_does_not_do_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(load("", f"SOLVER.{key}", value), nn.Linear(2, 2))


# Schedule


@pytest.mark.parametrize("steps", [(8,), (8, 10), (8, 12, 14)])
def test_rate_is_constant_without_warm_up_and_drops_once(steps, caplog):
    """Steps at or after the end would never be seen."""
    cfg = load("", "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", steps)
    cfg.freeze()
    optimizer = build_optimizer(cfg, nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)}))
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(sorted(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    assert rates == [pytest.approx([2e-5, 2e-4])] * 8 + [pytest.approx([2e-6, 2e-5])] * 2
    warning = f"SOLVER.STEPS {steps}: {steps[1:]} are left out, as SOLVER.MAX_ITER is 10"
    assert (warning in caplog.text) == (len(steps) > 1)


@pytest.mark.parametrize("steps", [(0, 3), (3, 3), (5, 3)])
def test_steps_that_do_not_increase_are_refused(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=rf"SOLVER\.STEPS must be .* increase .*got \({steps[0]}, {steps[1]}\)"):
        build_lr_scheduler(load("", "SOLVER.STEPS", steps), optimizer)


@pytest.mark.parametrize("milestones", ([4, 4], [5, 4], [4]))
def test_milestones_of_a_lazy_configuration_that_cannot_be_are_refused(milestones):
    lazy = load_config(str(CONFIGS / "deformable_detr_R_50.py"), [f"lr_multiplier.scheduler.milestones={milestones}"])
    with pytest.raises(ValueError, match=rf"lr_multiplier cannot be built: .*'milestones': \{milestones}"):
        build_lr_multiplier(lazy.lr_multiplier)
