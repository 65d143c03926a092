"""The Llama-like language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument
from curvkit.models.checks import check_count
from curvkit.models.layers import DecoderBlock, RMSNorm, rotary_tables

INITIAL_STDDEV = 0.02


class Decoder(nn.Module):
    """A causal language model: embedding, `depth` layers of attention and SwiGLU, a norm, a head.

        x = E[tokens]
        x += Attention(RMSNorm(x));   x += SwiGLU(RMSNorm(x))       depth times
        logits = RMSNorm(x) H^T

    Positions are rotary, there are no biases and no dropout. With `tied`, H is E: `head.weight` and
    `embedding.weight` are one Parameter object, as in GPT-2 and small Llamas. Attention uses torch's default
    dispatch, whose fused kernels cannot be differentiated twice; see `Attention`.

    Args:
        vocabulary: V, number of tokens.
        width: w, length of a token's vector.
        depth: L, number of layers.
        heads: A divisor of w; w / heads is even, because rotary positions rotate pairs.
        context: Greatest number T of tokens in one sequence.
        hidden: f, inner width of the SwiGLU; None for the smallest multiple of 8 that is >= 8 w / 3 (Llama's
            proportion, which keeps the parameters of a layer near 12 w^2).
        tied: Whether head and embedding share their parameter.

    Shapes: tokens [N, T] int64, T <= context -> logits [N, T, V].

    Raises:
        InvalidArgument: If a size is not an integer >= 1, heads does not divide width into even parts, or
            tied is not a bool.

    Parameters: (1 if tied else 2) V w + L (4 w^2 + 3 w f + 2 w) + w.
    Initialisation: N(0, 0.02^2), and N(0, 0.02^2 / (2 L)) for the two maps of each layer that add to x; norms
    are ones. Drawn from the global random state.
    Cost: about 2 flop per parameter and token forward, and 4 L T w per token for the attention scores.
    Precision: computed in the parameters' dtype throughout. `model.to(torch.float64)` keeps the rotary tables
    as rounded to float32, so that it is the same function; `restore_derived` computes them afresh.
    Source: Touvron et al. (2023), "LLaMA"; initialisation of Radford et al. (2019), GPT-2.

    Example:
        >>> model = Decoder(vocabulary=11, width=8, depth=1, heads=2, context=16)
        >>> model(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 11])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        context: int,
        hidden: int | None = None,
        tied: bool = True,
    ) -> None:
        check_count("Decoder", "vocabulary", vocabulary, "the number of tokens", 256)
        check_count("Decoder", "width", width, "the length of a token's vector", 64)
        check_count("Decoder", "depth", depth, "the number of layers", 2)
        check_count("Decoder", "heads", heads, "the number of attention heads", 4)
        check_count("Decoder", "context", context, "the greatest length of a sequence", 128)
        hidden = 8 * -(-width // 3) if hidden is None else hidden
        check_count("Decoder", "hidden", hidden, "the inner width of the feed-forward layers", 8 * -(-width // 3))
        if width % heads or (width // heads) % 2:
            allowed = [h for h in range(1, width // 2 + 1) if width % h == 0 and (width // h) % 2 == 0]
            raise InvalidArgument(
                f"Decoder: heads={heads} must divide width={width} into parts of even length. "
                + (f"Pass one of {allowed}." if allowed else f"Pass an even width, for example {width + 1}.")
            )
        if not isinstance(tied, bool):  # recipes come from files
            raise InvalidArgument(
                f"Decoder: tied={tied!r} must be True or False. It says whether the head is the embedding; pass a bool."
            )
        super().__init__()
        self.context = context
        self.heads = heads
        self.tied = tied
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, hidden) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.restore_derived()
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                nn.init.normal_(parameter, std=INITIAL_STDDEV / (2 * depth) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIAL_STDDEV)

    def restore_derived(self) -> None:
        """Rebuild what no state dict carries: the rotary tables, and the head's tie to the embedding.

        Call it after a model built on the meta device has received its weights, by `to_empty` and
        `load_state_dict` or by `load_state_dict(..., assign=True)`: both break ties and leave non-persistent
        buffers without values. The tables take the device and dtype of the embedding. With `tied`, the
        embedding's weight is the one kept.

        Cost: context * width / heads numbers are computed on the CPU.

        Example:
            >>> with torch.device("meta"):
            ...     model = Decoder(vocabulary=11, width=8, depth=1, heads=2, context=16)
            >>> weights = Decoder(vocabulary=11, width=8, depth=1, heads=2, context=16).state_dict()
            >>> _ = model.load_state_dict(weights, assign=True)
            >>> model.restore_derived()
            >>> model(torch.zeros(1, 2, dtype=torch.int64)).shape
            torch.Size([1, 2, 11])
        """
        weight = self.embedding.weight
        cos, sin = rotary_tables(self.context, self.embedding.embedding_dim // self.heads)
        self.cos = cos.to(device=weight.device, dtype=weight.dtype)  # [context, D/2]
        self.sin = sin.to(device=weight.device, dtype=weight.dtype)
        if self.tied:
            self.head.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits of the token that follows each of them.

        Args:
            tokens: [N, T] int64 in [0, V), T <= context. torch itself refuses numbers outside [0, V).

        Returns:
            Logits, [N, T, V]; those at position t depend on tokens 0 to t alone.

        Raises:
            InvalidArgument: If the tokens have another shape or dtype, or are longer than the context.

        Example:
            >>> model = Decoder(vocabulary=11, width=8, depth=1, heads=2, context=16)
            >>> model(torch.tensor([[1, 2, 3]])).shape
            torch.Size([1, 3, 11])
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InvalidArgument(
                f"Decoder: tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype} must be "
                "[N, T] int64. Pass for example tokens.long().view(1, -1)."
            )
        length = tokens.shape[1]
        if length > self.context:
            raise InvalidArgument(
                f"Decoder: {length} tokens in one sequence are more than context={self.context}. "
                "Cut the sequence into windows, or build the model with a longer context."
            )
        x = self.embedding(tokens)  # [N, T, w]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))  # [N, T, V]
