from detectron2.config import LazyCall as L

from deformable_detr.modeling import build_swin

from .h_deformable_detr_R_50 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(build_swin)(
    out_features=[8, 16, 32],
    embed_dim=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=7,
    drop_path_rate=0.2,
    freeze_at=0,
)
model.backbone.in_features = [8, 16, 32]
model.num_queries = 900
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth"
)
