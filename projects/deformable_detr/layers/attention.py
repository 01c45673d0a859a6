"""Dense attention.

Shapes: N batch, Lq queries, Lk keys, M heads, C = embed_dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention``, batch first, with a third fewer operations where the keys are the queries.

    PyTorch projects queries and keys apart unless they are the values too: here they are one product, and so are their
    gradients. All else, weights to be returned included, is left to PyTorch.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **options: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """query (N, Lq, C), key and value (N, Lk, C).

        Masks are bool, True where not to look: (N, Lk), and (Lq, Lk) or, where images differ, (N * M, Lq, Lk).
        """
        if need_weights or query is not key or options:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
        parts, heads = (2 * self.embed_dim, self.embed_dim), (self.num_heads, self.head_dim)
        # Split, and not sliced: the gradients of slices would be padded with zeros and added up.
        (weight, value_weight), (bias, value_bias) = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
        queries, keys = F.linear(query, weight, bias).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind()
        values = F.linear(value, value_weight, value_bias).unflatten(-1, heads)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values.transpose(1, 2),
            attn_mask=_where_to_look(attn_mask, key_padding_mask, self.num_heads),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def _where_to_look(attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int) -> Tensor | None:
    """True where to look, (N or 1, M or 1, Lq or 1, Lk)."""
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads))
    masks = [] if attn_mask is None else [attn_mask]
    masks += [] if key_padding_mask is None else [key_padding_mask[:, None, None]]
    if not masks:
        return None
    return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
