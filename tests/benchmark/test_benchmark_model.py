"""`python -m deformable_detr.benchmark model|train` on small images."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from deformable_detr.benchmark.__main__ import main
from deformable_detr.benchmark.inference import Contender, count_flops, make_inference, measure, tf32
from deformable_detr.benchmark.launches import count_launches
from deformable_detr.benchmark.peers import Ours, build, make_batch
from deformable_detr.benchmark.timing import peak_memory, summarise
from deformable_detr.benchmark.train import make_step
from deformable_detr.modeling import prepare_for_inference

VARIANT = "deformable_detr_R_50_two_stage"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, tiny_yaml):
    """Run a benchmark of a tiny two-stage model by command line; returns the rows of its JSON file."""

    def main_with(command, *arguments, opts=()):
        _, config, *tiny = tiny_yaml("_two_stage")
        path = tmp_path / "out.json"
        arguments = [
            command,
            "--variants",
            config,
            "--rounds",
            "1",
            "--json",
            str(path),
            *arguments,
            "--opts",
            *tiny,
            *opts,
        ]
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
        main()
        assert "implementation" in capsys.readouterr().out
        return json.loads(path.read_text())["results"]

    return main_with


def test_ratio_is_the_median_over_rounds_of_time_per_reference_time():
    numbers = summarise([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert numbers["ms"] == 4.0 and numbers["ratio"] == 2.0
    assert numbers["spread"] == pytest.approx((6 - 2) / 4)


def test_peak_memory_counts_what_lives_at_the_same_time():
    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b * 2

    # a and b, then b and the product: never three.
    assert peak_memory(call, "cpu") == pytest.approx(2, abs=0.01)


def test_flops_count_what_a_hand_adds_up():
    """In multiply-adds: a ResNet-50 has 4.09 G for 224 x 224; 64 x 96 pixels give 128 cells, and as many queries."""
    batch = make_batch(64, 96, size=1, device="cpu")
    flops = count_flops(build("deformable_detr", VARIANT, batch).model, batch)
    resnet = 4.09e9 * (64 * 96) / 224**2
    S = Lq = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    feed_forward, samples = 2 * 256 * 1024, 8 * 4 * 4 * 4 * 32
    encoder = 6 * S * (256 * (256 + 256 + 128 + 256) + samples + feed_forward)
    self_attention, heads = 4 * 256 * 256 + 2 * Lq * 256, 2 * 256 * 256 + 4 * 256 + 80 * 256
    cross_attention = 256 * (256 + 128 + 256) + samples
    decoder = 6 * Lq * (self_attention + cross_attention + feed_forward + heads) + 6 * S * 256 * 256
    # The rest: projections of levels and proposals, normalisation.
    assert resnet + encoder + decoder < 1e9 * flops < 1.1 * (resnet + encoder + decoder)


def test_transformers_gets_the_same_weights():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    batch = make_batch(128, 160, size=1, device="cpu")
    with torch.inference_mode():
        detections = build("deformable_detr", VARIANT, batch)(batch)[0]["instances"]
        scores, _ = build("transformers", VARIANT, batch)(batch)
    torch.testing.assert_close(detections.scores, scores[0])


@pytest.mark.parametrize(
    "variant, opts, message",
    [
        # Five encoder layers of six, with 16 parameters each.
        ("deformable_detr_R_50", ["ENC_LAYERS", "5"], r"differs in 16 parameters, model\.encoder\.layers\.5\..*"),
        ("dino_R_50_4scale", [], r"transformers has no model with .*mixed_query_selection.*"),
    ],
)
def test_what_transformers_cannot_be_is_refused_in_one_line(variant, opts, message):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    opts = [f"MODEL.DEFORMABLE_DETR.{opts[0]}", opts[1]] if opts else []
    with pytest.raises(ValueError, match=message + "; --peers without transformers leaves it out$"):
        build("transformers", variant, make_batch(64, 96, size=1, device="cpu"), opts=opts)


def test_tf32_is_on_within_its_calls_alone():
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    with tf32("float32"):
        assert flags() == before
    with pytest.raises(ZeroDivisionError), tf32("tf32"):
        assert before != flags() == (True, True)
        raise ZeroDivisionError
    assert flags() == before


def test_model_benchmark_has_a_row_for_every_combination(run):
    rows = run("model", "--sizes", "64x96", "--batches", "1", "2", "--peers", "--dtypes", "float32", "bfloat16")
    assert [(row["N"], row["dtype"]) for row in rows] == [
        (1, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"),
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1 and all(row["ms"] > 0 and row["MiB"] > 0 for row in rows)
    assert rows[2]["MiB"] > rows[0]["MiB"] and rows[2]["GFLOPs"] == rows[0]["GFLOPs"]


@pytest.mark.parametrize("graphs, memory", [(None, None), (True, None), (False, 5.0)])
def test_the_memory_of_replayed_graphs_is_not_told_as_none(monkeypatch, graphs, memory):
    module = "deformable_detr.benchmark.inference"
    monkeypatch.setattr(f"{module}.build", lambda *_, **__: SimpleNamespace(model=None))
    monkeypatch.setattr(f"{module}.count_flops", lambda *_: 1.0)
    monkeypatch.setattr(f"{module}.time_contenders", lambda contenders, *_: [{"ms": 1.0}] * len(contenders))
    monkeypatch.setattr(f"{module}.peak_memory", lambda *_: 5.0)
    modes = ("eager", "prepared")
    contenders = [Contender({"implementation": "a", "mode": mode}, torch.nn.Identity(), int) for mode in modes]
    args = SimpleNamespace(opts=[], no_memory=False, cuda_graphs=graphs)
    on_gpu, on_cpu = (measure(contenders, "", SimpleNamespace(images=[0], device=d), args) for d in ("cuda:0", "cpu"))
    assert [row["MiB"] for row in on_gpu] == [5.0, memory] and [row["MiB"] for row in on_cpu] == [5.0, 5.0]


def test_launches_of_a_step_are_those_of_its_model_and_its_optimizer(run):
    (row,) = run("train", "--sizes", "64x96", "--launches", "--peers", "--options", "default")
    assert row["forward"] > 100 and row["backward"] > 100 and 0 < row["optimizer"] < 20 and "ms" not in row
    (detection,) = run("model", "--sizes", "64x96", "--launches", "--peers")
    assert detection["forward"] < row["forward"] and "backward" not in detection


def test_a_prepared_model_dispatches_less_than_half_of_the_operations(run):
    modes = ("--modes", "eager", "prepared", "--precision", "bfloat16")
    eager, prepared = run("model", "--sizes", "128x160", "--launches", "--peers", *modes)
    assert prepared["mode"] == "prepared" and prepared["forward"] < eager["forward"] / 2


def test_a_step_and_a_prepared_inference_dispatch_no_more_than_they_may():
    """2,064 and 521 in the standard model too: widths, which are small here, change no count."""
    opts = ["MODEL.DEFORMABLE_DETR.HIDDEN_DIM", 32, "MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", 8]
    opts += [
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        16,
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        8,
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        8,
    ]
    batch = make_batch(128, 160, size=1, device="cpu")
    ours = build("deformable_detr", VARIANT, batch, opts=[str(value) for value in opts])
    detector = Ours(prepare_for_inference(ours.model, dtype=torch.bfloat16)).eval()
    calls = make_step(ours, batch, dtype="bfloat16"), make_inference(detector, batch, dtype="bfloat16")
    for call in calls:
        call()  # The first one fills caches.
    step, inference = (count_launches(call, model).total() for call, model in zip(calls, (ours, detector), strict=True))
    assert step <= 2100
    assert inference <= 530


def test_train_benchmark_shows_what_checkpointing_saves(run):
    # So wide that the peak is in the transformer.
    opts = ["MODEL.DEFORMABLE_DETR.ENC_LAYERS", "8", "MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", "4096"]
    default, checkpointed = run("train", "--sizes", "128x128", "--memory-only", "--peers", opts=opts)
    assert (default["option"], checkpointed["option"]) == ("default", "checkpoint")
    assert checkpointed["MiB"] < default["MiB"]


def test_the_profiler_is_not_heard_where_memory_is_measured_and_all_else_is(capfd):
    def call():
        print("a warning of the call", file=sys.stderr, flush=True)
        torch.empty(2**18)

    assert peak_memory(call, "cpu") == 1.0
    assert capfd.readouterr().err == "a warning of the call\n"
