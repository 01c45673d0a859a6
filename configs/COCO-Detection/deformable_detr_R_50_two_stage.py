from ..common.base import dataloader, lr_multiplier, model, optimizer, train

model.transformer.with_box_refine = True
model.transformer.two_stage = True
