from .dino_R_50_4scale import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.out_features = ["res2", "res3", "res4", "res5"]
model.backbone.update(in_features=["res2", "res3", "res4", "res5"], num_feature_levels=5)
