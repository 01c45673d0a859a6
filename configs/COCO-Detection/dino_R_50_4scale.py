# DINO (arXiv 2203.03605): 12 epochs, 8 GPUs x 2 images.
from detectron2.config import LazyCall as L

from deformable_detr.modeling import ContrastiveDenoising

from .deformable_detr_R_50_two_stage import dataloader, lr_multiplier, model, optimizer, train

model.position_embedding.update(temperature=20.0, offset=0.0)
model.transformer.update(mixed_query_selection=True, look_forward_twice=True, anchor_query_pos=True, decoder_norm=True)
model.transformer.update(multiclass_proposals=True, inverse_sigmoid_eps=0.001, dim_feedforward=2048, dropout=0.0)
model.criterion.class_weight = 1.0
model.denoising = L(ContrastiveDenoising)(
    dn_number=100,
    num_classes="${..num_classes}",
    embed_dim="${..transformer.d_model}",
    label_noise_ratio=0.5,
    box_noise_scale=1.0,
    inverse_sigmoid_eps="${..transformer.inverse_sigmoid_eps}",
)
model.update(num_queries=900, shared_heads=True, test_topk_per_image=300)

optimizer.lr = 0.0001
optimizer.params.location_multiplier = 1.0

dataloader.train.total_batch_size = 16

# 118,287 images / 16 = 7,393 iterations an epoch; 12 epochs, drop after 11.
lr_multiplier.scheduler.milestones = [81323, 88716]
train.update(max_iter=88716, eval_period=7393)
train.checkpointer.period = 7393
