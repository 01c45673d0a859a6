# The demo. Twin of shapes_two_stage.yaml.
from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from deformable_detr.modeling import ContrastiveDenoising

from ..common.base import dataloader, model, optimizer, train

model.backbone.bottom_up.stem.update(out_channels=32, norm="BN")
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=2,
        stride_per_block=[stride, 1],
        in_channels=in_channels,
        out_channels=out_channels,
        norm="BN",
    )
    for stride, in_channels, out_channels in ((1, 32, 64), (2, 64, 128), (2, 128, 256))
]
# From scratch: nothing is frozen, and the norms learn too.
model.backbone.bottom_up.update(out_features=["res3", "res4"], freeze_at=0)
model.backbone.update(in_features=["res3", "res4"], num_feature_levels=3)
model.transformer.update(d_model=128, num_encoder_layers=1, num_decoder_layers=3, dim_feedforward=256, dropout=0.0)
model.transformer.update(with_box_refine=True, two_stage=True)
# What learns most in the same time: see docs/training.md, "Queries for training alone".
model.transformer.update(mixed_query_selection=True, look_forward_twice=True)
model.denoising = L(ContrastiveDenoising)(
    dn_number=20,
    num_classes="${..num_classes}",
    embed_dim="${..transformer.d_model}",
    label_noise_ratio=0.5,
    box_noise_scale=0.5,
    inverse_sigmoid_eps="${..transformer.inverse_sigmoid_eps}",
)
model.criterion.class_weight = 5.0
model.num_queries = 30
# Small images: on the official canvas their reference points shift with their batch mates (README, Parity).
model.size_divisibility = 32

optimizer.lr = 0.0009
optimizer.params.update(backbone_multiplier=1.0, location_multiplier=1.0)

dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.train.mapper.augmentations.update(min_size=[96], max_size=256, crop_size=None)
dataloader.test.num_workers = 1
dataloader.test.mapper.augmentations.update(min_size=96, max_size=256)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.01,
    warmup_length=100 / 4200,
)

train.update(device="cpu", init_checkpoint="", max_iter=4200, eval_period=1050, seed=1)
train.checkpointer.period = 1050
