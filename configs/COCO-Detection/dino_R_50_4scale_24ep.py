from .dino_R_50_4scale import dataloader, lr_multiplier, model, optimizer, train

# 24 epochs, drop after 20.
lr_multiplier.scheduler.milestones = [147860, 177432]
train.max_iter = 177432
