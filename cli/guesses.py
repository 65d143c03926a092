"""What the shapes of weights suggest of inputs, targets and loss: a beginning, which the owner of the checkpoint corrects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .failures import harmless

EMBEDDING = re.compile(r"emb|wte|tok", re.IGNORECASE)
OF_POSITIONS = re.compile(r"pos|type|wpe", re.IGNORECASE)
"""In names of embeddings of something else than tokens, which files in alphabetical order have before theirs."""
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
"""How classes of transformers end that give one label per row, in an object with logits."""
OF_CLASSIFIER = '''

def loss(model, batch):
    """Sum of the cross-entropies of the rows, and how many there are: the model returns an object with logits."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).logits, targets, reduction="sum"), len(targets)
'''
"""Their loss, which a function of outputs and targets cannot be."""
LONGEST = 120


def printable(text: object, most: int = LONGEST) -> str:
    """A text of a stranger's as part of a comment: one line, no control characters, not endless."""
    shown = harmless(str(text)[: 4 * most]).replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= most else shown[: most - 3] + "..."


@dataclass(frozen=True)
class Guess:
    """What the first and the last matrix among the weights suggest."""

    first: str
    """Name of the first matrix; where that is an embedding, of the one of tokens."""
    shape: Sequence[int]
    """Of that matrix."""
    outputs: int
    """Rows of the last matrix: the classes, if it is the last layer."""
    classifies: bool
    """Whether it is a classifier of transformers."""

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], architecture: str = "") -> Guess:
        """Look at the shapes of all weights, and at the class of transformers, if there is one."""
        matrices = [(name, shape) for name, shape in shapes.items() if len(shape) >= 2 and 0 not in shape]
        first, shape = matrices[0] if matrices else ("", (1, 1))
        if EMBEDDING.search(first):
            tables = (item for item in matrices if EMBEDDING.search(item[0]) and not OF_POSITIONS.search(item[0]))
            first, shape = next(tables, (first, shape))
        return cls(first, shape, matrices[-1][1][0] if matrices else 1, architecture.endswith(CLASSIFIERS))

    @property
    def tokens(self) -> bool:
        """Whether the first matrix looks like an embedding of tokens."""
        return len(self.shape) == 2 and EMBEDDING.search(self.first) is not None

    @property
    def imports(self) -> str:
        """What the loss needs; empty if nothing."""
        return "from curvkit.losses import token_cross_entropy" if self.loss == "token_cross_entropy" else ""

    @property
    def loss(self) -> str:
        """An expression."""
        if self.classifies:
            return "curvkit.BatchLoss(loss)"
        if self.tokens:
            return "token_cross_entropy"
        return "F.cross_entropy" if self.outputs > 1 else "F.mse_loss"

    @property
    def definition(self) -> str:
        """The function that the loss is, where it needs one; empty if not."""
        return OF_CLASSIFIER if self.classifies else ""

    def data(self) -> Iterator[str]:
        """Lines that draw random inputs and targets."""
        named = printable(self.first, 60) or "nothing"
        if self.tokens:
            yield f"inputs = torch.randint({self.shape[0]}, (32, 16), generator=draw)  # guessed from {named}"
            kinds, sizes = (self.outputs, "(32,)") if self.classifies else (self.shape[0], "(32, 16)")
            yield f"targets = torch.randint({kinds}, {sizes}, generator=draw)"
            return
        size = {3: ", 64", 4: ", 32, 32", 5: ", 8, 32, 32"}.get(len(self.shape), "")
        yield f"inputs = torch.randn(32, {self.shape[1]}{size}, generator=draw)  # guessed from {named}"
        if self.outputs > 1:
            yield f"targets = torch.randint({self.outputs}, (32,), generator=draw)"
        else:
            yield "targets = torch.randn(32, 1, generator=draw)"
