"""H-Deformable-DETR and DINO in the names of their own code, of detrex and of mmdetection."""

import re

import pytest
import torch

from deformable_detr.checkpoint import CheckpointError, convert, export, read_checkpoint
from deformable_detr.checkpoint.classes import COCO_CLASSES_BY_ID
from deformable_detr.checkpoint.reading import select_weights
from deformable_detr.checkpoint.sources import DETREX, count_on
from deformable_detr.checkpoint.variants import _CONFIGURATIONS
from deformable_detr.config import find_config_file

COCO_IDS = [i for i, name in enumerate(COCO_CLASSES_BY_ID) if name]

LABELS = "dn_query_generator.label_embedding"  # mmdetection's name of the class embeddings


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.fixture
def h_detr_names(official_names):
    """A function model -> its parameters as H-Deformable-DETR's code saves them: under the official names."""
    return official_names


@pytest.fixture
def dino_names(official_names):
    """A function model -> its parameters as DINO's code saves them; 2 decoder layers."""

    def convert_back(model):
        renamed = {}
        for key, tensor in official_names(model).items():
            # The encoder's heads have one name.
            if key.startswith(("transformer.decoder.class_embed.2.", "transformer.decoder.bbox_embed.2.")):
                continue
            key = re.sub(r"^(class|bbox)_embed\.2\.", r"transformer.enc_out_\1_embed.", key)
            key = key.replace("query_embed.", "transformer.tgt_embed.").replace("denoising.", "")
            renamed[key] = tensor
        unused = torch.full_like(renamed["label_enc.weight"][:1], 7.0)
        return renamed | {"label_enc.weight": torch.cat([renamed["label_enc.weight"], unused])}

    return convert_back


@pytest.fixture
def detrex_dino_names(detrex_names):
    """A function model -> its parameters as detrex saves a DINO."""

    def convert_back(model):
        names = {"query_embedding.": "transformer.tgt_embed.", "denoising.": ""}
        return {re.sub("|".join(names), lambda m: names[m[0]], k): v for k, v in detrex_names(model).items()}

    return convert_back


