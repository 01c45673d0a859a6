# Overfits ten COCO images from scratch, on a CPU. Twin of overfit_10_images.yaml, which has the commands.
from .shapes_two_stage import dataloader, lr_multiplier, model, optimizer, train

# 200 epochs: 400 * 5 / 10.
train.update(max_iter=400, eval_period=200)
train.checkpointer.period = 200
# 100 iterations.
lr_multiplier.warmup_length = 0.25

dataloader.train.total_batch_size = 5
dataloader.train.mapper.augmentations.update(min_size=[128], random_flip=False)
dataloader.test.mapper.augmentations.min_size = 128
