"""The library BackPACK, an optional package: the one place where it is imported, and what is used of it."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvkit.errors import MissingExtra

Extension = Literal["DiagHessian", "DiagGGNExact", "DiagGGNMC"]
SAVED: dict[str, str] = {
    "DiagHessian": "diag_h",
    "DiagGGNExact": "diag_ggn_exact",
    "DiagGGNMC": "diag_ggn_mc",
}
"""The attribute of a parameter into which an extension of BackPACK writes."""
MARK = "_backpack_extend"
"""The attribute by which BackPACK knows a module that it has extended; a copy of such a module has it, too, without the hooks."""


class Library:
    """What curvkit uses of BackPACK.

    Raises:
        MissingExtra: If the package is not installed, or cannot be imported.
    """

    def __init__(self) -> None:
        self._package = _package()

    def extension(self, name: Extension, *, drawn: tuple[type[nn.Module], Tensor] | None = None) -> Any:
        """Make an extension for one backward pass.

        Args:
            name: Of the extension.
            drawn: Class of the loss, and the gradients of the outputs by targets that were drawn, [1, N, ...], in place of those that
                BackPACK would draw from the global random state.

        Returns:
            BackPACK's object, which has the module that it was at last called with as `at`.
        """
        base = getattr(self._package.extensions, name)

        def at(extension: Any, module: nn.Module, *gradients: Any) -> None:
            extension.at = module
            base.__call__(extension, module, *gradients)

        made = type(name, (base,), {"__call__": at, "at": None})()
        if drawn is not None:
            rule = self._package.extensions.module_extension.ModuleExtension()
            rule.backpropagate = lambda *_: drawn[1]
            made.set_module_extension(drawn[0], rule, overwrite=True)
        return made

    def has_rule(self, name: Extension, module: nn.Module) -> bool:
        """Whether an extension has a rule for a module: by its class itself, not by a base class.

        Args:
            name: Of the extension.
            module: Any.

        Returns:
            False for containers, too.
        """
        rules: dict[type[nn.Module], Any] = vars(self.extension(name))["_BackpropExtension__module_extensions"]
        return type(module) in rules

    def passes_on(self, module: nn.Module) -> bool:
        """Whether a module is a container that BackPACK looks through, as nn.Sequential.

        Args:
            module: Any.

        Returns:
            Whether it needs no rule.
        """
        return bool(self._package.is_no_op(module))

    def rewritten(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        """Let BackPACK's converter rewrite a model: sums, products with numbers, flatten and the like become modules.

        Args:
            model: A copy, which is changed.

        Returns:
            A module over the same parameters, and what BackPACK warned of.

        Raises:
            Exception: What BackPACK, torch.fx and the model raise.
        """
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = self._package.convert_module_to_backpack(model, False)
        return made, tuple(str(warning.message) for warning in said)

    @contextlib.contextmanager
    def extended(self, *modules: nn.Module) -> Generator[None]:
        """Extend modules for a while.

        The hooks are removed again, and the global state of BackPACK is as before: the hooks of other modules, which are the user's, stay.

        Args:
            modules: Copies: tensors of the last pass may stay on them.
        """
        context, storing = self._package.CTX, self._package.disable
        before, stored = context.hook_handles, storing.store_io
        context.hook_handles, storing.store_io = [], True
        try:
            for module in modules:
                for inner in module.modules():
                    vars(inner).pop(MARK, None)
                self._package.extend(module)
            yield
        finally:
            for handle in context.hook_handles:
                handle.remove()
            context.hook_handles, storing.store_io = before, stored

    def backward(self, total: Tensor, extension: Any) -> None:
        """Run the backward pass of extended modules: gradients go into `.grad`, the extension's numbers beside them.

        Some rules make tensors of torch's default dtype, which is that of the loss for the time of the pass.

        Args:
            total: The loss.
            extension: As of `extension`.

        Raises:
            Exception: What BackPACK raises.
        """
        before = torch.get_default_dtype()
        torch.set_default_dtype(total.dtype)
        try:
            with self._package.backpack(extension):
                total.backward()
        finally:
            torch.set_default_dtype(before)


def _package() -> Any:
    """BackPACK's package; a package of another kind has that name on PyPI, too."""
    advice = "Install it with: pip install 'curvkit[backpack]'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module("backpack")
    except ImportError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise MissingExtra(
            f"BackPACK: the package backpack-for-pytorch is not installed, or cannot be imported ({reason}). {advice}"
        ) from error
    if not hasattr(found, "extend"):
        raise MissingExtra(f"BackPACK: the package backpack that is installed is another one. {advice}")
    return found
