from detectron2.config import LazyCall as L

from deformable_detr.modeling import build_vit_pyramid

from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(build_vit_pyramid)(
    out_features=[8, 16, 32],
    out_channels=256,
    square_pad=1024,
    img_size=1024,
    embed_dim=768,
    depth=12,
    num_heads=12,
    window_size=14,
    drop_path_rate=0.1,
    freeze_at=0,
)
model.backbone.in_features = [8, 16, 32]
# Below the side of square_pad: rounding the short side adds up to half the aspect ratio to the long one.
dataloader.train.mapper.augmentations.max_size = 1008
dataloader.test.mapper.augmentations.max_size = 1008
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth"
