from ..common.base import dataloader, lr_multiplier, model, optimizer, train
