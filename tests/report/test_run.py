import pytest
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from deformable_detr.report.run import NoData, find_dataset, read_run

LAZY = {
    "train": {"max_iter": 100},
    "model": {"_target_": "some.Model"},
    "dataloader": {"test": {"dataset": {"_target_": "some.function", "names": ["first_val", "last_val"]}}},
}
ENVIRONMENT = """[11/22 10:00:00] detectron2 INFO: Environment info:
-----------  ----
PyTorch      {version}
-----------  ----
PyTorch built with:
  - GCC 13.3

[11/22 {time}] d2.utils.events INFO:  eta: 0:00:01  iter: 19
"""


def progress(run_folder, **kwargs):
    return str(read_run(run_folder.path).progress(**kwargs))


def test_run_that_writes_is_running(run_folder):
    assert progress(run_folder) == "iteration 20 of 100, running"


def test_silent_run_has_stopped(run_folder):
    run_folder.age(600)
    assert progress(run_folder) == "iteration 20 of 100, stopped"


def test_slow_run_may_be_silent_for_longer(run_folder):
    run_folder.write_metrics({"iteration": 19, "total_loss": 3.0, "time": 30.0})
    run_folder.age(20 * 30 * 2)
    assert progress(run_folder) == "iteration 20 of 100, running"
    run_folder.age(20 * 30 * 4)
    assert progress(run_folder) == "iteration 20 of 100, stopped"


def test_run_that_logs_less_often_may_be_silent_for_longer(run_folder):
    run_folder.write_metrics({"iteration": 199, "total_loss": 3.0, "time": 3.0})
    config = {"MODEL": {"WEIGHTS": ""}, "SOLVER": {"MAX_ITER": 1000, "LOG_PERIOD": 200}}
    (run_folder.path / "config.yaml").write_text(CfgNode(config).dump())
    run_folder.age(200 * 3 * 2)
    assert progress(run_folder) == "iteration 200 of 1,000, running"
    run_folder.age(200 * 3 * 4)
    assert progress(run_folder) == "iteration 200 of 1,000, stopped"


def test_run_with_its_last_evaluation_is_finished(run_folder):
    run_folder.write_metrics({"iteration": 99, "total_loss": 3.0}, {"iteration": 100, "bbox/AP": 1.0})
    assert progress(run_folder) == "iteration 100 of 100, finished"


def test_run_that_still_evaluates_at_its_end_is_running(run_folder):
    run_folder.write_metrics({"iteration": 99, "total_loss": 3.0})
    assert progress(run_folder) == "iteration 100 of 100, running"


def test_evaluation_before_the_next_iteration_is_no_progress(run_folder):
    run_folder.write_metrics({"iteration": 39, "total_loss": 3.0}, {"iteration": 40, "bbox/AP": 1.0})
    assert progress(run_folder) == "iteration 40 of 100, running"


def test_length_of_a_run_without_a_config_is_not_known(run_folder):
    (run_folder.path / "config.yaml").unlink()
    assert progress(run_folder) == "iteration 20 of ?, running"


def test_lazy_config_is_read_by_its_own_names(run_folder):
    LazyConfig.save(OmegaConf.create(LAZY), str(run_folder.path / "config.yaml"))
    run = read_run(run_folder.path)
    assert run.setting("max_iter") == 100
    assert run.setting("lr") is None
    assert find_dataset(run) == "last_val"  # the one whose detections are in the folder


def test_repaired_annotations_are_preferred_where_the_run_repaired_them(evaluated):
    log = evaluated.path / "log.txt"
    (evaluated.data / "val.json").rename(evaluated.path / "val_repaired.json")
    (evaluated.data / "val.json").write_text("{}")
    log.write_text(log.read_text().replace("repair=False", "repair=True"))
    assert find_dataset(read_run(evaluated.path)) == "user_val"


def evaluated_file(run_folder):
    """The annotation file that a report takes for that of the last evaluation."""
    return MetadataCatalog.get(find_dataset(read_run(run_folder.path))).json_file


