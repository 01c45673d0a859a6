from pathlib import Path

import pytest
import torch

from deformable_detr.checkpoint import CheckpointError, read_checkpoint
from deformable_detr.checkpoint.__main__ import main
from deformable_detr.config import load_config
from deformable_detr.loading import build_model

from .conftest import SMALL_NODE, SMALL_RESNET, as_opts

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"


@pytest.mark.parametrize("config", ("deformable_detr_R_50.yaml", "deformable_detr_R_50.py"))
@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_a_file_is_converted_and_the_report_printed(config, suffix, tmp_path, capsys):
    source, destination = str(tmp_path / "d2.pth"), str(tmp_path / f"ours{suffix}")
    model = build_model(load_config(str(CONFIGS / config)))
    torch.save(model.backbone.bottom_up.state_dict(), source)
    overrides = ["MODEL.DEFORMABLE_DETR.NUM_QUERIES", "7"] if config.endswith(".yaml") else ["model.num_queries=7"]
    main([source, destination, "--config-file", str(CONFIGS / config), *overrides])
    written = read_checkpoint(destination)["model"]
    expected = {f"backbone.bottom_up.{key}": value for key, value in model.backbone.bottom_up.state_dict().items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert "Detectron2 backbone names" in capsys.readouterr().out


def run_for_two_stage(*arguments):
    config = str(CONFIGS / "deformable_detr_R_50_two_stage.yaml")
    main([*map(str, arguments), "--config-file", config])


@pytest.fixture(scope="module")
def two_stage():
    return build_model(load_config(str(CONFIGS / "deformable_detr_R_50_two_stage.yaml")))


@pytest.mark.parametrize(("to", "suffix"), (("official", ".pth"), ("transformers", ".safetensors")))
def test_exported_file_has_the_other_projects_names_and_converts_back(to, suffix, two_stage, tmp_path):
    source, exported, back = tmp_path / "model_final.pth", tmp_path / f"exported{suffix}", tmp_path / f"back{suffix}"
    torch.save({"model": two_stage.state_dict()}, source)
    run_for_two_stage(source, exported, "--to", to, "--coco-ids")
    run_for_two_stage(exported, back)

    names = read_checkpoint(str(exported))["model"]
    expected = {
        "official": "transformer.decoder.class_embed.6.bias",
        "transformers": "model.decoder.class_embed.6.bias",
    }
    assert len(names[expected[to]]) == 91 and len(names) == {"official": 630, "transformers": 654}[to]
    written = read_checkpoint(str(back))
    assert all(torch.equal(tensor, written["model"][key]) for key, tensor in two_stage.state_dict().items())
    assert written["class_names"][79] == "toothbrush"


def test_a_backbone_alone_is_not_exported_as_a_detector(two_stage, tmp_path):
    torch.save(two_stage.backbone.bottom_up.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"backbone.pth leaves \d+ parameters as initialised, such as"):
        run_for_two_stage(tmp_path / "backbone.pth", tmp_path / "out.pth", "--to", "official")


def test_raw_ids_without_another_projects_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["a.pth", "b.pth", "--config-file", "c.yaml", "--coco-ids"])
    assert "--coco-ids needs --to" in capsys.readouterr().err


def test_averaged_weights_are_converted_when_asked_for(two_stage, tmp_path, capsys):
    averages = {key: torch.full_like(value, 3) for key, value in two_stage.state_dict().items()}
    torch.save({"model": two_stage.state_dict(), "ema_state": averages}, tmp_path / "x.pth")
    for query, found in (("", "Not the file's averaged weights"), ("?ema=True", "Averaged weights (ema_state)")):
        run_for_two_stage(f"{tmp_path}/x.pth{query}", tmp_path / "y.pth")
        assert found in capsys.readouterr().out
    assert (read_checkpoint(str(tmp_path / "y.pth"))["model"]["transformer.level_embed"] == 3).all()


def test_averages_of_own_files_are_converted_without_asking(build, tmp_path, capsys):
    trained = build().state_dict()
    averaged = {key: torch.full_like(value, 3) for key, value in trained.items()}
    torch.save({"model": trained, "ema": {"model": averaged, "updates": 7}}, tmp_path / "x.pth")
    sizes = as_opts("MODEL.DEFORMABLE_DETR", SMALL_NODE) + as_opts("MODEL.RESNETS", SMALL_RESNET)
    files = [f"{tmp_path}/x.pth", f"{tmp_path}/y.pth", "--to", "official"]
    main([*files, "--config-file", str(CONFIGS / "deformable_detr_R_50.yaml"), *sizes])
    assert (read_checkpoint(f"{tmp_path}/y.pth")["model"]["transformer.level_embed"] == 3).all()
    assert "Weights averaged over 7 updates (ema)" in capsys.readouterr().out
