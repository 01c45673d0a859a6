# H-Deformable-DETR (arXiv 2207.13080): 12 epochs, 8 GPUs x 2 images.
from .deformable_detr_R_50_two_stage import dataloader, lr_multiplier, model, optimizer, train

model.transformer.update(mixed_query_selection=True, look_forward_twice=True, dim_feedforward=2048, dropout=0.0)
model.num_one2many_queries = 1500

dataloader.train.total_batch_size = 16

# 118,287 images / 16 = 7,393 iterations an epoch; 12 epochs, drop after 11.
lr_multiplier.scheduler.milestones = [81323, 88716]
train.update(max_iter=88716, eval_period=7393)
train.checkpointer.period = 7393
