from .h_deformable_detr_swin_large import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.drop_path_rate = 0.5
optimizer.weight_decay = 0.05

# 36 epochs, drop after 30.
lr_multiplier.scheduler.milestones = [221790, 266148]
train.max_iter = 266148
