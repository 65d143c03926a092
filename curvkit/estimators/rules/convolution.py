"""The form in which the weight of a convolution enters, with gradients of single examples that need no patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from curvkit.estimators.rules.forms import Signs, summed_in_chunks
from curvkit.estimators.rules.matrices import Matrix


@dataclass(frozen=True, eq=False)
class Window:
    """How a kernel moves over an image; a row of pixels is an image of height 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    """For torch.nn.functional.pad, from the last dimension on."""


@dataclass(frozen=True, eq=False)
class Convolution(Matrix):
    """z_n,o,p = sum_(i, k) W_oik x_n,i,(s p + d k): a matrix product over patches, which are not written out for gradients.

        dL/dW_oik of example n = sum_p g_n,o,p x_n,i,(s p + d k)

    one product per offset k, with x shifted by k. Examples are in dimension 0.
    """

    window: Window | None = None
    """Always given."""

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out the gradients of some examples; see the base class."""
        return self._written_out(g[rows], self.x.detach()[rows]).reshape(-1, *self.shape)

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares, some examples at a time; see the base class."""
        x = self.x.detach()

        def part(piece: slice) -> Tensor:
            return self._written_out(g[piece], x[piece]).square_().sum(0)

        return summed_in_chunks(len(g), self.written * g.element_size(), g.device, part).reshape(self.shape)

    def probe(self, signs: Signs) -> Tensor:
        """a_n times b_n on x: each offset on whole images, then shifted and added; see the base class."""
        A, B = self._kernels(signs)
        x = self._padded(self.x)
        n, C, (Hp, Wp) = len(x), self.groups, x.shape[2:]
        each = torch.bmm(B, x.reshape(n * C, -1, Hp * Wp)).view(n, C, -1, Hp, Wp)
        windows = self._windows(Hp, Wp)
        seen = sum((each[:, :, m, rows, columns] for m, (rows, columns) in enumerate(windows)), start=x.new_zeros(()))
        z = (A[..., None, None] * seen[:, :, None]).flatten(1, 2)
        return z.squeeze(2) if self.x.ndim == 3 else z

    def pulled(self, signs: Signs, g: Tensor) -> Tensor:
        """The transposed way; see the base class."""
        A, B = self._kernels(signs)
        n, C, g = len(g), self.groups, g.unsqueeze(2) if g.ndim == 3 else g
        Hp, Wp = self._padded(self.x.detach()[:1]).shape[2:]
        image = torch.bmm(A.view(n * C, 1, -1), g.reshape(n * C, A.shape[-1], -1)).view(n, C, *g.shape[2:])
        each = g.new_zeros(n, C, B.shape[1], Hp, Wp)
        for m, (rows, columns) in enumerate(self._windows(Hp, Wp)):
            each[:, :, m, rows, columns] = image
        made = torch.bmm(B.mT, each.view(n * C, B.shape[1], -1)).view(n, -1, Hp, Wp)
        made = F.pad(made, [-size for size in self._window.pads])
        return made.squeeze(2) if self.x.ndim == 3 else made

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """The signs at the derivatives of the gradients of examples, offset by offset; see the base class."""
        A, B = self._kernels(signs)
        C, o, i, *kernel = self._whole()
        left, right = A.view(-1, C, o, 1, 1, 1), B.view(-1, C, 1, *kernel, i).movedim(-1, 3)

        def part(piece: slice) -> Tensor:
            J = self._written_out(g_dot[piece], self.x.detach()[piece])
            if factor_dot is not None:
                J += self._written_out(g[piece], factor_dot[piece])
            return J.mul_(left[piece]).mul_(right[piece]).sum(0)

        return summed_in_chunks(len(g), self.written * g.element_size(), g.device, part).reshape(self.shape)

    def _kernels(self, signs: Signs) -> tuple[Tensor, Tensor]:
        """The signs as [N, C, o], and by offsets as [N C, height width, i]."""
        if signs.b is None:
            raise TypeError("signs of a matrix have two factors")
        (C, o, i, height, width), n = self._whole(), len(signs.a)
        kernels = signs.b.view(n, 1, i, height * width).mT.expand(n, C, height * width, i)
        return signs.a.view(n, C, o), kernels.reshape(n * C, height * width, i)

    @property
    def _window(self) -> Window:
        if self.window is None:
            raise TypeError("a convolution has a window")
        return self.window

    def _whole(self) -> tuple[int, ...]:
        """[C, o, i, height, width]."""
        _, i, *kernel = self.shape
        height, width = (1, *kernel)[-2:]
        return self.groups, self.shape[0] // self.groups, i, height, width

    def _padded(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(2) if x.ndim == 3 else x
        return F.pad(x, self._window.pads) if any(self._window.pads) else x

    def _windows(self, *size: int) -> list[tuple[slice, slice]]:
        """What the kernel sees at each offset of padded images of a size: rows and columns."""
        window, runs = self._window, list[list[slice]]()
        for length, kernel, step, apart in zip(size, window.kernel, window.stride, window.dilation, strict=True):
            span = length - apart * (kernel - 1)
            runs.append([slice(apart * offset, apart * offset + span, step) for offset in range(kernel)])
        return [(rows, columns) for rows in runs[0] for columns in runs[1]]

    def _written_out(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradients of some examples as [n, C, o, i, height, width]; examples are groups of one call where that is fast."""
        n, (C, o, i, *kernel) = len(g), self._whole()
        if n and g.device.type == "cpu" and g.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            images, shape = self._padded(x), (n * C * o, i, *kernel)
            steps: tuple[Any, Any] = self._window.stride, self._window.dilation
            made = conv2d_weight(
                images.reshape(1, n * C * i, *images.shape[2:]),
                shape,
                (g.unsqueeze(2) if g.ndim == 3 else g).reshape(1, n * C * o, -1, g.shape[-1]),
                steps[0],
                0,
                steps[1],
                n * C,
            )
            return made.view(n, C, o, i, *kernel)
        made = g.new_empty(n, C, o, i, *kernel)
        for (a, b), products in self._products(g, x):
            made[..., a, b] = products
        return made

    def _products(self, g: Tensor, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """[n, C, o, i] for each offset."""
        window, (C, o, i, height, width) = self._window, self._whole()
        g, x = g.unsqueeze(2) if g.ndim == 3 else g, self._padded(x)
        n, (Ho, Wo), (Hp, Wp) = len(g), g.shape[2:], x.shape[2:]
        (sh, sw), (dh, dw) = window.stride, window.dilation
        if window.stride == (1, 1):  # shifted images are runs of one long row, and nothing is copied
            length = (Ho - 1) * Wp + Wo
            left = F.pad(g, (0, Wp - Wo)).reshape(n * C, o, -1)[..., :length]
            flat = x.reshape(n * C, i, Hp * Wp)
            for a in range(height):
                for b in range(width):
                    start = a * dh * Wp + b * dw
                    yield (a, b), torch.bmm(left, flat[..., start : start + length].mT).view(n, C, o, i)
            return
        left = g.reshape(n * C, o, Ho * Wo)
        for a in range(height):
            for b in range(width):
                rows, columns = a * dh, b * dw
                seen = x[:, :, rows : rows + (Ho - 1) * sh + 1 : sh, columns : columns + (Wo - 1) * sw + 1 : sw]
                yield (a, b), torch.bmm(left, seen.reshape(n * C, i, Ho * Wo).mT).view(n, C, o, i)
