from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "https://download.pytorch.org/models/resnet101-63fe2227.pth"
