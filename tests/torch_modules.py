"""Every layer of torch.nn in a small network, so that a new torch with a new or changed layer shows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from oracles import normal
from torch import Tensor, nn


class Around(nn.Module):
    """A linear layer, then the module on `shape`, then tanh and a linear layer to three classes."""

    def __init__(self, module: nn.Module, *shape: int) -> None:
        super().__init__()
        self.module, self.shape = module, shape
        self.first = nn.Linear(4, math.prod(shape))
        with torch.no_grad():
            self.last = nn.Linear(self.middle(torch.zeros(2, 4)).shape[1], 3)

    def middle(self, x: Tensor) -> Tensor:
        out = self.module(self.first(x).reshape(len(x), *self.shape))
        return (out[0] if isinstance(out, tuple) else out).reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(x)))


class Calling(nn.Module):
    """A function of its input, or a module that is called with it in some other way."""

    def __init__(self, function: Callable[..., Tensor], module: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.inner is None else self.function(self.inner, x)


class Tokens(nn.Module):
    """Positions in place of tokens, embedded; the input only scales them, so that it is used."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(3 * len(x)).reshape(len(x), 3) % 7
        made = self.embedding(tokens)
        return self.head(torch.tanh((made.sum(1) if made.ndim == 3 else made) * x))


ELEMENTWISE = """
CELU ELU GELU Hardshrink Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink
Softsign Tanh Tanhshrink GLU Identity Dropout AlphaDropout FeatureAlphaDropout
"""
LAYERS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: Around(getattr(nn, name)(), 6) for name in ELEMENTWISE.split()
}
PADDED = {1: (3, 8), 2: (3, 6, 6), 3: (3, 4, 4, 4)}
PER_DIMENSION = {
    "Conv{}d": (3, 2, 3),
    "ConvTranspose{}d": (3, 2, 3),
    "MaxPool{}d": (2,),
    "AvgPool{}d": (2,),
    "LPPool{}d": (2, 2),
    "AdaptiveAvgPool{}d": (2,),
    "AdaptiveMaxPool{}d": (2,),
    "BatchNorm{}d": (3,),
    "InstanceNorm{}d": (3,),
    "ReflectionPad{}d": (1,),
    "ReplicationPad{}d": (1,),
    "ZeroPad{}d": (1,),
    "ConstantPad{}d": (1, 0.5),
    "CircularPad{}d": (1,),
    "Dropout{}d": (),
}
for pattern, arguments in PER_DIMENSION.items():
    for d, shape in PADDED.items():
        name = pattern.format(d)
        LAYERS[name] = lambda name=name, arguments=arguments, shape=shape: Around(getattr(nn, name)(*arguments), *shape)
