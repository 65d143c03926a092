"""GPT-2 with the names and the arithmetic of nanoGPT, so that its checkpoints can be measured without its code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.errors import InvalidArgument
from curvkit.models.checks import check_count

INITIAL_STDDEV = 0.02


class LayerNorm(nn.Module):
    """y = g (x - mean x) / sqrt(var x + 1e-5) + b over the last dimension, where b may be left out.

    Args:
        width: Length of the last dimension.
        bias: Whether there is a b.

    Example:
        >>> LayerNorm(2, bias=False)(torch.tensor([1.0, 3.0])).detach().round(decimals=3)
        tensor([-1.,  1.])
    """

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return y; see the class."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Causal self-attention whose queries, keys and values are one linear map of x.

    It calls `F.scaled_dot_product_attention`, whose fused kernels cannot be differentiated twice; measurements use the MATH kernel.

    Args:
        width: w.
        heads: A divisor of w.
        bias: Of both linear maps.
        dropout: Probability, of the attention and of the result; in evaluation mode nothing is dropped.

    Shapes: [N, T, w] -> [N, T, w].

    Example:
        >>> CausalSelfAttention(8, heads=2, bias=True, dropout=0.0)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with the earlier ones."""
        parts = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [N, H, T, D]
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """W_2 gelu(W_1 x), with four times the width inside and the exact gelu.

    Args:
        width: w.
        bias: Of both linear maps.
        dropout: Probability.

    Example:
        >>> MLP(8, bias=True, dropout=0.0)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both maps."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One layer: u = x + Attention(LayerNorm(x)), then u + MLP(LayerNorm(u)).

    Args:
        width: w.
        heads: A divisor of w.
        bias: Of norms and linear maps.
        dropout: Probability.

    Example:
        >>> Block(8, heads=2, bias=True, dropout=0.0)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, bias)
        self.attn = CausalSelfAttention(width, heads, bias, dropout)
        self.ln_2 = LayerNorm(width, bias)
        self.mlp = MLP(width, bias, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 as nanoGPT writes it, built from the `model_args` of its checkpoints.

        x = E[tokens] + P[0 .. T-1];   n_layer blocks;   logits = LayerNorm(x) E'

    Names and shapes of the parameters are nanoGPT's; the head is the embedding. All linear maps are `nn.Linear`, where the models of
    Hugging Face keep the transposed weights. Positions are learned, so that no sequence is longer than `block_size`.

    Args:
        n_layer: Number of blocks.
        n_head: Heads of a block, a divisor of n_embd.
        n_embd: Width.
        block_size: Greatest number T of tokens in one sequence.
        vocab_size: V, number of tokens; 50,304 in nanoGPT where nothing else is said.
        bias: Of norms and linear maps.
        dropout: Probability in training mode.

    Shapes: tokens [N, T] int64, T <= block_size -> logits [N, T, V]. nanoGPT's own `forward` without targets gives the last ones alone.

    Raises:
        InvalidArgument: If a size is not an integer >= 1, n_head does not divide n_embd, bias is no bool or dropout no probability.

    Parameters, with b = 1 if bias else 0 and w = n_embd: V w + block_size w + n_layer (12 w^2 + 9 b w + 2 (1 + b) w) + (1 + b) w.
    Initialisation: N(0, 0.02^2), and N(0, 0.02^2 / (2 n_layer)) for the maps that add to x; biases are zeros and norms ones.
    Cost: about 2 flop per parameter and token forward.
    Source: Radford et al. (2019), GPT-2; names and options after Karpathy's nanoGPT.

    Example:
        >>> model = GPT(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=11)
        >>> model(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 11])
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        n_embd: int,
        block_size: int,
        vocab_size: int = 50304,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        check_count("GPT", "n_layer", n_layer, "the number of blocks", 12)
        check_count("GPT", "n_head", n_head, "the number of attention heads", 12)
        check_count("GPT", "n_embd", n_embd, "the length of a token's vector", 768)
        check_count("GPT", "block_size", block_size, "the greatest length of a sequence", 1024)
        check_count("GPT", "vocab_size", vocab_size, "the number of tokens", 50304)
        if n_embd % n_head:
            raise InvalidArgument(f"GPT: n_head={n_head} must divide n_embd={n_embd}. Pass for example n_head=1.")
        if not isinstance(bias, bool):  # sizes and options come from files
            raise InvalidArgument(
                f"GPT: bias={bias!r} must be True or False. It says whether norms and linear maps have one."
            )
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout <= 1.0:
            raise InvalidArgument(
                f"GPT: dropout={dropout!r} must be a probability. It has no effect in evaluation mode; pass for example 0.0."
            )
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(Block(n_embd, n_head, bias, float(dropout)) for _ in range(n_layer)),
                "ln_f": LayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.restore_derived()
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=INITIAL_STDDEV / (2 * n_layer) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIAL_STDDEV)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def restore_derived(self) -> None:
        """Tie the head to the embedding again, which loading with `assign=True` breaks; the embedding's weight is the one kept.

        Example:
            >>> with torch.device("meta"):
            ...     model = GPT(n_layer=1, n_head=1, n_embd=2, block_size=4, vocab_size=3)
            >>> _ = model.load_state_dict(GPT(1, 1, 2, 4, 3).state_dict(), assign=True)
            >>> model.restore_derived()
            >>> model.lm_head.weight is model.transformer["wte"].weight
            True
        """
        self.lm_head.weight = self._embedding.weight

    @property
    def _embedding(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits of the token that follows each of them.

        Args:
            tokens: [N, T] int64 in [0, V), T <= block_size. torch itself refuses numbers outside [0, V).

        Returns:
            Logits, [N, T, V]; those at position t depend on tokens 0 to t alone.

        Raises:
            InvalidArgument: If the tokens have another shape or dtype, or are longer than `block_size`.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InvalidArgument(
                f"GPT: tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype} must be [N, T] int64. "
                "Pass for example tokens.long().view(1, -1)."
            )
        length = tokens.shape[1]
        if length > self.block_size:
            raise InvalidArgument(
                f"GPT: {length} tokens in one sequence are more than block_size={self.block_size}. Cut the sequence into windows."
            )
        parts = self.transformer
        x = parts["drop"](
            self._embedding(tokens) + parts["wpe"](torch.arange(length, device=tokens.device))
        )  # [N, T, w]
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.lm_head(parts["ln_f"](x))  # [N, T, V]
