"""A copy of the user's model that BackPACK can walk through, module by module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.estimators.through_backpack.library import Extension, Library
from curvkit.estimators.through_backpack.losses import INSTEAD, refuse_outputs
from curvkit.losses.batches import inputs_and_targets, take_rows
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import random_state

UNSEEN = "Encountered node"
"""How BackPACK's warnings begin of an operation that it does not see."""
LOST = "expects a backpropagation quantity but it is None"
"""What BackPACK says where the output of a module is not, as the same tensor, the input of another one."""
SHOWN = 200
"""Letters of what BackPACK says."""
TARGET = re.compile(r"^<(built-in )?(function|method) |( of type object)?( at 0x\w+)?>.*$|\. If you .*$")
"""What is around the name of an operation in them."""
OPTIONS = {"padding_mode": "zeros", "divisor_override": None, "return_indices": False}
"""Options of modules that BackPACK does not look at (padding_mode="circular" is 10 to 19 % wrong), with the value that it takes them to
have. Of the others that it does not take it says so itself."""
BENT = (nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.ELU, nn.SELU)
"""Activations with a second derivative, for which the exact Hessian costs two columns per entry."""


@dataclass(frozen=True)
class Call:
    """A module that was called once in a forward pass."""

    path: str
    module: nn.Module
    input: int
    output: int
    """Entries per example."""
    positions: int
    """That share the weights, per example: tokens, pixels."""


@dataclass(frozen=True)
class Network:
    """The copy, with what a forward pass of one example calls."""

    objective: Objective
    """Of a copy of the model; parameters that are not measured are frozen in it."""
    module: nn.Module
    """The copy itself, or what BackPACK's converter made of it; over the same parameters."""
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]
    """Shape of the outputs of one example."""

    @classmethod
    def of(cls, objective: Objective, loss: nn.Module, extension: Extension, library: Library) -> Network:
        """Copy the model, and refuse what BackPACK does not see.

        A model that is not made of modules alone, or uses an activation in two places, goes through BackPACK's converter.

        Args:
            objective: The function; the model is left as it is.
            loss: As of `loss_module`.
            extension: Whose rules are asked for.
            library: BackPACK.

        Returns:
            The network.

        Raises:
            UnsupportedModel: If weights are tied, a layer is used twice, a module has no rule, or forward does something outside of
                modules.
        """
        space = objective.parameters
        if space.tied:
            alias, name = next(iter(space.tied.items()))
            _refuse(
                extension,
                f"{alias} and {name} are one tensor",
                "of tied weights BackPACK keeps one use and drops the other",
            )
        copied = objective.copied()
        for name, p in copied.model.named_parameters():
            p.requires_grad_(name in space.names)
        found = _Walk.through(copied, copied.model, extension)
        refuse_outputs(found.outputs, loss, extension)
        found.refuse_unseen(extension, library, of_torch=True)
        module = copied.model
        if found.repeats() or not _is_made_of_modules(module, extension, library):
            module = _rewritten(module, extension, library)
            found = _Walk.through(copied, module, extension)
            found.refuse_unseen(extension, library)
        for inner in module.modules():
            if getattr(inner, "inplace", False):
                setattr(inner, "inplace", False)  # noqa: B010  no attribute of nn.Module
        return cls(copied, module, tuple(found.calls), tuple(found.outputs.shape[1:]))

    @property
    def bent(self) -> int:
        """Entries per example of activations with a second derivative."""
        return sum(call.output for call in self.calls if isinstance(call.module, BENT))


