from pathlib import Path

import pytest
import torch

from deformable_detr.checkpoint import read_checkpoint
from deformable_detr.checkpoint.__main__ import build_cpu_model, main, parse_args

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"


@pytest.mark.parametrize("config", ("deformable_detr_R_50.yaml", "deformable_detr_R_50.py"))
@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_a_file_is_converted_and_the_report_printed(config, suffix, tmp_path, capsys):
    source, destination = str(tmp_path / "d2.pth"), str(tmp_path / f"ours{suffix}")
    model = build_cpu_model(str(CONFIGS / config), [])
    torch.save(model.backbone.bottom_up.state_dict(), source)
    overrides = ["MODEL.DEFORMABLE_DETR.NUM_QUERIES", "7"] if config.endswith(".yaml") else ["model.num_queries=7"]
    main(parse_args([source, destination, "--config-file", str(CONFIGS / config), *overrides]))
    written = read_checkpoint(destination)["model"]
    expected = {f"backbone.bottom_up.{key}": value for key, value in model.backbone.bottom_up.state_dict().items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert "Detectron2 backbone names" in capsys.readouterr().out
