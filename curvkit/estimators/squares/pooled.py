"""Squares of gradients of single examples, added up over several cotangents."""

from __future__ import annotations

from torch import Tensor

from curvkit.estimators.recordings.uses import summed_squares
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.lookups import Lookup
from curvkit.estimators.rules.matrices import Matrix


class PooledSquares:
    """sum_c sum_n (dL_c/dW of example n)^2 over cotangents c, for parameters with rules.

        sum_c sum_n (y_nc x_n')^2 = sum_n (sum_c y_nc^2) (x_n^2)'

    where an example has one position: there the squares of y are added up first, and one matrix product is taken for all cotangents.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> form = Matrix("w", lambda z: z[:, None, None], lambda z: z[:, 0, 0], x, lambda t: t[:, None, None], (1, 2))
        >>> pooled = PooledSquares()
        >>> for y in (3.0, 4.0):
        ...     pooled.add("w", [(form, torch.tensor([[y]]))])
        >>> pooled.totals()["w"].tolist()   # 25 x^2
        [[25.0, 100.0]]
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._pooled: dict[Form, Tensor] = {}
        """sum_c g_c^2, in the shape of g."""

    def add(self, name: str, uses: list[tuple[Form, Tensor]]) -> None:
        """Take one more cotangent.

        Args:
            name: Of the parameter.
            uses: All its forms with dL/dz.
        """
        form, g = uses[0]
        if len(uses) > 1 or not has_one_position(form, g):
            self._put(name, summed_squares(uses))
        elif form in self._pooled:
            self._pooled[form].addcmul_(g, g)
        else:
            self._pooled[form] = g.square()

    def totals(self) -> dict[str, Tensor]:
        """Take the matrix products that are left.

        Returns:
            The sums, by name; names that nothing was added for are missing.
        """
        for form, squares in self._pooled.items():
            self._put(form.name, form.squares(squares.sqrt_()))
        self._pooled.clear()
        return self._totals

    def _put(self, name: str, found: Tensor) -> None:
        self._totals[name] = self._totals[name] + found if name in self._totals else found


def has_one_position(form: Form, g: Tensor) -> bool:
    """Whether the gradient of an example is one product for each entry, so that its square is that of its factors.

    Args:
        form: Of a parameter.
        g: dL/dz.

    Returns:
        True for dense layers and offsets on vectors, for example.
    """
    y = form.outgoing(g)
    if isinstance(form, Matrix | Lookup):
        return y.shape[1] == 1
    return form.gradients(g, slice(0, 1)).numel() == y[:1].numel()
