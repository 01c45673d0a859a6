import csv
import importlib.util
import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

from deformable_detr.data.checks import load_coco_data
from deformable_detr.detect.__main__ import parse_args as detect_arguments
from deformable_detr.engine import argument_parser

TOOL = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
_spec = importlib.util.spec_from_file_location("demo", TOOL)
demo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(demo)


def write_metrics(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_summary_reports_the_last_evaluation(tmp_path):
    first, last = {"bbox/AP": 10.0, "bbox/AP50": 20.0}, {"bbox/AP": 50.04, "bbox/AP50": 80.06}
    write_metrics(tmp_path, {"iteration": 9, "time": 2.0, **first}, {"iteration": 10, **last})
    write_metrics(tmp_path / "photos", {"iteration": 4, "time": 1.2, "bbox/AP": 96.39, "bbox/AP50": 99.0})
    summary = demo.summarize(tmp_path)
    assert "AP 50.0, AP50 80.1" in summary
    assert "took 20 s" in summary
    assert str(tmp_path / "report.html") in summary
    assert "the ten that it was trained on: AP 96.4, AP50 99.0" in summary and "took 6 s" in summary
    assert f"What it draws is what it was trained on: {tmp_path}/photos/detections" in summary


def test_summary_ends_with_what_to_type_next(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "photos"):
        write_metrics(folder, {"iteration": 9, "time": 2.0, "bbox/AP": 1.0, "bbox/AP50": 2.0})
    monkeypatch.setattr(sys, "prefix", str(demo.ROOT / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    lines = demo.summarize(tmp_path).splitlines()
    assert "source .venv/bin/activate" in lines
    command = " ".join(lines[-3:]).replace("\\", "")
    args = argument_parser().parse_args(shlex.split(command)[2:])
    assert args.weights == "deformable-detr://deformable_detr_R_50_two_stage" and args.opts == [
        "OUTPUT_DIR",
        "output/mine",
    ]
    assert (demo.ROOT / args.config_file).is_file()
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert "activate" not in demo.summarize(tmp_path)


def test_run_without_an_ap50_fails(tmp_path):
    write_metrics(tmp_path, {"iteration": 9, "total_loss": 2.0})
    with pytest.raises(SystemExit, match="AP50"):
        demo.summarize(tmp_path)


@pytest.mark.parametrize(
    "code, status", [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 128 + 15)]
)
def test_failing_command_ends_the_demo_with_its_status(code, status):
    with pytest.raises(SystemExit) as failure:
        demo.run(["-c", code])
    assert failure.value.code == status


def test_interrupt_ends_the_demo_with_one_sentence(capfd):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    # A process started in the background of a shell ignores the signal, and so would this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            demo.run(["-c", code])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capfd.readouterr().err == "\nInterrupted. Called again, the demo goes on from the last checkpoint.\n"


def test_every_command_of_the_demo_runs_in_order_and_resumes_where_a_checkpoint_is(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(demo, "run", commands.append)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    for folder in (tmp_path, tmp_path / "photos"):
        write_metrics(folder, {"iteration": 9, "time": 2.0, "bbox/AP": 1.0, "bbox/AP50": 2.0})
    demo.main()
    first, second = commands[:3], commands[3:]
    assert [command[0] for command in first] == ["tools/make_shapes_dataset.py", "train_net.py", "-m"]
    assert [command[:2] for command in second] == [["train_net.py", "--config-file"], ["-m", "deformable_detr.detect"]]
    assert not any("--resume" in command for command in commands)
    assert commands[2] == ["-m", "deformable_detr.report", str(tmp_path), "--sheet", str(tmp_path / "detections.png")]
    (tmp_path / "last_checkpoint").write_text("model_0000499.pth")
    commands.clear()
    demo.main()
    assert ["--resume" in command for command in commands] == [False, True, False, False, False]
    (tmp_path / "photos" / "last_checkpoint").write_text("model_0000199.pth")
    demo.main()
    assert ["--resume" in command for command in commands[5:]] == [False, True, False, True, False]
    # The commands are ones that their programs take.
    assert argument_parser().parse_args(commands[3][1:]).train_json == "tools/demo_photos/instances.json"
    assert detect_arguments(commands[4][2:]).inputs == ["tools/demo_photos/images"]


def test_fresh_deletes_what_an_earlier_call_left(tmp_path, monkeypatch):
    output = tmp_path / "demo"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000499.pth")

    def train(command):
        assert "--resume" not in command
        for folder in (output, output / "photos"):
            write_metrics(folder, {"iteration": 9, "time": 2.0, "bbox/AP": 1.0, "bbox/AP50": 2.0})

    monkeypatch.setattr(demo, "run", train)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(output), "--fresh"])
    demo.main()
    assert not (output / "last_checkpoint").exists()


def test_a_busy_machine_is_told_of_before_the_first_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "describe_load", lambda: "This machine is busy")

    def run(command):
        assert capsys.readouterr().out == "This machine is busy\n"
        raise SystemExit(3)

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(SystemExit, match="3"):
        demo.main(["--output", str(tmp_path)])


def test_every_photo_is_annotated_credited_and_free_to_be_changed():
    folder = demo.ROOT / demo.PHOTOS
    data = load_coco_data(str(folder / "instances.json"), str(folder / "images"))
    assert not data.problems, data.problems
    content = data.content
    assert [entry["name"] for entry in content["licenses"]] == ["Attribution License"]
    with (folder / "CREDITS.csv").open(newline="") as file:
        credits = {row["file_name"]: row for row in csv.DictReader(file)}
    photos = {path.name: path for path in (folder / "images").iterdir()}
    assert photos.keys() == credits.keys() == {image["file_name"] for image in content["images"]} and len(photos) == 10
    for row in credits.values():
        assert row["license_name"] == "Attribution License"
        assert row["license_url"] == "http://creativecommons.org/licenses/by/2.0/"
        assert "staticflickr.com" in row["flickr_url"] and row["flickr_photo_page"].startswith(
            "https://www.flickr.com/"
        )
    assert all(path.stat().st_size <= 60_000 for path in photos.values())
