"""What Detectron2's own tools do with these configurations: a test for the rows of the table in docs/detectron2.md.

The tools are not in its package. Each test makes the calls by which a tool meets the model, the data or the optimiser.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.benchmark import DataLoaderBenchmark
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.analysis import FlopCountAnalysis, activation_count_operators, parameter_count_table
from detectron2.utils.visualizer import Visualizer
from omegaconf import DictConfig

from deformable_detr import add_deformable_detr_config
from deformable_detr.data.augmentation import augmentation_from_config
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.data.mapper import NamedErrorsMapper
from deformable_detr.engine import Trainer
from deformable_detr.solver import build_optimizer

TRAIN, VAL = "tools_train", "tools_val"


@pytest.fixture(autouse=True)
def data(write_coco):
    for name in (TRAIN, VAL):
        files = write_coco(name)
        register_coco_data(name, files.json, files.images)


@pytest.fixture(params=["", "_two_stage"])
def yaml_cfg(request, tiny_yaml) -> CfgNode:
    """As a tool for yaml files makes it, with the one call of ours that it needs."""
    _, path, *opts = tiny_yaml(request.param)
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    cfg.merge_from_file(path)
    cfg.merge_from_list([*opts, "DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (VAL,), "SOLVER.IMS_PER_BATCH", 2])
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def lazy_cfg(tiny_lazy, tmp_path) -> DictConfig:
    """As a tool for LazyConfig files makes it."""
    opts = [f"dataloader.train.dataset.names={TRAIN}", f"dataloader.test.dataset.names={VAL}", "model.num_classes=3"]
    return LazyConfig.apply_overrides(LazyConfig.load(tiny_lazy()[1]), [*opts, f"train.output_dir={tmp_path}"])


# Training


def test_lazyconfig_train_net_trains_a_lazy_config(lazy_cfg, tmp_path):
    cfg = lazy_cfg
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)

    def evaluate() -> dict:
        return inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(default_writers(str(tmp_path), 2), period=1),
        ]
    )
    trainer.train(0, 2)
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert math.isfinite(logged[0]["total_loss"]) and 0 <= logged[-1]["bbox/AP"] <= 100
    assert (tmp_path / "model_final.pth").is_file()


def test_plain_train_net_needs_our_optimiser(yaml_cfg):
    model = build_model(yaml_cfg)
    with pytest.raises(ValueError, match="'full_model' is not a valid GradientClipType"):
        detectron2_build_optimizer(yaml_cfg, model)
    optimizer = build_optimizer(yaml_cfg, model)
    before = model.class_embed[0].weight.clone()
    sum(model(next(iter(build_detection_train_loader(yaml_cfg)))).values()).backward()
    optimizer.step()
    assert not torch.equal(model.class_embed[0].weight, before)


def test_train_net_trains_when_its_trainer_is_ours(yaml_cfg):
    class Theirs(DefaultTrainer):
        pass

    class Ours(Trainer):
        pass

    with pytest.raises(ValueError, match="'full_model' is not a valid GradientClipType"):
        Theirs(yaml_cfg)
    yaml_cfg.SOLVER.MAX_ITER, yaml_cfg.SOLVER.STEPS = 1, ()
    trainer = Ours(yaml_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (Path(yaml_cfg.OUTPUT_DIR) / "model_final.pth").is_file()


# Analysis


def inputs_of(cfg: CfgNode) -> list[dict]:
    return next(iter(build_detection_test_loader(cfg, VAL)))


def test_analyze_model_counts_parameters_operations_and_activations(yaml_cfg):
    model = build_model(yaml_cfg).eval()
    assert "transformer.encoder" in parameter_count_table(model, max_depth=5)
    inputs = inputs_of(yaml_cfg)
    flops = FlopCountAnalysis(model, inputs)
    # The first convolution: 64 filters of 7 x 7 x 3 at half the height and width.
    height, width = (-(-side // 2) for side in inputs[0]["image"].shape[-2:])
    assert flops.by_module()["model.backbone.bottom_up.stem.conv1"] == 64 * 7 * 7 * 3 * height * width
    assert flops.by_operator()["conv"] > 0
    assert activation_count_operators(model, inputs)["conv"] > 0


def test_analyze_model_takes_the_model_and_the_data_of_a_lazy_config(lazy_cfg):
    model, inputs = instantiate(lazy_cfg.model).eval(), next(iter(instantiate(lazy_cfg.dataloader.test)))
    assert "transformer.encoder" in parameter_count_table(model, max_depth=5)
    assert FlopCountAnalysis(model, inputs).by_operator()["conv"] > 0
    assert activation_count_operators(model, inputs)["conv"] > 0


@pytest.mark.parametrize("sizes", [[(64, 96)], [(64, 96), (80, 64)]])
def test_traced_models_detect_as_they_do_for_images_of_the_traced_sizes(yaml_cfg, sizes):
    def images() -> list[dict]:
        return [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for size in sizes]

    model = build_model(yaml_cfg).eval()
    adapter = TracingAdapter(model, images())
    other = images()
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        found, expected = adapter.outputs_schema(traced(*[x["image"] for x in other])), model(other)
    for one, reference in zip(found, expected, strict=True):
        assert torch.equal(one["instances"].pred_boxes.tensor, reference["instances"].pred_boxes.tensor)
        assert torch.equal(one["instances"].scores, reference["instances"].scores)


def test_benchmark_takes_the_data_of_a_lazy_config(lazy_cfg):
    lazy_cfg.dataloader.train._target_ = DataLoaderBenchmark
    benchmark = instantiate(lazy_cfg.dataloader.train)
    assert len(benchmark.mapper(benchmark.dataset[0])["instances"]) == 1


def test_benchmark_takes_the_data_and_the_model_of_a_yaml_configuration(yaml_cfg):
    arguments = build_detection_train_loader.from_config(yaml_cfg)
    arguments.pop("aspect_ratio_grouping")
    benchmark = DataLoaderBenchmark(**arguments)
    assert len(benchmark.mapper(benchmark.dataset[0])["instances"]) == 1
    model = build_model(yaml_cfg).eval()
    with torch.no_grad():
        assert len(model(inputs_of(yaml_cfg))[0]["instances"]) > 0


def test_yaml_loaders_crop_every_image_until_they_are_given_our_mapper(yaml_cfg):
    first = build_detection_train_loader.from_config(yaml_cfg)["mapper"].augmentations.augs[0]
    assert isinstance(first, T.RandomCrop)
    mapper = NamedErrorsMapper(yaml_cfg, True, augmentations=augmentation_from_config(yaml_cfg, is_train=True))
    assert "RandomApply" in str(mapper.augmentations) and "prob=0.5" in str(mapper.augmentations)
    assert len(next(iter(build_detection_train_loader(yaml_cfg, mapper=mapper)))) == 2


# Pictures


def test_visualize_data_draws_what_the_loader_gives(yaml_cfg):
    x = next(iter(build_detection_train_loader(yaml_cfg)))[0]
    image = utils.convert_image_to_rgb(x["image"].permute(1, 2, 0), yaml_cfg.INPUT.FORMAT)
    names = MetadataCatalog.get(TRAIN).thing_classes
    labels = [names[label] for label in x["instances"].gt_classes]
    drawn = Visualizer(image, MetadataCatalog.get(TRAIN)).overlay_instances(
        labels=labels, boxes=x["instances"].gt_boxes
    )
    assert drawn.get_image().shape == image.shape
    record = DatasetCatalog.get(TRAIN)[0]
    image = utils.read_image(record["file_name"], "RGB")
    assert Visualizer(image, MetadataCatalog.get(TRAIN)).draw_dataset_dict(record).get_image().any()


def test_visualize_json_results_draws_the_file_of_an_evaluation(yaml_cfg):
    Trainer.test(yaml_cfg, build_model(yaml_cfg).eval())
    found = json.loads((Path(yaml_cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json").read_text())
    metadata = MetadataCatalog.get(VAL)
    record = DatasetCatalog.get(VAL)[0]
    found = [detection for detection in found if detection["image_id"] == record["image_id"]]
    instances = Instances((record["height"], record["width"]))
    boxes = torch.tensor([detection["bbox"] for detection in found])
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = torch.tensor([detection["score"] for detection in found])
    ids = metadata.thing_dataset_id_to_contiguous_id
    instances.pred_classes = torch.tensor([ids[detection["category_id"]] for detection in found])
    visualizer = Visualizer(utils.read_image(record["file_name"], "RGB"), metadata)
    assert visualizer.draw_instance_predictions(instances).get_image().any()


def test_demo_detects_with_detectron2s_predictor(yaml_cfg, tmp_path):
    yaml_cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    model = build_model(yaml_cfg).eval()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    image = utils.read_image(DatasetCatalog.get(VAL)[0]["file_name"], "BGR")
    found = DefaultPredictor(yaml_cfg)(image)["instances"]
    assert len(found) == 20 * 3
    assert Visualizer(image[:, :, ::-1], MetadataCatalog.get(VAL)).draw_instance_predictions(found).get_image().any()


def test_test_time_augmentation_is_for_other_models(yaml_cfg):
    with pytest.raises(AssertionError, match=r"only supported on GeneralizedRCNN.*DeformableDETR"):
        GeneralizedRCNNWithTTA(yaml_cfg, build_model(yaml_cfg))


# The call of ours


@pytest.mark.parametrize("backbone", ["build_multi_scale_backbone", "build_resnet_backbone"])
def test_a_tool_that_does_not_add_our_keys_is_told_the_call(backbone):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "DeformableDETR", backbone
    with pytest.raises(KeyError, match=r"no MODEL.DEFORMABLE_DETR: call deformable_detr.add_deformable_detr_config"):
        build_model(cfg)


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_without_the_call_every_file_ends_in_an_error_that_the_page_explains(path):
    with pytest.raises(KeyError) as caught:
        get_cfg().merge_from_file(str(path))
    page = (CONFIGS.parent / "docs" / "detectron2.md").read_text(encoding="utf-8")
    told = page.partition("Without them")[2].partition("\n\n")[0]
    assert caught.value.args[0].startswith("Non-existent config key: ") and "`Non-existent config key: " in told
    assert caught.value.args[0].rpartition(" ")[2] in told
