import dataclasses
import importlib.util
import io
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from safetensors.torch import save

from deformable_detr import load_config, model_zoo
from deformable_detr.data.augmentation import build_detr_augmentation
from deformable_detr.model_zoo import MODELS
from deformable_detr.model_zoo.__main__ import main
from deformable_detr.model_zoo.table import render_page
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer

ROOT = Path(__file__).parents[2]
NAMES = tuple(MODELS)
COCO_91 = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "91", "MODEL.DEVICE", "cpu"]
# First three queries of COCO val2017 image 39769: three logits and the box, published by transformers' converter.
GOLDEN = {
    "detr_R_50": (
        [[-19.1194, -0.0893, -11.0154], [-17.3640, -1.8035, -14.0219], [-20.0461, -0.5837, -11.1060]],
        [[0.4433, 0.5302, 0.8853], [0.5494, 0.2517, 0.0529], [0.4998, 0.5360, 0.9956]],
    ),
    "deformable_detr_R_50": (
        [[-9.6645, -4.3449, -5.8705], [-9.7035, -3.8504, -5.0724], [-10.5634, -5.3379, -7.5116]],
        [[0.8693, 0.2289, 0.2492], [0.3150, 0.5489, 0.5845], [0.5563, 0.7580, 0.8518]],
    ),
    "deformable_detr_R_50_single_scale": (
        [[-9.9051, -4.2541, -6.4852], [-9.6947, -4.0854, -6.8033], [-10.0665, -5.8470, -7.7003]],
        [[0.7292, 0.4991, 0.5532], [0.7959, 0.2426, 0.4236], [0.7582, 0.3518, 0.4451]],
    ),
    "deformable_detr_R_50_single_scale_dc5": (
        [[-8.9652, -4.1074, -5.6635], [-9.0596, -4.9447, -6.6075], [-10.1178, -4.5275, -6.2671]],
        [[0.7665, 0.4130, 0.4769], [0.8364, 0.1841, 0.3391], [0.6261, 0.3895, 0.7978]],
    ),
    "deformable_detr_R_50_box_refine": (
        [[-8.8895, -5.4187, -6.8153], [-8.4706, -6.1668, -7.6184], [-9.0042, -5.5359, -6.9141]],
        [[0.7828, 0.2208, 0.4323], [0.0892, 0.5996, 0.1319], [0.5524, 0.6389, 0.8914]],
    ),
    "deformable_detr_R_50_two_stage": (
        [[-6.7108, -4.3213, -6.3777], [-8.9014, -6.1799, -6.7240], [-6.9315, -4.4735, -6.2298]],
        [[0.2583, 0.5499, 0.4683], [0.7652, 0.9068, 0.4882], [0.5490, 0.2763, 0.0564]],
    ),
}


def skip_without_swin(name):
    if "swin" in name and importlib.util.find_spec("detectron2.modeling.backbone.swin") is None:
        pytest.skip("Detectron2 0.6 has no Swin")


def test_models_are_the_published_ones_and_each_has_both_kinds_of_configuration():
    stems = {path.stem for path in (ROOT / "configs" / "COCO-Detection").iterdir() if path.suffix in (".py", ".yaml")}
    assert set(model_zoo.list_models()) == stems and len(stems) == 4 + 5 + 6 + 6 + 1
    for name in model_zoo.list_models():
        assert isinstance(model_zoo.get_config(name), CfgNode)
        assert model_zoo.get_config(name, suffix=".py").model.num_classes == 80


@pytest.mark.parametrize("repository, number", [("facebookresearch/detr", 4), ("fundamentalvision/Deformable-DETR", 5)])
def test_published_numbers_rise_from_the_simplest_to_the_best_model_of_a_repository(repository, number):
    aps = [record.ap for record in MODELS.values() if record.repository == repository]
    assert aps == sorted(aps) and len(aps) == number


def test_models_with_a_file_on_the_hub_have_one_of_their_own_and_are_better_on_larger_objects():
    on_hub = [record for record in MODELS.values() if record.hub_repository]
    assert len({record.hub_repository for record in on_hub}) == len(on_hub) == 9
    for record in on_hub:
        assert record.ap_small < record.ap_medium < record.ap_large


def test_longer_trainings_of_a_model_have_a_better_published_number_and_the_same_size():
    pairs = {name: re.sub(r"_\d+ep$", "", name) for name in MODELS if name.endswith("ep")}
    assert len(pairs) == 6
    for longer, shorter in pairs.items():
        assert MODELS[longer].ap > MODELS[shorter].ap and MODELS[longer].epochs > MODELS[shorter].epochs == 12
        assert MODELS[longer].params == MODELS[shorter].params


