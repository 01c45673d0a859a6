# Two-stage, with what helps in training and costs nothing in inference: 12 epochs, 8 GPUs x 2 images.
# A recipe of this project; nobody has published a number of it.
from detectron2.config import LazyCall as L

from deformable_detr.modeling import ContrastiveDenoising

from .deformable_detr_R_50_two_stage import dataloader, lr_multiplier, model, optimizer, train

model.transformer.update(mixed_query_selection=True, look_forward_twice=True, dropout=0.0)
model.denoising = L(ContrastiveDenoising)(
    dn_number=100,
    num_classes="${..num_classes}",
    embed_dim="${..transformer.d_model}",
    label_noise_ratio=0.5,
    box_noise_scale=1.0,
    inverse_sigmoid_eps="${..transformer.inverse_sigmoid_eps}",
)

dataloader.train.total_batch_size = 16

# 118,287 images / 16 = 7,393 iterations an epoch; 12 epochs, drop after 11.
lr_multiplier.scheduler.milestones = [81323, 88716]
train.update(max_iter=88716, eval_period=7393)
train.checkpointer.period = 7393
