from ..common.detr import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
# torchvision's weights, of which Detectron2 has the ResNet-50 alone.
train.init_checkpoint = "https://download.pytorch.org/models/resnet101-63fe2227.pth"