def test_h_detr_weights_are_taken_over_completely(build_h_detr, h_detr_names):
    theirs, ours = build_h_detr(), build_h_detr()
    converted, report = convert(h_detr_names(theirs), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "H-Deformable-DETR" and not report.missing and not report.mapped and not report.note
    assert all("counter" in reason or "second name" in reason for reason in report.dropped.values())


def test_dino_weights_are_taken_over_completely(build_dino, dino_names):
    theirs, ours = build_dino(), build_dino()
    converted, report = convert(dino_names(theirs), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "DINO" and not report.missing and not report.note
    assert report.mapped == {"denoising.label_enc.weight": "without its last 1 of 81 rows, which are of no class"}


@pytest.mark.parametrize("kind", ("H-DETR", "DINO"))
def test_own_files_hold_the_very_model_so_that_runs_resume(kind, build_h_detr, build_dino):
    model = (build_h_detr if kind == "H-DETR" else build_dino)(NUM_CLASSES=2)
    converted, report = convert(model.state_dict(), model=model, class_names=["a", "b"], file_class_names=["a", "b"])
    assert_equal(converted, model.state_dict())
    assert report.exact and report.source == "deformable_detr"


def test_dino_weights_of_a_shared_head_fit_a_model_with_a_head_per_layer(build_dino, dino_names):
    theirs, ours = build_dino(), build_dino(SHARED_HEADS=False)
    assert_equal(convert(dino_names(theirs), model=ours)[0], theirs.state_dict())


def test_detrex_dino_weights_are_taken_over_completely(build_dino, detrex_dino_names):
    theirs, ours = build_dino(SHARED_HEADS=False), build_dino(SHARED_HEADS=False)
    converted, report = convert(detrex_dino_names(theirs), model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "detrex" and not report.missing and not report.mapped
    assert "set POSITION_TEMPERATURE and POSITION_OFFSET to those of the file" in report.note
    assert "inverse_sigmoid" not in report.note


def test_mmdetection_dino_weights_are_taken_over_completely(build_dino, mmdetection_names):
    theirs, ours = build_dino(SHARED_HEADS=False), build_dino(SHARED_HEADS=False)
    for projection in theirs.backbone.input_proj:
        projection[0].bias.data.zero_()
    file = {key.replace("denoising.label_enc", LABELS): v for key, v in mmdetection_names(theirs, 3).items()}
    converted, report = convert(file, model=ours)
    assert_equal(converted, theirs.state_dict())
    assert report.source == "mmdetection" and not report.missing


def test_coarser_levels_count_on_from_those_of_the_backbone():
    theirs = [f"neck.{name}.conv.weight" for name in ("extra_convs.0", "convs.0", "convs.1", "convs.2", "convs.3")]
    ours = count_on({name: DETREX.rename(name) for name in theirs})
    assert list(ours.values()) == [f"backbone.input_proj.{level}.0.weight" for level in (4, 0, 1, 2, 3)]


@pytest.mark.parametrize("kind", ("H-DETR", "DINO"))
def test_exported_names_are_those_of_its_own_code_and_come_back(
    kind, build_h_detr, build_dino, h_detr_names, dino_names
):
    build, names = (build_h_detr, h_detr_names) if kind == "H-DETR" else (build_dino, dino_names)
    model = build()
    expected = {key: value for key, value in names(model).items() if "total_" not in key}
    if kind == "DINO":
        expected["label_enc.weight"][-1] = 0
    exported = export(model, to="official")
    assert_equal(exported, expected)
    assert_equal(convert(exported, model=build())[0], model.state_dict())


def count_distinct(state_dict):
    return len({(tuple(tensor.shape), tensor.sum().item(), tensor.std().item()) for tensor in state_dict.values()})


def test_files_have_as_many_names_as_the_published_ones(build, build_h_detr, build_dino, detrex_dino_names):
    layers = {"ENC_LAYERS": 6, "DEC_LAYERS": 6}
    assert len(export(build_h_detr(**layers), to="official")) == 631
    assert len(export(build(stem="dino_R_50_5scale", **layers), to="official")) == 630
    assert len(detrex_dino_names(build_dino(SHARED_HEADS=False, **layers))) == 634
    dino = export(build_dino(**layers), to="official")
    # Each of the 8 tensors of the one class and box head has 12 names, 6 of them in the decoder: 626 - 8 * 11.
    assert len(dino) == 626 and count_distinct(dino) == 538


class TinySwin(torch.nn.Module):
    """Some of the names of Detectron2's Swin, which are also those of the official codes."""

    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, 192, 4)})
        blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(4)}) for _ in range(18))
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"blocks": blocks}) for _ in range(3))
        self.norm1 = torch.nn.LayerNorm(4)


@pytest.mark.parametrize("kind, prefix", (("H-DETR", "backbone.0.body."), ("DINO", "backbone.0.")))
def test_swins_have_a_body_in_one_code_and_none_in_the_other(kind, prefix, build_h_detr, build_dino):
    theirs, ours = ((build_h_detr if kind == "H-DETR" else build_dino)() for _ in range(2))
    for model in (theirs, ours):
        model.backbone.bottom_up = TinySwin()
    exported = export(theirs, to="official")
    assert {f"{prefix}{name}" for name in TinySwin().state_dict()} <= exported.keys()
    assert_equal(convert(exported, model=ours)[0], theirs.state_dict())
    with pytest.raises(CheckpointError, match=rf"{kind[:2]}.*Swin-L, 4 levels: configuration \w+_swin_large"):
        convert(exported, model=build_dino(NUM_FEATURE_LEVELS=3))


def test_averaged_weights_of_dino_are_taken_when_asked_for(build_dino, dino_names, tmp_path):
    trained, averaged = dino_names(build_dino()), dino_names(build_dino())
    torch.save({"model": trained, "ema_model": averaged, "epoch": 11}, tmp_path / "checkpoint0011_4scale.pth")
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint0011_4scale.pth"))
    assert_equal(select_weights(checkpoint, averaged=True)[0], averaged)
    assert_equal(select_weights(checkpoint, averaged=False)[0], trained)
    # As torch's AveragedModel, and so torchvision's trainings, name them.
    wrapped = {"n_averaged": torch.tensor(9), **{f"module.{key}": value for key, value in averaged.items()}}
    assert_equal(select_weights({"model": trained, "model_ema": wrapped}, averaged=True)[0], averaged)


