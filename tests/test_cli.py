"""What command lines share: names of models, overrides, commands, and the end of a user's mistake."""

import sys

import pytest
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from deformable_detr import __main__ as program
from deformable_detr import cli, load_config
from deformable_detr.benchmark import inference
from deformable_detr.checkpoint import __main__ as checkpoint
from deformable_detr.detect import __main__ as detect
from deformable_detr.engine import argument_parser
from deformable_detr.wording import counted, message_of, name_first, suggest

NAME = "deformable_detr_R_50"


def ending(main, capsys) -> tuple[int, str]:
    """Exit status and stderr of a command line whose main function ends with an error."""
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    return ended.value.code, capsys.readouterr().err


def of_this_package(source: str):
    """A function of no arguments that stands, as far as Python knows, in a module of the package."""
    variables = {"__name__": "deformable_detr.pretended"}
    exec(f"def main(argv):\n    {source}", variables)
    return variables["main"]


# Mistakes and bugs


@pytest.mark.parametrize(
    "error, line",
    [
        ("ValueError('a must be 1, got 2')", "a must be 1, got 2"),
        ("KeyError('there is no key a')", "there is no key a"),
        ("NotImplementedError('not for b')", "not for b"),
        ("FileNotFoundError(2, 'No such file or directory', 'a.json')", "a.json: No such file or directory"),
    ],
)
def test_what_this_package_raises_ends_in_one_line_and_status_2(error, line, capsys):
    assert ending(of_this_package(f"raise {error}"), capsys) == (2, f"error: {line}\n")


def test_what_the_system_says_about_a_file_ends_in_one_line(tmp_path, capsys):
    status, err = ending(lambda _: open(tmp_path / "a.json"), capsys)
    assert (status, err) == (2, f"error: {tmp_path / 'a.json'}: No such file or directory\n")


def test_a_package_that_is_missing_is_named_with_what_to_type(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, err = ending(lambda _: __import__("cv2"), capsys)
    assert (status, err) == (2, "error: the package cv2 is missing: pip install opencv-python\n")


@pytest.mark.parametrize(
    "source, kind",
    [
        ("return {}['a']", KeyError),
        ("return int('a')", ValueError),
        ("return list(zip([1], [], strict=True))", ValueError),
        ("assert False, 'a must be b'", AssertionError),
        ("import deformable_detr.nowhere", ModuleNotFoundError),
    ],
)
def test_what_nobody_has_foreseen_keeps_its_traceback(source, kind):
    with pytest.raises(kind):
        cli.run(of_this_package(source))


def test_what_another_package_raises_keeps_its_traceback():
    with pytest.raises(ValueError, match="num_workers"):
        cli.run(lambda _: DataLoader([], num_workers=-1))


class Unreadable:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise OSError("cannot read image a.jpg:\nit is empty")


def test_an_error_of_a_loading_process_is_told_without_its_stack(capsys):
    status, err = ending(lambda _: list(DataLoader(Unreadable(), num_workers=1)), capsys)
    assert (status, err) == (2, "error: cannot read image a.jpg:\nit is empty\n")


def test_another_process_than_the_main_one_waits_and_says_which_it_is(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    status, err = ending(of_this_package("raise ValueError('no')"), capsys)
    assert (status, err) == (2, "error in process 3: no\n") and len(waited) == 1


def test_the_launcher_says_nothing_more_about_a_mistake_that_its_process_has_told(capsys):
    def spawned(status):
        def main(_):
            raise ProcessExitedException("process 0 terminated", error_index=0, error_pid=1, exit_code=status)

        return main

    assert ending(spawned(2), capsys) == (2, "")
    with pytest.raises(ProcessExitedException):
        cli.run(spawned(1))


def test_a_command_without_a_status_succeeds_and_one_with_a_status_has_it():
    assert cli.run(lambda argv: None) == 0
    assert cli.run(lambda argv: len(argv), ["a", "b"]) == 2


# Names of models and overrides


@pytest.mark.parametrize("spelling", ["--model", "--config-file"])
def test_every_command_takes_a_model_by_the_same_words(spelling):
    assert detect.parse_args(["a.jpg", spelling, NAME]).model == NAME
    assert checkpoint.parse_args(["a.pth", "b.pth", spelling, NAME]).model == NAME
    assert argument_parser().parse_args([spelling, NAME]).config_file == NAME
    parser = cli.make_parser("benchmark model")
    inference.add_arguments(parser)
    assert parser.parse_args([spelling, NAME, "b.yaml"]).variants == [NAME, "b.yaml"]
    assert parser.parse_args(["--variants", NAME]).variants == [NAME]


@pytest.mark.parametrize("word", [[], ["--opts"]], ids=["bare", "--opts"])
def test_overrides_may_follow_opts_everywhere_and_stand_bare_where_they_did(word):
    opts = ["SOLVER.MAX_ITER", "1"]
    assert argument_parser().parse_args(["--config-file", NAME, *word, *opts]).opts == opts
    assert checkpoint.parse_args(["a.pth", "b.pth", "--config-file", NAME, *word, *opts]).opts == opts
    assert detect.parse_args(["a.jpg", "--model", NAME, "--opts", *opts]).opts == opts


# One name for all commands


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (arguments of deformable-detr) -> exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/deformable-detr", *arguments])
        try:
            status = program.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_a_help_that_names_it(name, call):
    status, out, _ = call(name, "--help")
    assert status == 0 and out.startswith(f"usage: deformable-detr {name} [-h]")


def test_without_a_command_all_are_listed(call):
    status, out, _ = call()
    assert status == 0
    for name, (*_, what) in program.COMMANDS.items():
        assert f"  {name}" in out and what in out


def test_an_unknown_command_is_refused_with_those_there_are(call):
    status, _, err = call("detct")
    assert status == 2 and "'detct'" in err and "detect" in err


def test_a_mistake_in_a_command_ends_in_one_line(call):
    status, out, err = call("detect", "a.jpg", "--model", "nowhere.yaml", "--output", "/proc/out")
    assert (status, out) == (2, "") and err.startswith("error: cannot write to output folder /proc/out: ")
    assert err.count("\n") == 1


def test_a_command_of_a_command_is_named_in_full(call):
    status, out, _ = call("benchmark", "op", "--help")
    assert status == 0 and out.startswith("usage: deformable-detr benchmark op [-h]")


# Wording


def test_names_beyond_the_first_are_counted():
    assert name_first([]) == "none"
    assert name_first(["a", "b"], limit=2) == "a, b"
    assert name_first(["a", "b", "c"], limit=2) == "a, b and 1 more"


def test_a_noun_is_singular_for_one_alone():
    assert [counted(n, "level") for n in (0, 1, 2)] == ["0 levels", "1 level", "2 levels"]


def test_the_nearest_name_is_suggested_and_no_far_one():
    assert suggest("deformable_detr_R50", [NAME, "retinanet"]) == f"; did you mean {NAME}?"
    assert suggest("yolo", [NAME]) == ""


def test_an_error_without_words_is_told_by_its_kind():
    assert message_of(ValueError()) == "ValueError" and message_of(KeyError()) == "KeyError"


def test_reading_a_configuration_is_told_like_any_mistake(capsys):
    status, err = ending(lambda _: load_config("nowhere.yaml"), capsys)
    assert status == 2 and err.startswith("error: there is no configuration file 'nowhere.yaml'")
