# The official recipe: ResNet-50, 50 epochs, 16 GPUs x 2 images. Twin of base.yaml.
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from deformable_detr.data.augmentation import build_detr_augmentation
from deformable_detr.data.datasets import get_test_dicts, get_train_dicts
from deformable_detr.data.loader import TrainLoader
from deformable_detr.data.mapper import NamedErrorsMapper
from deformable_detr.engine import build_evaluator
from deformable_detr.layers import PositionEmbeddingSine
from deformable_detr.modeling import (
    DeformableDETR,
    DeformableTransformer,
    HungarianMatcher,
    MultiScaleBackbone,
    SetCriterion,
)
from deformable_detr.solver import ClippedAdamW, get_param_groups

model = L(DeformableDETR)(
    backbone=L(MultiScaleBackbone)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        hidden_dim="${..transformer.d_model}",
        num_feature_levels=4,
    ),
    position_embedding=L(PositionEmbeddingSine)(embed_dim="${..transformer.d_model}", temperature=10000.0, offset=-0.5),
    transformer=L(DeformableTransformer)(
        d_model=256,
        n_heads=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=1024,
        dropout=0.1,
        num_feature_levels="${..backbone.num_feature_levels}",
        enc_n_points=4,
        dec_n_points=4,
        with_box_refine=False,
        two_stage=False,
        multiclass_proposals=False,
        mixed_query_selection=False,
        anchor_query_pos=False,
        look_forward_twice=False,
        decoder_norm=False,
        inverse_sigmoid_eps=1e-5,
        activation_checkpoint=False,
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, focal_alpha=0.25),
        class_weight=2.0,
        bbox_weight=5.0,
        giou_weight=2.0,
        focal_alpha=0.25,
        aux_loss=True,
        one2many_repeat=6,
        one2many_weight=1.0,
    ),
    num_classes=80,
    num_queries=300,
    num_queries_test=0,
    shared_heads=False,
    # In training alone: further queries of H-DETR, and of DINO as L(ContrastiveDenoising)(dn_number=100, ...).
    num_one2many_queries=0,
    denoising=None,
    test_topk_per_image=100,
    size_divisibility=0,
    padding_invariant=False,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
)

dataloader = dict(
    train=L(TrainLoader)(
        # The official code trains on images without objects too, and batches at random.
        dataset=L(get_train_dicts)(
            names="coco_2017_train",
            num_classes="${model.num_classes}",
            num_queries="${model.num_queries}",
            filter_empty=False,
        ),
        mapper=L(NamedErrorsMapper)(
            is_train=True,
            augmentations=L(build_detr_augmentation)(
                is_train=True,
                min_size=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                max_size=1333,
                sample_style="choice",
                random_flip=True,
                crop_type="absolute_range",
                crop_size=[384, 600],
                brightness=0.0,
                contrast=0.0,
                saturation=0.0,
                lsj_size=0,
                lsj_scale=[0.1, 2.0],
            ),
            image_format="${model.input_format}",
        ),
        total_batch_size=32,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_test_dicts)(
            names="coco_2017_val", max_detections="${model.test_topk_per_image}", filter_empty=False
        ),
        mapper=L(NamedErrorsMapper)(
            is_train=False,
            augmentations=L(build_detr_augmentation)(is_train=False, min_size=800, max_size=1333),
            image_format="${model.input_format}",
        ),
        num_workers=4,
    ),
    evaluator=L(build_evaluator)(
        dataset_name="${dataloader.test.dataset.names}",
        output_dir="${train.output_dir}/inference",
        max_detections="${model.test_topk_per_image}",
    ),
)

optimizer = L(ClippedAdamW)(
    params=L(get_param_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        backbone_multiplier=0.1,
        location_multiplier=0.1,
        layer_decay=1.0,
        overrides={},
    ),
    lr=2e-4,
    weight_decay=1e-4,
    max_norm=0.1,
)

# 118,287 images / 32 = 3,696 iterations an epoch; 50 epochs, drop after 40. Another train.max_iter scales both.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[147840, 184800]),
    warmup_factor=1.0,
    warmup_length=0.0,
)

train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=184800,
    amp=dict(enabled=False, precision="float16"),
    accumulation_steps=1,
    compile=False,
    cuda_graphs=False,
    max_skipped_steps=0,
    ema=dict(enabled=False, decay=0.9997),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=3696, max_to_keep=100),
    eval_period=18480,
    first_eval=0,
    per_layer_ap=False,
    best_metric="",
    patience=0,
    auto_batch=False,
    show_data=False,
    wandb=dict(enabled=False, project="deformable_detr", name=""),
    log_period=20,
    # Besides those to the terminal, metrics.json and TensorBoard: calls of what makes an EventWriter.
    writers=[],
    device="cuda",
    seed=-1,
    cudnn_benchmark=False,
)
