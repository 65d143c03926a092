"""What all contracts have in common: how a failure is said, and what nothing may disturb."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import NoReturn

import numpy
import torch
from torch import Tensor, nn

from curvkit.errors import InvalidArgument
from curvkit.objectives import Objective
from curvkit.objectives.data import fingerprint


@dataclass(frozen=True)
class Contract:
    """How a property that does not hold is said."""

    check: str
    """Name of the function."""
    remedy: str
    """What to do next, as a sentence."""

    def said(self, contract: str, got: str, allowed: str) -> str:
        """Write the message.

        Args:
            contract: The property.
            got: What was found.
            allowed: What is allowed.

        Returns:
            With the remedy.
        """
        return f"{self.check}: '{contract}' does not hold: {got}; allowed: {allowed}. {self.remedy}"

    def refuse(self, contract: str, got: str, allowed: str) -> NoReturn:
        """Raise it.

        Args:
            contract: The property.
            got: What was found.
            allowed: What is allowed.

        Raises:
            InvalidArgument: Always.
        """
        raise InvalidArgument(self.said(contract, got, allowed))

    def compare(self, contract: str, what: str, got: float, allowed: float) -> None:
        """Refuse a number that is too large, or NaN.

        Args:
            contract: The property.
            what: The number is.
            got: Its value.
            allowed: The largest value that is allowed.
        """
        if not got <= allowed:
            self.refuse(contract, f"{what} is {got:.3g}", f"at most {allowed:.3g}")


CHECK_ESTIMATOR = Contract(
    "check_estimator",
    "Mend the estimator; the docstring of curvkit.testing.check_estimator says what each property is.",
)


@contextlib.contextmanager
def undisturbed(contract: Contract, objective: Objective | None, during: str) -> Generator[None]:
    """Compare before and after what must not change.

    Args:
        contract: For the message.
        objective: Whose model and data are watched, with random states and global flags; None: nothing is.
        during: What is done inside, for the message.

    Raises:
        InvalidArgument: Naming what changed.

    Cost: two hashes of the model's tensors and of the data.
    """
    before = None if objective is None else _state(objective)
    yield
    if objective is None or before is None:
        return
    after = _state(objective)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        contract.refuse("nothing is disturbed", f"{during} changed: {shown}", "everything as it was")


def _state(objective: Objective) -> dict[str, object]:
    """All that a measurement must leave as it was, by name, in a form that `==` compares bit for bit."""
    numpy_kind, keys, *rest = numpy.random.get_state()
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    state: dict[str, object] = {
        "the data": fingerprint(objective.batches),
        "torch's random state": fingerprint([torch.get_rng_state()]),
        "numpy's random state": (numpy_kind, numpy.asarray(keys).tobytes(), *rest),
        "Python's random state": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "autocast": torch.is_autocast_enabled("cpu"),
        "number of threads": torch.get_num_threads(),
        "float32 precision": _precision(),
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "fused encoder path": torch.backends.mha.get_fastpath_enabled(),
        "attention kernels": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
    }
    for name, p in objective.model.named_parameters():
        state[f"the parameter {name!r}"] = (id(p), p.data_ptr(), fingerprint([p]))
        state[f"requires_grad of {name!r}"] = p.requires_grad
        state[f".grad of {name!r}"] = None if p.grad is None else (id(p.grad), fingerprint([p.grad]))
        state[f"hooks of {name!r}"] = _hooks(p)
    for name, b in objective.model.named_buffers():
        state[f"the buffer {name!r}"] = (id(b), fingerprint([b]))
    for name, module in objective.model.named_modules():
        state[f"the mode of {name or 'the model'!r}"] = module.training
        state[f"hooks of {name or 'the model'!r}"] = _hooks(module)
    return state


def _precision() -> list[object]:
    """Where torch may replace float32, by the interface that can always be read; before torch 2.9 there is only the older one."""
    layers = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    operators = [getattr(layer, name, None) for layer in layers for name in ("matmul", "conv", "rnn")]
    found: list[object] = [getattr(holder, "fp32_precision", None) for holder in (*layers, *operators)]
    return found if any(found) else [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


def _hooks(holder: nn.Module | Tensor) -> list[tuple[str, int]]:
    """Which hooks are registered on a module or a tensor."""
    names = {
        *vars(holder),
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
    }  # the two of a tensor are not in its __dict__
    found = {name: getattr(holder, name, None) or {} for name in names if name.endswith("_hooks")}
    return sorted((name, id(hook)) for name, hooks in found.items() for hook in hooks.values())
