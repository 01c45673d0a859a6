from ..common.detr import dataloader, lr_multiplier, model, optimizer, train