@pytest.mark.parametrize("source", ("DINO", "detrex"))
def test_every_head_and_embedding_of_dino_follows_the_names_of_the_classes(
    source, build_dino, dino_names, detrex_dino_names
):
    rows = 91 if source == "DINO" else 80
    theirs = build_dino(NUM_CLASSES=rows, SHARED_HEADS=source == "DINO")
    for head in theirs.class_embed:
        head.bias.data = torch.arange(float(rows))
    theirs.denoising.label_enc.weight.data[:, 0] = torch.arange(float(rows))
    file = dino_names(theirs) if source == "DINO" else detrex_dino_names(theirs)
    ids = COCO_IDS if source == "DINO" else list(range(80))
    converted, report = convert(file, model=build_dino(SHARED_HEADS=False))
    for layer in (0, 1, 2):
        assert converted[f"class_embed.{layer}.bias"].tolist() == ids
    assert converted["denoising.label_enc.weight"][:, 0].tolist() == ids
    assert list(report.class_names) == [name for name in COCO_CLASSES_BY_ID if name] and not report.missing

    # By hand: stop sign is id 13 and the 11th of 80, counted from 0; person 1 and the first.
    few = build_dino(NUM_CLASSES=3, SHARED_HEADS=False)
    converted, report = convert(file, model=few, class_names=["stop sign", "unicorn", "person"])
    expected = [13.0, 1.0] if source == "DINO" else [11.0, 0.0]
    for key in ("class_embed.0.bias", "class_embed.2.bias", "denoising.label_enc.weight"):
        column = converted[key] if converted[key].dim() == 1 else converted[key][:, 0]
        assert column[[0, 2]].tolist() == expected
        assert torch.equal(converted[key][1], few.state_dict()[key][1])


def test_80_classes_of_dino_go_to_their_raw_ids_and_back(build_dino):
    model = build_dino()
    exported = export(model, to="official", coco_ids=True)
    assert exported["label_enc.weight"].shape == (92, 64)
    for name in ("class_embed.0", "transformer.enc_out_class_embed"):
        # Not in the order of the 80, as for a head that scores objects: stop sign is 13, and 12 never fires.
        assert exported[f"{name}.bias"][12] == -20 and len(exported[f"{name}.bias"]) == 91
    assert torch.equal(exported["transformer.enc_out_class_embed.weight"][13], model.class_embed[2].weight[11])
    assert torch.equal(exported["label_enc.weight"][90], model.denoising.label_enc.weight[79])
    assert_equal(convert(exported, model=build_dino())[0], model.state_dict())


def test_encoder_head_of_h_detr_keeps_its_objectness_channel(build_h_detr, h_detr_names):
    theirs, ours = build_h_detr(NUM_CLASSES=91), build_h_detr()
    for layer in (0, 2):
        theirs.class_embed[layer].bias.data = torch.arange(91.0)
    converted, _ = convert(h_detr_names(theirs), model=ours)
    assert converted["class_embed.2.bias"].tolist() == list(range(80))
    assert converted["class_embed.0.bias"].tolist() == COCO_IDS


def test_inference_model_takes_the_contents_of_the_best_ranks(build_h_detr, h_detr_names):
    theirs, ours = build_h_detr(), build_h_detr(one2many=0)
    converted, report = convert(h_detr_names(theirs), model=ours)
    assert torch.equal(converted["query_embed.weight"], theirs.query_embed.weight[:7])
    assert report.mapped == {"query_embed.weight": "the contents of the best 7 of 12 ranks"}


def test_model_with_a_one_to_many_branch_starts_its_contents_anew(build_h_detr, h_detr_names):
    theirs, ours = build_h_detr(one2many=0), build_h_detr()
    converted, report = convert(h_detr_names(theirs), model=ours)
    assert torch.equal(converted["query_embed.weight"][:7], theirs.query_embed.weight)
    assert torch.equal(converted["query_embed.weight"][7:], ours.query_embed.weight[7:])
    assert "with 5 more as initialised" in report.mapped["query_embed.weight"]


def test_contents_of_another_split_are_refused(build_h_detr, h_detr_names):
    file = h_detr_names(build_h_detr(one2many=4))
    with pytest.raises(
        CheckpointError, match=r"num_queries \+ num_one2many_queries is 11 in the file and 12 in the model"
    ):
        convert(file, model=build_h_detr())


