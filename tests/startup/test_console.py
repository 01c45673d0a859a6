"""What a user sees of a run in the terminal, and what is in its log file."""

import logging
import os
import warnings
from collections.abc import Callable

import pytest
from detectron2.utils.logger import setup_logger
from torch import nn

from deformable_detr import collect_env, load_config
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.engine import Trainer, argument_parser, main
from deformable_detr.startup import processors
from deformable_detr.startup.console import set_up_console, set_up_missing_loggers
from deformable_detr.training.metrics import read_metrics
from deformable_detr.wording import explain_missing_c


@pytest.fixture(params=["yaml", "lazy"])
def start(request, tiny_yaml, tiny_lazy, write_coco) -> Callable[..., None]:
    """Train two iterations on tiny data, with values (yaml, lazy) beside."""
    flags = write_coco("train").flags("train") + write_coco("val").flags("val")

    def run(*opts: tuple[str, str, object]) -> None:
        lazy = request.param == "lazy"
        given = [("SOLVER.MAX_ITER", "train.max_iter", 2), *opts]
        pairs = [f"{key}={value}" for _, key, value in given]
        words = [word for key, _, value in given for word in (key, str(value))]
        arguments = [*tiny_lazy(), *pairs] if lazy else [*tiny_yaml(), *words]
        main(argument_parser().parse_args([*flags, *arguments]))

    return run


def test_the_terminal_shows_the_course_of_a_run_and_the_file_all_of_it(start, capsys, tmp_path):
    start()
    shown, file = capsys.readouterr().out, (tmp_path / "output" / "log.txt").read_text()
    # What was found, what is trained, for how long: one line each.
    assert shown.count("Data checked, nothing is wrong: 4 images with 4 objects to train on; 4 images with 4 ") == 1
    assert (
        shown.count("Model: DeformableDETR, 11.4 M parameters, 11.2 M of them trained, 3 classes; in float32 on") == 1
    )
    assert shown.count("Training: 2 iterations of 2 images, 1 epochs of 4; learning rate 0.0002") == 1
    assert shown.count("Configuration: ") == 1 and "log.txt" in shown
    # The first iteration, though a line comes every 20 of them.
    assert shown.count("  total_loss: ") == 2 and " iter: 0  total_loss: " in shown
    for words in ("Environment info", "Namespace(", "(backbone)", "BASE_LR:", "Category ids", "boxes.json"):
        assert words not in shown, words
    assert "RandomApply(AugmentationList[ResizeShortestEdge([400, 500, 600], choice), RandomCrop(" in shown
    assert "object at 0x" not in shown + file and "\x1b" not in shown + file
    for words in ("Environment info", "Namespace(", "(backbone)", "Contents of args.config_file", "Data checked"):
        assert words in file, words
    assert "detectron2._C          not built, and not needed here" in file


def test_the_first_line_is_for_the_terminal_alone(start, tmp_path):
    start()
    assert [iteration for iteration, row in read_metrics(tmp_path / "output").items() if "total_loss" in row] == [1]


def test_loading_processes_without_cores_are_told_of_once_and_by_their_key(start, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers", 2))
    assert not [warning for warning in caught if "DataLoader will create" in str(warning.message)]
    told = "num_workers is 2: 2 loading processes on 1 cores may be slower than fewer"
    assert (tmp_path / "output" / "log.txt").read_text().lower().count(told) == 1


def test_colours_are_for_terminals_and_those_who_ask_for_them(monkeypatch, capsys, tmp_path):
    for name, colours in (("plain", None), ("asked", "1")):
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        if colours:
            monkeypatch.setenv("FORCE_COLOR", colours)
        logging.getLogger("detectron2").handlers = []
        set_up_console(str(tmp_path / name))
        logging.getLogger("detectron2").info("\x1b[38;5;204mMODEL\x1b[39m")
        assert ("\x1b[38;5;204mMODEL" in capsys.readouterr().out) == bool(colours)
        file = (tmp_path / name / "log.txt").read_text()
        assert "MODEL" in file and "\x1b" not in file


def test_a_setup_called_twice_shows_every_line_once(capsys, tmp_path):
    for _ in range(2):
        set_up_console(str(tmp_path))
    logging.getLogger("detectron2").info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_a_trainer_of_a_script_logs_what_nobody_else_does_and_every_line_once(
    tiny_yaml, write_coco, capsys, monkeypatch, tmp_path
):
    data, (_, path, *opts) = write_coco(), tiny_yaml()
    register_coco_data("here", data.json, data.images)
    opts += ["DATASETS.TRAIN", "('here',)", "DATASETS.TEST", "()", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    # A model that takes no time to build.
    monkeypatch.setattr(Trainer, "build_model", lambda *_: nn.Linear(2, 2))
    setup_logger(str(tmp_path / "output"))  # By default_setup, which does nothing for this project's.
    handlers = list(logging.getLogger("detectron2").handlers)
    for _ in range(2):
        Trainer(load_config(path, opts))
    shown, file = capsys.readouterr().out, (tmp_path / "output" / "log.txt").read_text()
    assert shown.count("Training: 4 iterations of 2 images") == file.count("Training: 4 iterations of 2 images") == 2
    assert logging.getLogger("detectron2").handlers == handlers
    assert logging.getLogger("fvcore").isEnabledFor(logging.INFO)


def test_a_level_that_a_script_has_given_stays(tmp_path):
    logging.getLogger("deformable_detr").setLevel(logging.ERROR)
    set_up_missing_loggers(str(tmp_path))
    assert logging.getLogger("deformable_detr").level == logging.ERROR
    assert not logging.getLogger("deformable_detr").handlers


# The environment


def test_the_report_of_the_environment_alarms_nobody(caplog):
    info = collect_env.collect_env_info()
    assert "not built correctly" not in info and "No CUDA runtime" not in caplog.text


def test_an_extension_that_cannot_be_loaded_is_reported_as_it_is():
    broken = "detectron2._C          not built correctly: undefined symbol: x"
    assert explain_missing_c(broken) == broken


# Other programs


@pytest.mark.parametrize(
    "load, cores, threads, told", [(0.4, 2, 2, None), (3.04, 2, 2, "3.0 processes"), (1, 64, 8, None)]
)
def test_a_busy_machine_is_told_of_with_what_helps(monkeypatch, load, cores, threads, told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = processors.describe_load()
    assert (line is None) == (told is None)
    if line:
        assert told in line and "OMP_NUM_THREADS=1" in line and "\n" not in line


def test_a_run_on_a_busy_machine_begins_with_that(start, monkeypatch, tmp_path):
    def stop(*_):
        raise SystemExit

    monkeypatch.setattr("deformable_detr.startup.console.describe_load", lambda: "This machine is busy")
    monkeypatch.setattr("deformable_detr.startup.setup.default_setup", stop)
    with pytest.raises(SystemExit):
        start()
    assert "This machine is busy" in (tmp_path / "output" / "log.txt").read_text().splitlines()[0]