class _Walk:
    """The calls of a forward pass of one example."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs = torch.empty(0)

    @classmethod
    def through(cls, objective: Objective, module: nn.Module, extension: Extension) -> _Walk:
        made, handles = cls(), list[Any]()
        one = take_rows(objective.batches[0], torch.tensor([0]))
        with objective.measuring(), _explained(extension, module), torch.no_grad():
            for path, inner in module.named_modules():
                if not any(True for _ in inner.children()):
                    handles.append(inner.register_forward_hook(made.noting(path)))
            try:
                made.outputs = module(inputs_and_targets(one)[0][0])
            finally:
                for handle in handles:
                    handle.remove()
        return made

    def noting(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            kept = output[0] if isinstance(output, tuple) else output
            if isinstance(kept, Tensor):
                features = _features(module, kept)
                given = sum(x.numel() for x in inputs if isinstance(x, Tensor))
                self.calls.append(Call(path, module, given, kept.numel(), kept.numel() // max(features, 1)))

        return note

    def repeats(self) -> bool:
        """Whether a module is called several times."""
        return len({id(call.module) for call in self.calls}) < len(self.calls)

    def refuse_unseen(self, extension: Extension, library: Library, *, of_torch: bool = False) -> None:
        """Refuse layers that are used twice, classes without a rule, and options that the rules do not look at.

        Args:
            extension: Whose rules are asked for.
            library: BackPACK.
            of_torch: Of classes without a rule, refuse torch's and BackPACK's own alone: the converter looks into others.
        """
        times = Counter(id(call.module) for call in self.calls)
        for call in self.calls:
            kind, number = f"{call.path} ({type(call.module).__name__})", times[id(call.module)]
            if number > 1 and any(True for _ in call.module.parameters()):
                _refuse(extension, f"{kind} is used {number} times", "of several uses BackPACK keeps the last")
            foreign = of_torch and not type(call.module).__module__.startswith(("torch.nn.", "backpack."))
            if not (foreign or library.has_rule(extension, call.module) or library.passes_on(call.module)):
                _refuse(
                    extension,
                    f"{kind} is a module without a rule",
                    "BackPACK has rules for some of torch's own modules",
                )
            for option, taken in OPTIONS.items():
                value = getattr(call.module, option, taken)
                if value != taken:
                    _refuse(
                        extension,
                        f"{kind} has {option}={value!r}",
                        f"BackPACK does not look at that, and takes {taken!r}",
                    )


def _features(module: nn.Module, output: Tensor) -> int:
    """Entries of an output at one position."""
    if isinstance(module, nn.Linear | nn.RNNBase | nn.Embedding):
        return output.shape[-1]
    return output.shape[1] if output.ndim > 1 else output.numel()


def _is_made_of_modules(model: nn.Module, extension: Extension, library: Library) -> bool:
    """Whether every module is known or a container that is looked through."""
    layers = [inner for inner in model.modules() if isinstance(inner, nn.RNNBase)]
    known = all(library.has_rule(extension, inner) or library.passes_on(inner) for inner in model.modules())
    return known and all(layer.num_layers == 1 for layer in layers)


def _rewritten(model: nn.Module, extension: Extension, library: Library) -> nn.Module:
    """By BackPACK's converter; refused is what it could not follow, and what it warns of."""
    try:
        with random_state():
            made, said = library.rewritten(model)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"BackPACK({extension!r}): BackPACK's converter cannot follow the forward pass of {type(model).__name__} "
            f"({_first_line(error)}); it takes modules, sums, products with numbers, flatten and permute. Use {INSTEAD[extension]}."
        ) from error
    unseen = list(
        dict.fromkeys(TARGET.sub("", text.partition("target=")[2]) for text in said if text.startswith(UNSEEN))
    )
    if unseen:
        _refuse(
            extension,
            f"the forward pass of {type(model).__name__} uses {', '.join(unseen[:3])} outside of modules",
            "BackPACK sees modules, and sums, products with numbers, flatten and permute, which it makes modules of",
        )
    return made


@contextmanager
def _explained(extension: Extension, model: nn.Module) -> Generator[None]:
    """Say that it is BackPACK that cannot follow the model."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CurvkitError) or ran_out_of_memory(error):
            raise
        refuse_failure(extension, model, model, error)


def refuse_failure(extension: Extension, module: nn.Module, model: nn.Module, error: Exception) -> NoReturn:
    """Refuse a model on which BackPACK fails, with its own words.

    Args:
        extension: For the message.
        module: At which it failed, or the model.
        model: That it is a part of.
        error: What was raised.

    Raises:
        UnsupportedModel: Always.
    """
    path = next((path for path, inner in model.named_modules() if inner is module and path), "")
    where = f"{path} ({type(module).__name__})" if path else type(module).__name__
    if LOST in str(error):
        raise UnsupportedModel(
            f"BackPACK({extension!r}): what {where} gives does not go straight into another module: something is done to it in between, "
            f"or after the last one, which BackPACK does not see. Write that as one of torch's modules, or use {INSTEAD[extension]}."
        ) from error
    raise UnsupportedModel(
        f"BackPACK({extension!r}): BackPACK fails on {where}: {_first_line(error)}. Use {INSTEAD[extension]}."
    ) from error


def _first_line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0][:SHOWN].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _refuse(extension: Extension, what: str, why: str) -> NoReturn:
    raise UnsupportedModel(f"BackPACK({extension!r}): {what}; {why}. Use {INSTEAD[extension]}.")
