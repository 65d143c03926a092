"""Which optimizer of torch a state is of, by the names in it, and whether its numbers are those of such an optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curvkit.checkpoints.documents import brief

HARMLESS = frozenset(
    {
        *("params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize"),
        *(
            "decoupled_weight_decay",
            "initial_lr",
            "max_lr",
            "min_lr",
            "base_momentum",
            "max_momentum",
            "swa_lr",
            "lr_scale",
        ),
    }
)
"""In groups beside the hyperparameters of a class: how it is computed, and what schedules of the learning rate write there."""
MARKS = (
    (("absmax", "absmax1", "qmap1", "state1"), "the optimizer's state is quantised to 8 bits, as bitsandbytes does"),
    (
        ("exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"),
        "the optimizer is Adafactor, which keeps sums of rows and columns in place of a second moment of each parameter",
    ),
    (("exp_avg_var",), "the optimizer is AdaBelief, whose limit is not known"),
    (("old_dirs", "d", "prev_flat_grad"), "the optimizer is LBFGS, which has no fixed step size"),
    (("prev", "step_size"), "the optimizer is Rprop, which uses the signs of gradients only"),
    (("z",), "the optimizer averages its iterates (schedule-free), and its limit is not known"),
    (("ax", "eta"), "the optimizer is ASGD, whose limit is not known"),
)
"""Keys in the state of a parameter -> which optimizer that is not treated they tell of."""
GROUP_MARKS = (
    (("ns_steps",), "the optimizer is Muon, whose limit is not known"),
    (("history_size",), "the optimizer is LBFGS, which has no fixed step size"),
    (("etas", "step_sizes"), "the optimizer is Rprop, which uses the signs of gradients only"),
    (("lambd", "t0"), "the optimizer is ASGD, whose limit is not known"),
    (("clip_threshold",), "the optimizer is Adafactor, whose limit is not known"),
)
"""The same by keys in the groups."""


class Unusable(Exception):
    """Why a state is not used; the text becomes the reason of an `Unassigned`."""


@dataclass(frozen=True)
class Kind:
    """An optimizer of torch as its state shows it.

    Args:
        name: Its class.
        hyperparameters: That every group has.
        tensors: That the state of every parameter has.
        numbers: Likewise.
        optional: Tensors that it may have.
        absent: Hyperparameters by which another class is told from it.
    """

    name: str
    hyperparameters: frozenset[str]
    tensors: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset({"step"})
    optional: frozenset[str] = frozenset()
    absent: frozenset[str] = field(default=frozenset())

    def has_groups(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups are of this class: all of its hyperparameters, and no other but what says nothing of the update.

        Args:
            groups: Of a state.

        Returns:
            False if one of them is of another class.
        """
        return all(self.hyperparameters <= set(group) and not self._foreign(group) for group in groups)

    def _foreign(self, group: Mapping[str, Any]) -> set[str]:
        more = set(group) - self.hyperparameters - HARMLESS
        return {name for name in more if not isinstance(group[name], str)} | (self.absent & set(group))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ADAM = "Adam or AdamW"
KINDS = (
    Kind(
        "SGD",
        _words("lr momentum dampening weight_decay nesterov"),
        numbers=_words(""),
        optional=_words("momentum_buffer"),
    ),
    Kind(
        ADAM,
        _words("lr betas eps weight_decay amsgrad"),
        _words("exp_avg exp_avg_sq"),
        optional=_words("max_exp_avg_sq"),
    ),
    Kind(
        "NAdam",
        _words("lr betas eps weight_decay momentum_decay"),
        _words("exp_avg exp_avg_sq"),
        _words("step mu_product"),
    ),
    Kind("RAdam", _words("lr betas eps weight_decay decoupled_weight_decay"), _words("exp_avg exp_avg_sq")),
    Kind(
        "Adamax",
        _words("lr betas eps weight_decay"),
        _words("exp_avg exp_inf"),
        absent=_words("decoupled_weight_decay"),
    ),
    Kind(
        "RMSprop",
        _words("lr momentum alpha eps centered weight_decay"),
        _words("square_avg"),
        optional=_words("momentum_buffer grad_avg"),
    ),
    Kind("Adagrad", _words("lr lr_decay eps weight_decay initial_accumulator_value"), _words("sum")),
    Kind("Adadelta", _words("lr rho eps weight_decay"), _words("square_avg acc_delta")),
)
"""Of torch.optim, those of which a state is used."""


def kind_of(groups: Sequence[Mapping[str, Any]], entries: Collection[Mapping[str, Any]], said: str | None) -> Kind:
    """Recognise the class.

    Args:
        groups: With plain hyperparameters.
        entries: The states of parameters.
        said: The class that the checkpoint names; None if it names none.

    Returns:
        The class.

    Raises:
        Unusable: If it is none that is treated, or the names of groups and states contradict each other.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        >>> kind_of([group], [], None).name
        'SGD'
    """
    keys = {key for entry in entries for key in entry}
    shared = {key for group in groups for key in group}
    for marks, found in ((MARKS, keys), (GROUP_MARKS, shared)):
        reason = next((reason for names, reason in marks if set(names) & found), None)
        if reason is not None:
            raise Unusable(reason)
    fits = [kind for kind in KINDS if kind.has_groups(groups) and not keys - _state(kind)]
    fits = [kind for kind in fits if all(kind.tensors | kind.numbers <= set(entry) for entry in entries)]
    if said is not None:
        fits = [kind for kind in fits if said in ({"Adam", "AdamW"} if kind.name == ADAM else {kind.name})]
    if len(fits) == 1:
        return fits[0]
    if said is not None and not any(said in kind.name.split() for kind in KINDS):
        raise Unusable(f"the optimizer is {brief(said)}, whose limit is not known")
    near = next((kind for kind in KINDS if kind.has_groups(groups) and kind.tensors <= keys), None)
    if near is not None:
        raise Unusable(f"the optimizer's state is not that of {near.name}: {_difference(near, entries)}")
    raise Unusable(
        f"the optimizer is none of torch that is known: its groups have {_listed(sorted(shared - {'params'}))}"
        + (f", the states of its parameters {_listed(sorted(keys))}" if keys else "")
    )


def class_name(kind: Kind, groups: Sequence[Mapping[str, Any]], said: str | None) -> str:
    """Tell Adam from AdamW, which differ in how weights decay.

    Args:
        kind: As recognised.
        groups: With plain hyperparameters.
        said: The class that the checkpoint names.

    Returns:
        Its class.

    Raises:
        Unusable: If groups differ in that.

    Example:
        >>> class_name(KINDS[1], [{"decoupled_weight_decay": True}], None)
        'AdamW'
    """
    if kind.name != ADAM:
        return kind.name
    decoupled = {group["decoupled_weight_decay"] for group in groups if "decoupled_weight_decay" in group}
    if len(decoupled) > 1:
        raise Unusable("weights decay as in Adam in some groups of the optimizer, and as in AdamW in others")
    if decoupled:
        return "AdamW" if decoupled.pop() is True else "Adam"
    return said if said in ("Adam", "AdamW") else ADAM


def _state(kind: Kind) -> frozenset[str]:
    return kind.tensors | kind.numbers | kind.optional


def _difference(kind: Kind, entries: Collection[Mapping[str, Any]]) -> str:
    """What the states of parameters have too little or too much."""
    wanted = kind.tensors | kind.numbers
    missing = sorted({key for entry in entries for key in wanted - set(entry)})
    if missing:
        return f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing for some parameters"
    more = sorted({key for entry in entries for key in entry} - _state(kind))
    return f"it has {_listed(more)}" if more else "the checkpoint names another class"


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(brief(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
