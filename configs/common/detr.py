# The recipe of DETR's published weights: one level, 500 epochs, total batch 64. Twin of detr.yaml.
from detectron2.config import LazyCall as L

from deformable_detr.modeling import DETR, DenseTransformer, HungarianMatcher, SetCriterion, SoftmaxClassification

from .base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.out_features = ["res5"]
model.backbone.update(in_features=["res5"], num_feature_levels=1, norm="")

model = L(DETR)(
    backbone=model.backbone,
    position_embedding=model.position_embedding,
    transformer=L(DenseTransformer)(
        d_model=256,
        n_heads=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        activation_checkpoint=False,
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(
            cost_class=1.0,
            cost_bbox=5.0,
            cost_giou=2.0,
            classification="${..classification}",
        ),
        class_weight=1.0,
        bbox_weight=5.0,
        giou_weight=2.0,
        classification=L(SoftmaxClassification)(eos_coef=0.1),
        aux_loss=True,
    ),
    num_classes=model.num_classes,
    num_queries=100,
    test_topk_per_image=model.test_topk_per_image,
    size_divisibility=model.size_divisibility,
    padding_invariant=model.padding_invariant,
    pixel_mean=model.pixel_mean,
    pixel_std=model.pixel_std,
    input_format=model.input_format,
)
model.position_embedding.offset = 0.0

dataloader.train.total_batch_size = 64
optimizer.lr = 1e-4
# 118,287 images / 64 = 1,848 iterations an epoch; 500 epochs, drop after 400. Another train.max_iter scales both.
lr_multiplier.scheduler.milestones = [739200, 924000]
train.max_iter = 924000
train.checkpointer.period = train.eval_period = 18480
