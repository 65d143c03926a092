"""Parameter spaces: order, names, ties, patterns, and each refusal by its text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal
from torch import nn

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.parameters import Entry, ParameterSpace


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_order_names_offsets():
    """Closed form."""
    space = ParameterSpace.of(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    assert space.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert [entry.offset for entry in space.entries] == [0, 6, 9, 12]
    assert [entry.numel for entry in space.entries] == [6, 3, 3, 1]
    assert space.n == 13


def test_a_tied_parameter_counts_once_under_its_first_name():
    """Closed form: 15 + 12 coordinates, not 15 + 12 + 15."""
    space = ParameterSpace.of(Tied())
    assert space.n == 27
    assert space.names == ("embedding.weight", "middle.weight", "middle.bias")
    assert space.tied == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("pattern", ["head.*", "embedding.*", ["head.weight", "embedding.weight"]])
def test_a_tied_parameter_is_found_by_any_of_its_names(pattern: object):
    space = ParameterSpace.of(Tied(), pattern)  # type: ignore[arg-type]
    assert space.names == ("embedding.weight",)
    assert space.excluded == ("middle.weight", "middle.bias")


def test_frozen_parameters_are_left_out_and_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    space = ParameterSpace.of(model)
    assert space.frozen == ("0.weight",)
    assert space.names == ("0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("*.weight", ("0.weight", "2.weight")),
        (["2.*"], ("2.weight", "2.bias")),
        (("0.bias", "2.b*"), ("0.bias", "2.bias")),
        ("[02].bias", ("0.bias", "2.bias")),
        ("*", ("0.weight", "0.bias", "2.weight", "2.bias")),
    ],
)
def test_patterns(patterns: object, names: tuple[str, ...]):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    space = ParameterSpace.of(model, patterns)  # type: ignore[arg-type]
    assert space.names == names
    assert set(space.names) | set(space.excluded) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_pattern_is_case_sensitive():
    with pytest.raises(InvalidArgument, match="the pattern 'Weight' matches no trainable parameter"):
        ParameterSpace.of(nn.Linear(1, 1), "Weight")


def test_tensors_are_the_parameters_themselves():
    model = Tied()
    found = ParameterSpace.of(model).tensors(model)
    assert [id(tensor) for tensor in found] == [id(p) for p in model.parameters()]


def test_odd_shapes():
    """Closed form: scalars, an empty parameter and a non-contiguous one."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.none = nn.Parameter(torch.zeros(0, 3))
    model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    space = ParameterSpace.of(model)
    assert [entry.shape for entry in space.entries] == [(), (0, 3), (3, 2)]
    assert space.n == 7
    flat = space.flatten(dict(model.named_parameters()))
    assert flat.tolist() == [2.0, 0.0, 3.0, 1.0, 4.0, 2.0, 5.0]  # row-major in the shape of the parameter
    assert torch.equal(space.unflatten(flat)["turned"], model.turned)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), st.integers(0, 2**32))
def test_flatten_and_unflatten_are_inverse(shapes: list[list[int]], seed: int):
    """Law, over random shapes."""
    entries, offset = [], 0
    for index, shape in enumerate(shapes):
        entries.append(Entry(f"p{index}", tuple(shape), offset))
        offset += entries[-1].numel
    space = ParameterSpace(tuple(entries))
    assert space.n == offset
    flat = normal(space.n, seed=seed)
    named = space.unflatten(flat)
    assert {name: list(tensor.shape) for name, tensor in named.items()} == {
        f"p{index}": shape for index, shape in enumerate(shapes)
    }
    assert torch.equal(space.flatten(named), flat)


def test_flatten_copies_and_unflatten_does_not():
    space = ParameterSpace.of(nn.Linear(2, 1))
    flat = torch.zeros(3)
    space.unflatten(flat)["bias"].fill_(7.0)
    assert flat.tolist() == [0.0, 0.0, 7.0]
    named = space.unflatten(flat)
    space.flatten(named).fill_(1.0)
    assert flat.tolist() == [0.0, 0.0, 7.0]


