"""The three models of the benchmarks, trained briefly on data that needs no download, so that their spectra are realistic."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvkit import Objective
from curvkit.losses import token_cross_entropy
from curvkit.models import MLP, CharacterVocabulary, Decoder, ResNet, random_windows, spaced_windows, topics_text


@dataclass(frozen=True, eq=False)
class Case:
    """A trained model with the batch that is measured."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    shape: str
    optimizer: torch.optim.Optimizer
    """That trained the model."""

    def objective(self) -> Objective:
        return Objective(self.model, self.loss, [(self.x, self.y)])

    def value(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)


def mlp(steps: int = 60) -> Case:
    x, y = _digits(28)
    model, optimizer = _trained(MLP([784, 512, 512, 10]), x.flatten(1), y, steps=steps, rows=128)
    shape = "784-512-512-10, ReLU, 512 digits"
    return Case("MLP", model, F.cross_entropy, x[:512].flatten(1), y[:512], shape, optimizer)


def resnet(steps: int = 20) -> Case:
    x, y = _digits(32)
    x = x.expand(-1, 3, -1, -1).contiguous()
    model, optimizer = _trained(ResNet(), x, y, steps=steps, rows=64)
    shape = "BatchNorm in eval, 64 images 3x32x32"
    return Case("ResNet-20", model.eval(), F.cross_entropy, x[:64], y[:64], shape, optimizer)


def decoder(steps: int = 20) -> Case:
    text = topics_text()
    vocabulary = CharacterVocabulary.from_text(text + string.printable[:95])
    tokens = vocabulary.encode(text)
    torch.manual_seed(0)
    model = Decoder(vocabulary=len(vocabulary), width=256, depth=6, heads=8, context=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = random_windows(tokens, 128, 8, generator=draw)
        _step(optimizer, token_cross_entropy(model(x), y))
    x, y = spaced_windows(tokens, 128, 8)
    shape = "Llama-like, width 256, 6 blocks, 8 x 128 tokens"
    return Case("decoder", model, token_cross_entropy, x, y, shape, optimizer)


CASES = {"mlp": mlp, "resnet": resnet, "decoder": decoder}


def _digits(size: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.interpolate(images, size=(size, size), mode="bilinear")[order], torch.tensor(digits.target)[order]


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int, rows: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """On cross-entropy."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(x), (rows,), generator=draw)
        _step(optimizer, F.cross_entropy(model(x[index]), y[index]))
    return model, optimizer


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