@pytest.mark.parametrize(
    "command",
    [
        {"data": "my/yolo", "val_json": None},
        {"val_json": "my/xml", "val_images": "my/jpg"},
        {"val_json": "relative/val.json", "val_images": "relative"},
        {"eval_only": True, "data": None, "val_json": None, "val_images": None},
    ],
)
def test_data_of_a_training_are_those_that_it_has_recorded(evaluated, command):
    """Whatever it was started with, and in an evaluation of the folder as well."""
    evaluated.record(evaluated.data / "val.json")
    evaluated.log_command(**command)
    assert evaluated_file(evaluated) == evaluated.data / "val.json"


def test_recorded_data_are_named_on_the_page_where_the_command_names_none(evaluated):
    evaluated.record(evaluated.data / "val.json")
    evaluated.log_command(data="my/yolo", val_json=None)
    assert read_run(evaluated.path).dataset_names("test") == [str(evaluated.data / "val.json")]


def test_an_evaluation_on_other_data_is_not_on_the_recorded_ones(evaluated):
    evaluated.record(evaluated.data / "absent.json")
    evaluated.log_command(eval_only=True, val_json=str(evaluated.data / "val.json"), val_images=str(evaluated.data))
    assert evaluated_file(evaluated) == evaluated.data / "val.json"


@pytest.mark.parametrize(
    "arguments", [{"data": "my/yolo"}, {"val_json": "data.yaml", "val_images": "my"}, {"val_json": ".", "data": None}]
)
def test_an_evaluation_on_folders_asks_for_their_images(evaluated, arguments):
    evaluated.record(evaluated.data / "val.json")
    evaluated.log_command(eval_only=True, **arguments)
    with pytest.raises(NoData, match=r"on folders, .*: give --val-json .*val_coco\.json and --val-images"):
        find_dataset(read_run(evaluated.path))


def test_recorded_file_that_the_run_has_written_may_have_moved_with_its_folder(evaluated):
    evaluated.record(evaluated.path / "val_coco.json")
    (evaluated.data / "val.json").rename(evaluated.path / "val_coco.json")
    evaluated.path = evaluated.path.rename(evaluated.path.with_name("renamed"))
    assert evaluated_file(evaluated) == evaluated.path / "val_coco.json"


def test_arguments_are_read_as_python_writes_them(run_folder):
    values = {"opts": ["a.val_json=1", "x, y"], "val_json": 'Anna\'s "data"/val.json', "data": None, "eval_only": True}
    run_folder.log_command(**values)
    run = read_run(run_folder.path)
    assert [run.argument(name) for name in ("val_json", "data", "eval_only", "absent")] == [*values.values()][1:] + [
        None
    ]
    run_folder.log_command(val_json="Anna's/val.json")
    assert read_run(run_folder.path).argument("val_json") == "Anna's/val.json"


def test_versions_are_those_of_the_last_start(run_folder):
    starts = ENVIRONMENT.format(version="2.4", time="10:01:00"), ENVIRONMENT.format(version="2.5", time="11:02:03")
    (run_folder.path / "log.txt").write_text("".join(starts))
    run = read_run(run_folder.path)
    assert run.environment().split() == ["PyTorch", "2.5"]
    assert run.log_times() == ("11/22 10:00:00", "11/22 11:02:03")


def test_log_without_versions_says_so(run_folder):
    with pytest.raises(NoData, match="Environment info"):
        read_run(run_folder.path).environment()


def test_folder_that_is_no_run_is_an_error_that_says_what_is_expected(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*OUTPUT_DIR"):
        read_run(tmp_path / "nowhere")
    (run_folder.path / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="no metrics.json.*train_net.py"):
        read_run(run_folder.path)


def test_run_without_a_complete_line_of_metrics_is_an_error_that_names_the_file(run_folder):
    run_folder.write_metrics({"iteration": 19}, end="")
    with pytest.raises(ValueError, match="metrics.json has no complete line"):
        read_run(run_folder.path)
