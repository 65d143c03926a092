"""Small reference models that a checkpoint recipe may name by string, and the character data to train one.

    BUILDERS = {"mlp": MLP, "resnet": ResNet, "decoder": Decoder, "nanogpt": GPT}

They are complete rather than minimal: between them they have batch statistics, tied parameters, fused
attention and non-persistent buffers, which are the places where curvature code goes wrong.
"""

from __future__ import annotations

from curvkit.models.builders import BUILDERS, build
from curvkit.models.characters import CharacterVocabulary, topics_text
from curvkit.models.decoder import Decoder
from curvkit.models.mlp import MLP
from curvkit.models.nanogpt import GPT
from curvkit.models.resnet import ResNet
from curvkit.models.windows import random_windows, spaced_windows

__all__ = [
    "BUILDERS",
    "GPT",
    "MLP",
    "CharacterVocabulary",
    "Decoder",
    "ResNet",
    "build",
    "random_windows",
    "spaced_windows",
    "topics_text",
]