def test_class_embeddings_are_not_missed_by_detection_nor_in_models_that_do_not_denoise(build_dino):
    theirs, ours = build_dino(), build_dino(DN_NUMBER=0)
    file = theirs.state_dict()
    converted, report = convert(file, model=ours)
    assert (
        converted.keys() == ours.state_dict().keys() and "only trains" in report.dropped["denoising.label_enc.weight"]
    )
    converted, report = convert(ours.state_dict(), model=theirs)
    assert list(report.missing) == ["denoising.label_enc.weight"] and report.undetermined == []


# Kind -> what it is called, and its configuration.
KINDS = {
    "DINO": ("DINO", "dino_R_50_4scale"),
    "H-DETR": ("H-Deformable-DETR", "h_deformable_detr_R_50"),
    "two-stage": ("two-stage Deformable DETR", "deformable_detr_R_50_two_stage"),
    "refined": ("Deformable DETR with box refinement", "deformable_detr_R_50_box_refine"),
    "plain": ("Deformable DETR", "deformable_detr_R_50"),
}


def test_files_of_another_kind_are_named_as_what_they_are_with_the_configuration_that_fits(
    build, build_h_detr, build_dino, official_names, dino_names
):
    models = {"DINO": build_dino(), "H-DETR": build_h_detr(), "two-stage": build("_two_stage")}
    models |= {"refined": build("_box_refine"), "plain": build()}
    named = {kind: f"{name} (ResNet-50, 4 levels: configuration {stem})" for kind, (name, stem) in KINDS.items()}
    for kind, theirs in models.items():
        file = dino_names(theirs) if kind == "DINO" else official_names(theirs)
        for other in models.keys() - {kind}:
            told = f"The file holds {named[kind]}, the model is {named[other]}. They are different variants: "
            with pytest.raises(CheckpointError, match=re.escape(told)):
                convert(file, model=models[other])


def test_combinations_of_the_users_own_are_called_by_their_switches(build):
    told = (
        r"holds two-stage Deformable DETR with decoder_norm \(ResNet-50, 4 levels\), the model is two-stage Deformable"
    )
    with pytest.raises(CheckpointError, match=told):
        convert(build("_two_stage", DECODER_NORM=True).state_dict(), model=build("_two_stage"))


def test_configurations_that_errors_name_are_there():
    for configuration in _CONFIGURATIONS.values():
        assert find_config_file(configuration.partition(",")[0])


def test_weights_with_a_head_per_layer_are_refused_by_a_model_that_shares_one(build_dino, detrex_dino_names):
    with pytest.raises(CheckpointError, match="variants: shared_heads is False in the file and True in the model"):
        convert(detrex_dino_names(build_dino(SHARED_HEADS=False)), model=build_dino())


def test_objectness_is_not_taken_for_a_class(build, official_names):
    model = build("_two_stage", MULTICLASS_PROPOSALS=True)
    with pytest.raises(CheckpointError, match="multiclass_proposals is False in the file and True in the model"):
        convert(official_names(build("_two_stage")), model=model)


def test_settings_that_no_file_holds_are_told(build_dino, dino_names):
    model = build_dino(POSITION_TEMPERATURE=10000.0)
    told = "DINO computes with temperature 20; this model with temperature 10000"
    assert told in str(convert(dino_names(build_dino()), model=model)[1])
    with pytest.raises(CheckpointError, match=told):
        export(model, to="official")


def test_combinations_that_no_other_project_has_are_not_exported(build_dino, build_h_detr):
    with pytest.raises(CheckpointError, match="transformers has no model with mixed_query_selection"):
        export(build_h_detr(), to="transformers")
    with pytest.raises(CheckpointError, match="No other project has models with .* and without decoder_norm"):
        export(build_dino(DECODER_NORM=False), to="official")
    with pytest.raises(CheckpointError, match="DINO has class embeddings for denoising"):
        export(build_dino(DN_NUMBER=0), to="official")


def test_what_only_trains_is_left_out_where_it_has_no_place(build):
    model = build("_two_stage", DN_NUMBER=3)
    exported = export(model, to="official")
    assert exported.keys() == export(build("_two_stage"), to="official").keys()
    assert convert(exported, model=model)[1].undetermined == []
