"""A forward pass whose uses of parameters are recorded, call by call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvkit.errors import UnsupportedModel, ran_out_of_memory
from curvkit.estimators.recordings.insides import INSIDES, followed
from curvkit.estimators.recordings.uses import Call, Common, Use, tensors_in
from curvkit.estimators.rules.forms import Form
from curvkit.estimators.rules.layouts import WithoutExamples
from curvkit.estimators.rules.row_runs import Rows
from curvkit.estimators.rules.rule_parts import Rule
from curvkit.estimators.rules.table import ADDS, COUPLING, KEYWORDS, RESHAPES, RULES, SPLITS
from curvkit.parameters import ParameterSpace


class Recording(TorchFunctionMode):
    """While active, each call of `RULES` that has a parameter in it is recorded.

    Calls are seen where torch dispatches its functions, so that functional use, several uses of one parameter and modules of any
    class count. Where the output of such a call is the same for all examples and is added to something that is not, the sum counts as
    its output, in which the gradients of examples are apart. What the model computes stays as it is.

    Args:
        parameters: Which are looked for, by name.
        num_examples: N, rows of dimension 0 of the batch; None: of the first tensor in the call of `model`.
        model: Whose call says N; its hook for that is gone when the recording ends.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        num_examples: int | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.num_examples = num_examples or 0
        self.time_first = False
        self.model, self.calls = model, 0
        """How often the model was called."""
        self.uses: list[Use] = []
        self.refused: dict[str, str] = {}
        """Parameters of which a use has no rule, with the reason."""
        self.coupled: str | None = None
        """A call that couples the examples, whose gradients are then not known."""
        self._hook: Any = None
        self._common: dict[int, Common] = {}
        self._runs: dict[int, tuple[Tensor, str]] = {}
        """Runs of rows that a parameter was cut into, with names for the rules."""
        self._rows: dict[str, tuple[str, slice]] = {}
        """Those names, with the parameter's and the rows."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._alive = list(parameters.values())  # an id means something as long as they live

    @classmethod
    def of(cls, model: nn.Module, parameters: Any = None) -> Recording:
        """A recording of one forward pass of a model in training.

        Args:
            model: In whatever mode it is.
            parameters: Shell patterns for the names, or a `ParameterSpace`; None takes all that require a gradient.

        Returns:
            The context, which learns the number of examples from the call.

        Raises:
            InvalidArgument: If a pattern matches no name.

        Example:
            >>> import torch
            >>> model = nn.Linear(2, 3)
            >>> with Recording.of(model) as recording:
            ...     _ = model(torch.ones(4, 2))
            >>> recording.num_examples, len(recording.uses)
            (4, 1)
        """
        space = parameters if isinstance(parameters, ParameterSpace) else ParameterSpace.of(model, parameters)
        own: Any = dict(zip(space.names, space.tensors(model), strict=True))
        return cls(own, model=model)

    def __enter__(self) -> Self:
        """Wait for the call of the model."""
        if self.model is not None:
            self._hook = self.model.register_forward_pre_hook(self._called, prepend=True, with_kwargs=True)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Leave the model as it was."""
        super().__exit__(*exception)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _called(self, model: Any, args: Any, kwargs: Any) -> None:
        self.calls += 1
        first = next(tensors_in((args, kwargs)), None)
        self.num_examples = first.shape[0] if first is not None and first.ndim else 0

    def name(self, tensor: Any) -> str | None:
        """Name of a parameter that is looked for; None for anything else."""
        if id(tensor) in self._runs:
            return self._runs[id(tensor)][1]
        return self._names.get(id(tensor)) if isinstance(tensor, nn.Parameter) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record it."""
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        found = {self._whole(name) for value in given if (name := self.name(value)) is not None}
        if found and func in INSIDES:
            return self._inside(func, args, kwargs)
        output = func(*args, **kwargs)
        if self.coupled is None and func in COUPLING and COUPLING[func](*args, **kwargs):
            self.coupled = f"{func.__name__} in training mode"
        if any(id(value) in self._common for value in given):
            self._with_common(func, output, Call(args, kwargs, given), found)
        elif found:
            self._with_parameters(func, output, Call(args, kwargs, given), found)
        return output

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record the calls inside of a function, whose examples come second."""
        self.time_first = True
        super().__enter__()
        try:
            return followed(func, *args, **kwargs)
        finally:
            super().__exit__(None, None, None)
            self.time_first = False

    def _whole(self, name: str) -> str:
        """The parameter's name for that of a run of its rows."""
        return self._rows[name][0] if name in self._rows else name

    def _cut(self, parameter: Tensor, runs: Any) -> bool:
        """Note that a parameter was cut into runs of rows; whether it was."""
        name, begin = self._names.get(id(parameter)), 0
        if name is None or any(run.shape[1:] != parameter.shape[1:] for run in runs):
            return False
        for run in runs:
            rows = slice(begin, begin + len(run))
            key, begin = f"{name}[{rows.start}:{rows.stop}]", rows.stop
            self._runs[id(run)] = run, key
            self._rows[key] = name, rows
        return begin == len(parameter)

    def _placed(self, form: Form) -> Form:
        """The form of a run of rows as one of the whole parameter."""
        if form.name not in self._rows:
            return form
        name, rows = self._rows[form.name]
        return Rows(name, form.outgoing, form.incoming, form, rows, tuple(self.parameters[name].shape))

    def _with_parameters(self, func: Any, output: Any, call: Call, found: set[str]) -> None:
        """Record a call by its rule."""
        rule = RULES.get(func)
        if func in SPLITS and self._cut(call.given[0], output):
            return
        if rule is None or not any(made.requires_grad for made in tensors_in(output)):
            self._without_rule(func, output, found)
            return
        try:
            if not self.num_examples:
                raise UnsupportedModel("it is used before the model is called, or the call has no examples")
            forms = self._forms(rule, output, call.args, call.kwargs)
        except WithoutExamples as reason:
            self._common[id(output)] = Common(output, rule, call, found, str(reason))
            return
        except UnsupportedModel as error:
            self.refused |= dict.fromkeys(found, str(error))
            return
        if self._whole_call(func, output, call, forms):
            self._recorded(forms, output, [value for value in call.given if self.name(value) is None])

    def _forms(self, rule: Rule, output: Tensor, args: Any, kwargs: Any) -> tuple[Form, ...]:
        """What a rule gives; whatever it cannot take is no fault of the pass."""
        names: dict[str, str] = KEYWORDS.get(rule, {})
        named = {str(names.get(key, key)): value for key, value in kwargs.items()}
        try:
            return tuple(self._placed(form) for form in rule(self, output, *args, **named))
        except UnsupportedModel:
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            raise UnsupportedModel(f"its rule does not take this call ({said})") from error

    def _whole_call(self, func: Any, output: Tensor, call: Call, forms: tuple[Form, ...]) -> bool:
        """Whether each place in which a parameter enters has a form; if not, all parameters in the call are refused."""
        entering = Counter(self._whole(name) for value in call.given if (name := self.name(value)) is not None)
        if entering == Counter(form.name for form in forms):
            return True
        self._without_rule(func, output, set(entering))
        return False

    def _with_common(self, func: Any, output: Any, call: Call, found: set[str]) -> None:
        """Record a call of which an input is the same for all examples, where it is added to one that is not."""
        common = [self._common[id(value)] for value in call.given if id(value) in self._common]
        first, other = common[0], {name for it in common[1:] for name in it.names}
        if isinstance(output, Tensor) and len(common) == 1 and not found:
            if func in ADDS and call.plain and tuple(output.shape) == (self.num_examples, *first.without_ones):
                args, kwargs = self._repeated(first.call.args), self._repeated(first.call.kwargs)
                try:
                    forms = self._forms(first.rule, output, args, kwargs)
                except UnsupportedModel as error:
                    self.refused |= dict.fromkeys(first.names, str(error))
                    return
                if not self._whole_call(func, output, first.call, forms):
                    return
                inputs = [value for value in (*first.call.given, *call.given) if self.name(value) is None]
                self._recorded(forms, output, [value for value in inputs if id(value) not in self._common])
                return
            kept = func is Tensor.to and output.shape == first.output.shape  # as GPT-2 does, to the device of the words
            if kept or (func in RESHAPES and _is_unsqueezed(output, first.output)):
                self._common[id(output)] = replace(first, output=output)
                return
        made = [value for value in tensors_in(output) if value.requires_grad]
        if made:
            self.refused |= dict.fromkeys((*first.names, *other), first.reason)
            self._without_rule(func, output, found)

    def _recorded(self, forms: tuple[Form, ...], output: Tensor, inputs: list[Tensor]) -> None:
        if forms and output.requires_grad:
            versions = tuple(value._version for value in inputs)
            edge, kind = get_gradient_edge(output), output.detach().new_empty(0)
            self.uses.append(Use(forms, edge, tuple(output.shape), kind, tuple(inputs), versions))

    def _without_rule(self, func: Any, output: Any, found: set[str]) -> None:
        """Refuse parameters that enter a call in a way that has no rule, if what comes out depends on them."""
        if found and any(made.requires_grad and self.name(made) is None for made in tensors_in(output)):
            called = getattr(func, "__name__", str(func))
            self.refused |= dict.fromkeys(found, f"it is used in {called}, which has no rule for it")

    def _repeated(self, value: Any) -> Any:
        """Tensors of a call without examples as they would be with them."""
        if isinstance(value, tuple | list):
            return tuple(self._repeated(part) for part in value)  # type: ignore[arg-type]
        if isinstance(value, dict):
            return {key: self._repeated(part) for key, part in value.items()}  # type: ignore[arg-type]
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return value
        if value.ndim > 0 and value.shape[0] == 1:
            return value.expand(self.num_examples, *value.shape[1:])
        return value.expand(self.num_examples, *value.shape)


def _is_unsqueezed(view: Tensor, tensor: Tensor) -> bool:
    """Whether it has the same entries in the same order, after a dimension of size 1; indices may permute them."""
    if tuple(view.shape) != (1, *tensor.shape) or view.data_ptr() != tensor.data_ptr():
        return False
    return all(a == b for a, b, n in zip(view.stride()[1:], tensor.stride(), tensor.shape, strict=True) if n > 1)