LAYERS |= {
    "Softmax": lambda: Around(nn.Softmax(1), 6),
    "Softmin": lambda: Around(nn.Softmin(1), 6),
    "LogSoftmax": lambda: Around(nn.LogSoftmax(1), 6),
    "Threshold": lambda: Around(nn.Threshold(0.1, 0.2), 6),
    "Softmax2d": lambda: Around(nn.Softmax2d(), 3, 4, 4),
    "LayerNorm": lambda: Around(nn.LayerNorm(6), 6),
    "RMSNorm": lambda: Around(nn.RMSNorm(6), 6),
    "GroupNorm": lambda: Around(nn.GroupNorm(2, 4), 4, 5),
    "LocalResponseNorm": lambda: Around(nn.LocalResponseNorm(2), 4, 5),
    "SyncBatchNorm": lambda: Around(nn.SyncBatchNorm(3), 3, 6, 6),
    "Linear": lambda: Around(nn.Linear(6, 5), 6),
    "Bilinear": lambda: Around(Calling(lambda layer, x: layer(x, x), nn.Bilinear(4, 4, 3)), 4),
    "Flatten": lambda: Around(nn.Flatten(), 2, 3),
    "Unflatten": lambda: Around(nn.Unflatten(1, (2, 3)), 6),
    "Fold": lambda: Around(nn.Fold((3, 3), 2), 8, 4),
    "Unfold": lambda: Around(nn.Unfold(2), 2, 3, 3),
    "MaxUnpool1d": lambda: Around(
        Calling(lambda m, x: m(*F.max_pool1d(x, 2, return_indices=True)), nn.MaxUnpool1d(2)), 2, 6
    ),
    "MaxUnpool2d": lambda: Around(
        Calling(lambda m, x: m(*F.max_pool2d(x, 2, return_indices=True)), nn.MaxUnpool2d(2)), 2, 4, 4
    ),
    "MaxUnpool3d": lambda: Around(
        Calling(lambda m, x: m(*F.max_pool3d(x, 2, return_indices=True)), nn.MaxUnpool3d(2)), 2, 4, 4, 4
    ),
    "PixelShuffle": lambda: Around(nn.PixelShuffle(2), 4, 3, 3),
    "PixelUnshuffle": lambda: Around(nn.PixelUnshuffle(2), 1, 4, 4),
    "ChannelShuffle": lambda: Around(nn.ChannelShuffle(2), 4, 3, 3),
    "Upsample": lambda: Around(nn.Upsample(scale_factor=2, mode="bicubic"), 2, 3, 3),
    "UpsamplingBilinear2d": lambda: Around(nn.UpsamplingBilinear2d(scale_factor=2), 2, 3, 3),
    "UpsamplingNearest2d": lambda: Around(nn.UpsamplingNearest2d(scale_factor=2), 2, 3, 3),
    "CosineSimilarity": lambda: Around(
        Calling(lambda m, x: m(x, x.roll(1, -1) + 1)[:, None], nn.CosineSimilarity()), 4
    ),
    "PairwiseDistance": lambda: Around(Calling(lambda m, x: m(x, x.roll(1, -1))[:, None], nn.PairwiseDistance()), 4),
    "Embedding": lambda: Tokens(nn.Embedding(7, 4)),
    "LSTM": lambda: Around(nn.LSTM(4, 5, batch_first=True), 3, 4),
    "GRU": lambda: Around(nn.GRU(4, 5, batch_first=True), 3, 4),
    "RNN": lambda: Around(nn.RNN(4, 5, batch_first=True), 3, 4),
    "LSTMCell": lambda: Around(nn.LSTMCell(4, 5), 4),
    "GRUCell": lambda: Around(nn.GRUCell(4, 5), 4),
    "RNNCell": lambda: Around(nn.RNNCell(4, 5), 4),
    "MultiheadAttention": lambda: Around(
        Calling(lambda m, x: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(4, 2, batch_first=True)), 3, 4
    ),
    "TransformerEncoderLayer": lambda: Around(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3, 4),
    "TransformerEncoder": lambda: Around(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False),
        3,
        4,
    ),
    "TransformerDecoderLayer": lambda: Around(
        Calling(lambda m, x: m(x, x), nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)), 3, 4
    ),
    "TransformerDecoder": lambda: Around(
        Calling(lambda m, x: m(x, x), nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 1)),
        3,
        4,
    ),
    "Transformer": lambda: Around(Calling(lambda m, x: m(x, x), nn.Transformer(4, 2, 1, 1, 8, batch_first=True)), 3, 4),
}

NO_SECOND_DERIVATIVE: dict[str, Callable[[], nn.Module]] = {
    "Hardsigmoid": lambda: Around(nn.Hardsigmoid(), 6),
    "CrossMapLRN2d": lambda: Around(nn.CrossMapLRN2d(2), 4, 5, 5),
    "EmbeddingBag": lambda: Tokens(nn.EmbeddingBag(7, 4)),
    "cdist": lambda: Around(Calling(lambda x: torch.cdist(x, x + 1)), 3, 4),
}
"""torch raises when it differentiates them twice, the last one a function."""

ELSEWHERE = {
    "containers": {
        "Container",
        "Sequential",
        "ModuleList",
        "ModuleDict",
        "ParameterList",
        "ParameterDict",
        "Module",
        "Buffer",
        "Parameter",
    },
    "random in every mode": {"FractionalMaxPool2d", "FractionalMaxPool3d"},
    "other classes of the same layer": {"RNNBase", "RNNCellBase", "Dropout1d", "NLLLoss2d"},
    "wrappers": {"DataParallel"},
    "a loss that is a layer": {"AdaptiveLogSoftmaxWithLoss"},
}


def all_layers() -> set[str]:
    """The names of the classes of torch.nn that are layers."""
    names = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    return {name for name in names if not name.startswith(("Lazy", "_")) and not name.endswith("Loss")} - {
        name for group in ELSEWHERE.values() for name in group
    }


def batch() -> tuple[Tensor, Tensor]:
    return normal(6, 4, dtype=torch.float32), torch.arange(6) % 3