def test_flatten_takes_any_order_of_names():
    space = ParameterSpace.of(nn.Linear(2, 1))
    assert space.flatten({"bias": torch.ones(1), "weight": torch.zeros(1, 2)}).tolist() == [0.0, 0.0, 1.0]


def test_flatten_refuses_other_names():
    space = ParameterSpace.of(nn.Linear(2, 1))
    with pytest.raises(InvalidArgument, match=r"flatten: missing \['bias'\], unexpected \['b'\]"):
        space.flatten({"weight": torch.ones(1, 2), "b": torch.ones(1)})


def test_flatten_refuses_other_shapes():
    space = ParameterSpace.of(nn.Linear(2, 1))
    with pytest.raises(InvalidArgument, match=r"'weight' has shape \(2, 1\), its parameter \(1, 2\)"):
        space.flatten({"weight": torch.ones(2, 1), "bias": torch.ones(1)})


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_unflatten_refuses_other_lengths(shape: tuple[int, ...]):
    space = ParameterSpace.of(nn.Linear(2, 1))
    with pytest.raises(InvalidArgument, match=r"was given, this space has n = 3. Pass a tensor of shape \[3\]"):
        space.unflatten(torch.zeros(shape))


def test_another_model_is_refused():
    space = ParameterSpace.of(nn.Linear(2, 1))
    with pytest.raises(InvalidArgument, match=r"'weight' of shape \(1, 2\) was expected, the model has \(1, 3\)"):
        space.tensors(nn.Linear(3, 1))
    with pytest.raises(InvalidArgument, match="'bias' of shape .* the model has no such parameter"):
        space.tensors(nn.Linear(2, 1, bias=False))


def test_an_all_frozen_model_is_refused():
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(
        InvalidArgument, match="no trainable parameter: all 2 of its parameters are frozen.*requires_grad_"
    ):
        ParameterSpace.of(model)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(InvalidArgument, match="it has no floating-point parameters"):
        ParameterSpace.of(nn.Tanh())


def test_a_model_with_empty_parameters_only_is_refused():
    model = nn.Module()
    model.none = nn.Parameter(torch.zeros(0))
    with pytest.raises(InvalidArgument, match="no trainable parameter"):
        ParameterSpace.of(model)


def test_a_pattern_without_a_match_shows_what_there_is():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(
        InvalidArgument, match=r"'conv\*' matches no trainable parameter. The model has: 0.weight, .* \.\.\."
    ):
        ParameterSpace.of(model, ["0.*", "conv*"])


def test_a_complex_parameter_is_refused():
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModel, match="'phase' has dtype torch.complex64.*requires_grad_\\(False\\)"):
        ParameterSpace.of(model)


def test_a_sparse_parameter_is_refused():
    model = nn.Module()
    model.table = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(UnsupportedModel, match="'table' has layout torch.sparse_coo.*to_dense"):
        ParameterSpace.of(model)


def test_a_lazy_parameter_is_refused():
    with pytest.raises(UnsupportedModel, match=r"'weight' has no shape yet \(a lazy module\). Run the model once"):
        ParameterSpace.of(nn.LazyLinear(2))


def test_a_frozen_parameter_of_another_kind_does_no_harm():
    model = nn.Linear(2, 1)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)
    model.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    space = ParameterSpace.of(model)
    assert space.n == 3
    assert set(space.frozen) == {"phase", "count"}


def test_an_empty_list_of_patterns_and_a_model_without_parameters_are_told_apart():
    with pytest.raises(InvalidArgument, match="the list of patterns is empty, so that no parameter is chosen"):
        ParameterSpace.of(nn.Linear(2, 1), [])
    with pytest.raises(InvalidArgument, match="it has no floating-point parameters. Pass a model that has some"):
        ParameterSpace.of(nn.ReLU(), None)
