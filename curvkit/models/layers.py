"""The layers of the decoder: norm, rotary positions, attention, feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class RMSNorm(nn.Module):
    """Divide by the root mean square: y = g x / sqrt(mean(x^2) + eps), over the last dimension.

    Computed in the dtype of x. Llama's own code computes in float32, which would round a float64 model.

    Args:
        width: Length of the last dimension; g starts as ones.
        eps: Added under the root.

    Shapes: [..., width] -> [..., width].
    Source: Zhang & Sennrich (2019), "Root Mean Square Layer Normalization".

    Example:
        >>> RMSNorm(2)(torch.tensor([3.0, -3.0])).detach()
        tensor([ 1.0000, -1.0000])
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return y, in the shape of x; see the class."""
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Tabulate the rotation of each pair at each position: cos and sin of t * 10000^(-2 i / D).

    Args:
        context: Number of positions t.
        head_width: D, even; there are D / 2 pairs i.

    Returns:
        cos and sin, both [context, D / 2], float64, on the CPU.

    Source: Su et al. (2021), "RoFormer".

    Example:
        >>> rotary_tables(8, 4)[0].shape
        torch.Size([8, 2])
    """
    pairs = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu")
    angles = torch.outer(torch.arange(context, dtype=torch.float64, device="cpu"), ROTARY_BASE ** (-pairs / head_width))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x_i, x_{i + D/2}) at position t by its angle.

    Then <q_t, k_s> depends on q, k and t - s alone.

    Args:
        x: Queries or keys, [..., T, D].
        cos: [T, D / 2], from `rotary_tables`.
        sin: [T, D / 2].

    Returns:
        [..., T, D], of the same length as x at every position.

    Source: Su et al. (2021). Differs: halves are paired as in the Llama checkpoints of Hugging Face, not
    neighbours.

    Example:
        >>> cos, sin = rotary_tables(1, 2)
        >>> rotate(torch.tensor([[1.0, 2.0]]), cos.float(), sin.float())
        tensor([[1., 2.]])
    """
    a, b = x.chunk(2, dim=-1)  # [..., T, D/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary queries and keys.

        out = W_o concat_h softmax(Q_h K_h^T / sqrt(D) + causal) V_h

    It calls `F.scaled_dot_product_attention` with torch's default dispatch. The fused kernels that this may
    pick have no second derivative: to differentiate twice, run under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        width: w; each of the four maps is [w, w] without bias.
        heads: H, a divisor of w with w / H = D even.

    Example:
        >>> cos, sin = rotary_tables(5, 4)
        >>> Attention(8, heads=2)(torch.zeros(1, 5, 8), cos.float(), sin.float()).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix each position with the earlier ones.

        Args:
            x: [N, T, w].
            cos: [T, D / 2], from `rotary_tables`.
            sin: [T, D / 2].

        Returns:
            [N, T, w].
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # [N, H, T, D]
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [N, H, T, D] -> [N, T, w]


class FeedForward(nn.Module):
    """SwiGLU: out = W_down (silu(W_gate x) * W_up x).

    Args:
        width: w, of x and of the output.
        hidden: f, between them.

    Source: Shazeer (2020), "GLU Variants Improve Transformer".

    Example:
        >>> FeedForward(8, hidden=24)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return out, in the shape of x; see the class."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    """One layer: u = x + Attention(RMSNorm(x)), then y = u + FeedForward(RMSNorm(u)).

    Args:
        width: w.
        heads: H.
        hidden: f.

    Example:
        >>> cos, sin = rotary_tables(5, 4)
        >>> DecoderBlock(8, heads=2, hidden=24)(torch.zeros(1, 5, 8), cos.float(), sin.float()).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [N, T, w].
            cos: [T, D / 2], from `rotary_tables`.
            sin: [T, D / 2].

        Returns:
            y, [N, T, w].
        """
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))
