"""The point that an operator belongs to: has any parameter or buffer changed since?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

END_BYTES = 1 << 12
"""Bytes that are kept of either end of a tensor."""


@dataclass(frozen=True, eq=False)
class _Watched:
    """One parameter or buffer, where it is registered, and a window on the bytes at its ends."""

    kind: str
    name: str
    holder: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor
    address: int
    version: int
    window: tuple[Tensor, ...]

    def moved(self) -> bool:
        """Whether another tensor, another memory or a new version stands there."""
        tensor, here = self.tensor, self.holder.get(self.key)
        return here is not tensor or tensor.data_ptr() != self.address or _version(tensor, self.kind) != self.version


@dataclass(frozen=True, eq=False)
class _Registry:
    """What a module holds: its parameters, buffers and children, by identity."""

    name: str
    held: tuple[Mapping[str, object], ...]
    identities: tuple[list[int], ...]

    def moved(self) -> bool:
        """Whether something was added, removed or replaced."""
        return any([*map(id, held.values())] != ids for held, ids in zip(self.held, self.identities, strict=True))


class Point:
    """All that a function depends on besides its data: the parameters and buffers of a model, frozen ones included.

    Kept are, of each tensor, its identity, address and version, and a copy of the bytes at both ends, because writes through `.data`
    move no version. Of a large tensor the middle is not compared: whoever writes to weights writes to all of them. The version of
    a buffer is not compared, since it moves where a forward pass writes to it and the old value is restored.

    Args:
        model: Any module.

    Cost: of a comparison at most 8 KiB read per tensor, and one call of torch for all of them: next to nothing beside a product.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> point = Point(model)
        >>> point.changed()
        >>> model.bias.data += 1
        >>> point.changed()
        "parameter 'bias'"
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched, self._registries = _watch(model), _registries(model)
        self._joined = _by_device(self._watched)
        self._kept = [window.clone() for window in self._windows()]

    def changed(self) -> str | None:
        """Name the first tensor that changed.

        Returns:
            "parameter 'name'" or "buffer 'name'", "module 'name'" if something was added to or taken from it; None if there is none.
        """
        known = not any(watched.moved() for watched in self._watched)
        if not (known and all(map(torch.equal, self._windows(), self._kept))):
            return next(f"{w.kind} {w.name!r}" for w, same in zip(self._watched, self._same(), strict=True) if not same)
        return next((f"module {r.name!r}" for r in self._registries if r.moved()), None)

    def _windows(self) -> list[Tensor]:
        """The watched bytes of all tensors, joined by device, as words: to compare bytes takes torch twenty times longer."""
        return [torch.cat(windows).view(torch.int64) for windows in self._joined.values()]

    def _same(self) -> list[bool]:
        """Tensor by tensor, to find the culprit."""
        kept = {
            device: iter(bits.view(torch.uint8).split([window.numel() for window in self._joined[device]]))
            for device, bits in zip(self._joined, self._kept, strict=True)
        }
        return [
            all([torch.equal(part, next(kept[w.tensor.device])) for part in w.window]) and not w.moved()
            for w in self._watched
        ]


def _by_device(watched: list[_Watched]) -> dict[torch.device, list[Tensor]]:
    """The windows of the tensors on each device, filled up to words of eight bytes."""
    joined: dict[torch.device, list[Tensor]] = {}
    for w in watched:
        joined.setdefault(w.tensor.device, []).extend(w.window)
    for device, windows in joined.items():
        rest = -sum(window.numel() for window in windows) % 8
        windows.append(torch.zeros(rest, dtype=torch.uint8, device=device))
    return joined


def _registries(model: nn.Module) -> list[_Registry]:
    found = []
    for name, module in model.named_modules():
        kinds = (vars(module).get(kind) for kind in ("_parameters", "_buffers", "_modules"))
        held = tuple(registered for registered in kinds if isinstance(registered, dict))
        found.append(_Registry(name, held, tuple([*map(id, registered.values())] for registered in held)))
    return found


def _watch(model: nn.Module) -> list[_Watched]:
    found: dict[int, _Watched] = {}
    for prefix, module in model.named_modules():
        for kind, holder in (("parameter", _held(module, "parameters")), ("buffer", _held(module, "buffers"))):
            for key, tensor in holder.items():
                if tensor is None or id(tensor) in found:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                found[id(tensor)] = _Watched(
                    kind, name, holder, key, tensor, tensor.data_ptr(), _version(tensor, kind), _window(tensor)
                )
    return list(found.values())


def _held(module: nn.Module, what: str) -> Mapping[str, Tensor | None]:
    """The dictionary that a module keeps them in, or a copy of one where they are kept elsewhere, as in TorchScript."""
    held = vars(module).get(f"_{what}")
    return held if isinstance(held, dict) else dict(getattr(module, f"named_{what}")(recurse=False))


def _window(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of the first and the last bytes of the memory between a tensor's first and last element."""
    if not tensor.numel():
        return ()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    raw = storage[tensor.storage_offset() * tensor.itemsize :][: span * tensor.itemsize]
    return (raw,) if raw.numel() <= 2 * END_BYTES else (raw[:END_BYTES], raw[-END_BYTES:])


def _version(tensor: Tensor, kind: str) -> int:
    return 0 if kind == "buffer" or tensor.is_inference() else tensor._version
