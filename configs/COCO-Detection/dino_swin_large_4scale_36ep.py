from .dino_swin_large_4scale import dataloader, lr_multiplier, model, optimizer, train

# 36 epochs, drop after 30.
lr_multiplier.scheduler.milestones = [221790, 266148]
train.max_iter = 266148
