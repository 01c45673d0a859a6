from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.transformer.with_box_refine = True
