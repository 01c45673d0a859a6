from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 18
# Basic blocks have no 1x1 convolutions.
del model.backbone.bottom_up.stages["stride_in_1x1"]
train.init_checkpoint = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
