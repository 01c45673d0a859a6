from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.out_features = ["res5"]
model.backbone.in_features = ["res5"]
model.backbone.num_feature_levels = 1