def test_recipes_have_configurations_and_models_but_no_weights():
    name = "deformable_detr_R_50_two_stage_plus"
    plain, plus = (load_config(model_zoo.get_config_file(n)).MODEL.DEFORMABLE_DETR for n in (name[:-5], name))
    changed = {key: plus[key] for key in plus if plus[key] != plain[key]}
    assert changed == {"MIXED_QUERY_SELECTION": True, "LOOK_FORWARD_TWICE": True, "DN_NUMBER": 100, "DROPOUT": 0.0}
    assert name in model_zoo.list_models() and name not in MODELS
    with pytest.raises(KeyError, match=f"{name} is a recipe without published weights: train it, from deformable-detr"):
        model_zoo.get(name, trained=True)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("ep")])
def test_parameters_are_as_many_as_in_the_official_code(name):
    skip_without_swin(name)
    model = build_model(load_config(model_zoo.get_config_file(name), COCO_91))
    # The official code has the parameters of its frozen norms as buffers, and DINO's a class embedding that nothing
    # reads.
    norms = [m for m in model.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    frozen = {id(p) for norm in norms for p in norm.parameters()}
    unread = 256 if name.startswith("dino") else 0
    assert sum(p.numel() for p in model.parameters() if id(p) not in frozen) + unread == MODELS[name].params


def test_trained_configuration_names_the_published_weights_in_both_worlds():
    weights = "deformable-detr://deformable_detr_R_50"
    assert model_zoo.get_config("deformable_detr_R_50", trained=True).MODEL.WEIGHTS == weights
    assert model_zoo.get_config("deformable_detr_R_50", trained=True, suffix=".py").train.init_checkpoint == weights
    assert "ImageNet" in model_zoo.get_config("deformable_detr_R_50").MODEL.WEIGHTS


def test_untrained_model_comes_without_a_download_and_in_evaluation_mode(hub):
    model = model_zoo.get("deformable_detr_R_50_single_scale")
    assert not model.training and model.num_classes == 80 and model.device.type == "cpu"
    assert hub.requests == []


def test_trained_model_has_the_weights_that_the_hub_serves(hub):
    name = "deformable_detr_R_50_single_scale"
    state_dict = {key: tensor.clone() for key, tensor in model_zoo.get(name).state_dict().items()}
    hub.files[f"/{MODELS[name].hub_file}"] = save(state_dict)
    model = model_zoo.get(name, trained=True)
    assert [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state_dict[key])] == []


def test_unknown_model_is_told_with_those_there_are():
    with pytest.raises(KeyError, match="no model 'detr' in the zoo.*deformable_detr_R_50_two_stage"):
        model_zoo.get("detr")


def test_model_zoo_page_is_what_the_command_writes(tmp_path):
    main(["--write", str(tmp_path / "page.md")])
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8") == written, (
        "MODEL_ZOO.md is stale: run python -m deformable_detr.model_zoo --write"
    )


def test_command_prints_every_model_with_its_published_ap(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if " x " in line and not line.startswith("name")}
    assert rows.keys() == MODELS.keys()
    assert all(f" {record.ap:.1f} " in rows[name] for name, record in MODELS.items())
    # A terminal follows no links, and breaks lines that are much wider.
    assert max(map(len, lines)) <= 110 and "](" not in "".join(lines)


def test_page_tells_of_how_many_files_the_hash_is_known(monkeypatch):
    for record in MODELS.values():
        monkeypatch.setitem(MODELS, record.name, dataclasses.replace(record, sha256="0" * 64))
    downloads = sum(record.hub_repository is not None or record.address is not None for record in MODELS.values())
    assert f"The sha256 of {downloads} of the {downloads} downloads" in render_page() and downloads == 15
    first = MODELS[NAMES[0]]
    monkeypatch.setitem(MODELS, first.name, dataclasses.replace(first, sha256=None))
    assert f"The sha256 of {downloads - 1} of the {downloads} downloads" in render_page()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_published_weights_give_the_published_logits(name):
    try:
        with urllib.request.urlopen("http://images.cocodataset.org/val2017/000000039769.jpg", timeout=20) as answer:
            image = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    except OSError as error:
        pytest.skip(f"the image cannot be downloaded: {error}")
    model = build_model(load_config(model_zoo.get_config_file(name), COCO_91)).eval()
    DeformableDETRCheckpointer(model).load(MODELS[name].weights)
    resize = build_detr_augmentation(is_train=False, min_size=800, max_size=1333)[0].get_transform(image)
    image = torch.as_tensor(resize.apply_image(image).transpose(2, 0, 1).copy())
    assert image.shape[1:] == (800, 1066)
    outputs = model.predict_raw([{"image": image}])
    logits, boxes = (torch.tensor(values) for values in GOLDEN[name])
    torch.testing.assert_close(outputs["pred_logits"][-1, 0, :3, :3], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs["pred_boxes"][-1, 0, :3, :3], boxes, atol=1e-4, rtol=0)
