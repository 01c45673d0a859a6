"""Parts of models that the study alone needs: a small backbone, and the attention that is compared.

Shapes: N batch, S cells of L levels, Lq queries, C width, M heads.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..layers import MSDeformAttn
from ..modeling.decoder import DeformableTransformerDecoderLayer
from ..modeling.encoder import DeformableTransformerEncoderLayer


def bottleneck_resnet(*, width: int, blocks: Sequence[int], out_features: Sequence[str], norm: str = "BN") -> ResNet:
    """Build a ResNet of bottleneck blocks, as ResNet-50 is, narrower and less deep; nothing of it is frozen.

    Args:
        width: of the bottlenecks of res2, 64 in ResNet-50; each later stage has twice that of the one before.
        blocks: of res2 to res5; 3, 4, 6, 3 in ResNet-50.
    """
    stages, in_channels = [], width
    for index, number in enumerate(blocks):
        bottleneck = width * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                number,
                stride_per_block=[1 if index == 0 else 2, *[1] * (number - 1)],
                in_channels=in_channels,
                out_channels=4 * bottleneck,
                bottleneck_channels=bottleneck,
                norm=norm,
            )
        )
        in_channels = 4 * bottleneck
    return ResNet(BasicStem(3, width, norm=norm), stages, out_features=[*out_features])


class NoAttention(nn.Module):
    """Stands in place of an ``nn.MultiheadAttention`` from which nothing comes."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> tuple[Tensor, None]:
        """query, key, value: (N, Lq, C). Returns zeros (N, Lq, C), and no weights."""
        return torch.zeros_like(value), None


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of queries, not with its square (arXiv 1812.01243).

    Keys are normalised over the queries and sum values up in one (C/M, C/M) matrix for each head, which every query
    reads with its own normalised channels: no query is compared with another one.

    Args:
        d_model: width C, divisible by ``n_heads``.
        n_heads: M.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query_proj = nn.Linear(d_model, d_model)
        self.key_proj = nn.Linear(d_model, d_model)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value: (N, Lq, C). Returns (N, Lq, C), and no weights.

        Raises:
            ValueError: on a mask, or if weights are wanted: there is none for a pair of queries.
        """
        if need_weights or attn_mask is not None:
            raise ValueError("linear attention has no weights of pairs: need_weights and attn_mask must be left out")
        # (N, M, Lq, C/M)
        query, key, value = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection, x in ((self.query_proj, query), (self.key_proj, key), (self.value_proj, value))
        )
        summed = key.softmax(dim=2).transpose(2, 3) @ value
        return self.output_proj((query.softmax(dim=3) @ summed).transpose(1, 2).flatten(2)), None


class SameScaleAttention(nn.Module):
    """Deformable attention of every cell to its own level alone, with the same weights for all levels.

    It stands in place of the :class:`MSDeformAttn` of an encoder layer.
    """

    def __init__(self, d_model: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.attention = MSDeformAttn(d_model, 1, n_heads, n_points)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """query, value: (N, S, C); reference_points: (N, S, L, 2); padding_mask: (N, S). Returns (N, S, C)."""
        outputs, start = [], 0
        for level, (height, width) in enumerate(spatial_shapes):
            cells = slice(start, start := start + height * width)
            mask = None if padding_mask is None else padding_mask[:, cells]
            points = reference_points[:, cells, level : level + 1]
            outputs.append(self.attention(query[:, cells], points, value[:, cells], [(height, width)], mask))
        return torch.cat(outputs, dim=1)


def decoder_layer(*, self_attention: str, d_model: int, n_heads: int, **sizes: float) -> nn.Module:
    """Build a decoder layer with another self-attention.

    Args:
        self_attention: "none" or "linear".
        sizes: as of :class:`DeformableTransformerDecoderLayer`.

    Raises:
        ValueError: on any other self-attention.
    """
    layer = DeformableTransformerDecoderLayer(d_model=d_model, n_heads=n_heads, **sizes)
    if self_attention not in ("none", "linear"):
        raise ValueError(f'self_attention must be "none" or "linear", got {self_attention!r}')
    layer.self_attn = NoAttention() if self_attention == "none" else LinearAttention(d_model, n_heads)
    return layer


def encoder_layer(*, same_scale: bool, d_model: int, n_heads: int, n_points: int, **sizes: float) -> nn.Module:
    """Build an encoder layer, with ``same_scale`` one whose cells do not look into other levels."""
    layer = DeformableTransformerEncoderLayer(d_model=d_model, n_heads=n_heads, n_points=n_points, **sizes)
    if same_scale:
        layer.self_attn = SameScaleAttention(d_model, n_heads, n_points)
    return layer
