"""Contrastive denoising queries: ground truth with noise, from which the decoder learns to find its way back.

Source: DINO (arXiv 2203.03605, section 3.3), after DN-DETR (arXiv 2203.01305). For training only.
Shapes: N images, M objects of the image that has most, G groups, P = G * 2 * M denoising queries, K classes, C hidden
width. Boxes are cxcywh in [0, 1] relative to each image without its padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .matcher import Match, PaddedTargets, Target, pad_targets
from .reference_points import inverse_sigmoid


class DenoisingQueries(NamedTuple):
    """Queries of a batch, in G groups of M positives before M negatives.

    Object k of an image is query k of the positives and query k of the negatives of every group. What an image lacks of
    M objects has zeros as content and the middle of the image as box, and is background to the losses.

    Attributes:
        content: (N, P, C).
        boxes: (N, P, 4), float32 (float64 for float64).
        num_groups: G, at least 1.
    """

    content: Tensor
    boxes: Tensor
    num_groups: int

    @property
    def group_size(self) -> int:
        """2 * M."""
        return self.boxes.shape[1] // self.num_groups


class ContrastiveDenoising(nn.Module):
    """Makes denoising queries of ground truth, with PyTorch's global random numbers.

    The number of groups is ``dn_number // M``, and at least one: about ``2 * dn_number`` queries, more where an image
    has more than ``dn_number`` objects, none where no image has any.

    Args:
        dn_number: positives that an image should have, and as many negatives (DINO's code has 100).
        num_classes: K.
        embed_dim: C.
        label_noise_ratio: half of this share of the labels is drawn anew, from all classes.
        box_noise_scale: scale of the shifts. Each side of a box moves by up to half of the width or height for
            positives, and by half to once of it for negatives, times this.
        inverse_sigmoid_eps: as the transformer's; the least width and height of a box.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        *,
        dn_number: int = 100,
        num_classes: int,
        embed_dim: int,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        inverse_sigmoid_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dn_number < 1:
            raise ValueError(f"dn_number of denoising must be at least 1, got {dn_number}")
        if not 0 <= label_noise_ratio <= 1:
            raise ValueError(f"label_noise_ratio must be in [0, 1], got {label_noise_ratio}")
        if not 0 <= box_noise_scale < float("inf"):
            raise ValueError(f"box_noise_scale must be finite and at least 0, got {box_noise_scale}")
        self.dn_number = dn_number
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.inverse_sigmoid_eps = inverse_sigmoid_eps
        self.label_enc = nn.Embedding(num_classes, embed_dim)

    def forward(self, targets: Sequence[Target] | PaddedTargets) -> DenoisingQueries:
        """Make the queries of a batch, without any wait for the device.

        Args:
            targets: per image "labels" (n,) int64 in [0, K) and "boxes" (n, 4); or these in one piece.
        """
        labels, boxes, counts = targets if isinstance(targets, PaddedTargets) else pad_targets(targets)
        num_objects = labels.shape[1]
        num_groups = max(1, self.dn_number // max(1, num_objects))
        present = torch.arange(num_objects, device=labels.device) < counts[:, None]
        # (N, G, 2, M): positives are 0 and negatives 1 of the third dimension.
        labels, present = (x[:, None, None].expand(-1, num_groups, 2, -1) for x in (labels, present))
        boxes = boxes[:, None, None].expand(-1, num_groups, 2, -1, -1)
        content = self.label_enc(self._noisy_labels(labels)).masked_fill(~present[..., None], 0.0)
        boxes = self._noisy_boxes(boxes).masked_fill(~present[..., None], 0.5)
        return DenoisingQueries(content.flatten(1, 3), boxes.flatten(1, 3), num_groups)

    def _noisy_labels(self, labels: Tensor) -> Tensor:
        drawn = torch.randint_like(labels, self.label_enc.num_embeddings)
        is_drawn = torch.rand(labels.shape, device=labels.device) < 0.5 * self.label_noise_ratio
        return torch.where(is_drawn, drawn, labels)

    def _noisy_boxes(self, boxes: Tensor) -> Tensor:
        """(N, G, 2, M, 4) -> the same, at least as large as the decoder can tell from nothing."""
        sign = 2 * torch.randint_like(boxes, 2) - 1
        size = torch.rand_like(boxes) + torch.arange(2, device=boxes.device)[:, None, None]
        half = torch.cat((boxes[..., 2:], boxes[..., 2:]), dim=-1) / 2
        corners = box_convert(boxes, "cxcywh", "xyxy") + sign * size * half * self.box_noise_scale
        noisy = box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")
        # A negative whose sides have passed each other has no width: it gets the least that there is.
        return inverse_sigmoid(noisy, self.inverse_sigmoid_eps).sigmoid()


def fixed_matches(num_queries: int, targets: Sequence[Target]) -> tuple[list[Match], int]:
    """Match the positives of all groups with the objects they were made of.

    Args:
        num_queries: P.
        targets: per image "labels" (n,), as the queries were made of.

    Returns:
        Per image the indices of queries and of their objects, on the CPU, both of length G * n; and G.
    """
    counts = [len(target["labels"]) for target in targets]
    group_size = 2 * max(counts)
    num_groups = num_queries // group_size if group_size else 1
    starts = group_size * torch.arange(num_groups)[:, None]
    objects = [torch.arange(count) for count in counts]
    return [((starts + numbers).flatten(), numbers.repeat(num_groups)) for numbers in objects], num_groups


def attention_mask(
    num_groups: int, group_size: int, num_queries: int, num_one2many_queries: int, *, device: torch.device
) -> Tensor | None:
    """Say which queries must not see which in the decoder's self-attention.

    Queries are in the order [denoising | matching | one-to-many]. Every group of denoising queries sees itself and the
    matching queries; matching and one-to-many queries see themselves alone (DINO; H-DETR, arXiv 2207.13080, section 3).

    Returns:
        (P + Lq, P + Lq) bool, a row for each query that looks, True where it must not see; None if all see all.
    """
    denoising = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    if not len(denoising) + num_one2many_queries:
        return None
    matching, one2many = (
        torch.full((count,), number, device=device)
        for count, number in ((num_queries, num_groups), (num_one2many_queries, num_groups + 1))
    )
    parts = torch.cat((denoising, matching, one2many))
    sees = parts[:, None] == parts
    sees[: len(denoising)] |= parts == num_groups
    return ~sees
