"""The reference models: shapes, laws, counts, a second implementation, and every refusal by its text."""

from __future__ import annotations

import itertools
import math
import pydoc_data
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvkit import models
from curvkit.errors import InvalidArgument, MissingExtra
from curvkit.models import (
    BUILDERS,
    MLP,
    CharacterVocabulary,
    Decoder,
    ResNet,
    build,
    random_windows,
    spaced_windows,
    topics_text,
)
from curvkit.models.layers import RMSNorm, rotary_tables, rotate
from curvkit.models.resnet import ResidualBlock

V, W, L, H, T = 11, 16, 2, 4, 12  # vocabulary, width, depth, heads, context of the small decoder
KWARGS: dict[str, dict[str, object]] = {
    "mlp": {"sizes": [6, 5, 3], "activation": "tanh"},
    "resnet": {"depth": 8, "width": 4},
    "decoder": {"vocabulary": V, "width": W, "depth": L, "heads": H, "context": T},
    "nanogpt": {"vocab_size": V, "n_embd": W, "n_layer": L, "n_head": H, "block_size": T},
}


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small_decoder(**changes: object) -> Decoder:
    return Decoder(**{**KWARGS["decoder"], **changes})


def spread(model: nn.Module) -> nn.Module:
    """Move every parameter away from its initial value: norms are not ones, and logits are of order 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inputs_for(name: str, count: int = 3) -> Tensor:
    return {
        "mlp": lambda: torch.randn(count, 2, 3),
        "resnet": lambda: torch.randn(count, 3, 8, 8),
        "decoder": lambda: torch.randint(V, (count, 7)),
        "nanogpt": lambda: torch.randint(V, (count, 7)),
    }[name]()


def count_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Shapes and counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (3, 3)), ("resnet", (3, 10)), ("decoder", (3, 7, V)), ("nanogpt", (3, 7, V))]
)
def test_shapes(name, shape):
    model = build(name, KWARGS[name])
    assert isinstance(model, BUILDERS[name])
    assert model.training
    assert model(inputs_for(name)).shape == shape


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_mlp_is_affine_maps_and_activations(activation):
    """Rung: closed form, written out."""
    model = MLP([6, 5, 3], activation=activation).to(torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    phi = {
        "relu": lambda a: a.clamp(min=0),
        "tanh": torch.tanh,
        "gelu": lambda a: a * (1 + torch.erf(a / 2**0.5)) / 2,
    }
    z = x.reshape(4, 6) @ model.linear0.weight.T + model.linear0.bias
    expected = phi[activation](z) @ model.linear1.weight.T + model.linear1.bias
    # Two ways to order some ten float64 operations on numbers of order 1: a few times 1e-16.
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)


def test_mlp_takes_an_empty_batch():
    assert MLP([6, 3])(torch.zeros(0, 2, 3)).shape == (0, 3)


@pytest.mark.parametrize("sizes", [[4, 2], (7, 5, 3, 1)])
def test_mlp_parameter_count(sizes):
    assert count_of(MLP(sizes)) == sum((a + 1) * b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(("m", "w", "classes", "c"), [(1, 4, 10, 3), (3, 16, 10, 3), (2, 5, 7, 1)])
def test_resnet_parameter_count(m, w, classes, c):
    stem = 9 * c * w + 2 * w
    first = m * (18 * w**2 + 4 * w)
    second = 18 * w**2 + (2 * m - 1) * 36 * w**2 + 8 * m * w
    third = 72 * w**2 + (2 * m - 1) * 144 * w**2 + 16 * m * w
    head = (4 * w + 1) * classes
    model = ResNet(depth=6 * m + 2, width=w, num_classes=classes, in_channels=c)
    assert count_of(model) == stem + first + second + third + head


def test_resnet20_has_option_a():
    """Two 1x1 projections with their norms would add 512 + 64 + 2048 + 128: the 272,474 that others have."""
    model = ResNet()
    assert count_of(model) == 269_722 == 272_474 - (512 + 64 + 2048 + 128)
    # He et al. count the layers with weights.
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model.modules()) == 20


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("width", "hidden", "f"), [(16, None, 48), (24, None, 64), (16, 20, 20)])
def test_decoder_parameter_count(tied, width, hidden, f):
    model = small_decoder(width=width, hidden=hidden, tied=tied)
    assert count_of(model) == (1 if tied else 2) * V * width + L * (4 * width**2 + 3 * width * f + 2 * width) + width


# ResNet -----------------------------------------------------------------------------------------------------


def test_residual_block_is_its_shortcut_where_the_branch_is_zero():
    """Rung: closed form. Odd sizes and an odd number of new channels included."""
    block = ResidualBlock(2, 5, stride=2)
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(3, 2, 7, 5) + 1
    y = block(x)
    assert y.shape == (3, 5, 4, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_resnet_convolutions_start_with_he_variance():
    weight = ResNet(width=32).layer3[1].conv2.weight  # 128 x 128 x 3 x 3
    # The variance of n normal numbers has relative standard error sqrt(2 / n); five of them.
    assert weight.var().item() == pytest.approx(2 / (9 * 128), rel=5 * math.sqrt(2 / weight.numel()))


# Decoder ----------------------------------------------------------------------------------------------------


def reference_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """Compute one sequence as the papers write it: complex rotations, attention position by position."""

    def norm(x: Tensor, g: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * g

    width = model.embedding.embedding_dim
    head_width = width // model.heads
    theta = torch.tensor([10_000.0 ** (-2 * i / head_width) for i in range(head_width // 2)], dtype=torch.float64)
    x = model.embedding.weight[tokens]  # [T, w]
    turns = torch.exp(1j * torch.arange(len(tokens))[:, None] * theta)  # [T, D/2]
    for block in model.blocks:
        z = norm(x, block.attention_norm.weight)
        heads = []
        for rows in torch.arange(width).chunk(model.heads):
            q, k, v = (z @ getattr(block.attention, part).weight[rows].T for part in ("query", "key", "value"))
            q, k = (torch.complex(*part.chunk(2, -1)) * turns for part in (q, k))
            mixed = []
            for t in range(len(tokens)):
                scores = (q[t] * k[: t + 1].conj()).real.sum(-1) / math.sqrt(head_width)
                mixed.append((scores.exp() / scores.exp().sum()) @ v[: t + 1])
            heads.append(torch.stack(mixed))
        x = x + torch.cat(heads, -1) @ block.attention.output.weight.T
        z = norm(x, block.feed_forward_norm.weight)
        gate, up = z @ block.feed_forward.gate.weight.T, z @ block.feed_forward.up.weight.T
        x = x + (gate * torch.sigmoid(gate) * up) @ block.feed_forward.down.weight.T
    return norm(x, model.norm.weight) @ model.head.weight.T


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
def test_decoder_equals_a_second_implementation(backend):
    """Rung: closed form, on numbers of order 1, by the default dispatch and by the mathematical one."""
    model = spread(small_decoder(tied=False).to(torch.float64))
    model.restore_derived()
    tokens = torch.randint(V, (2, T))
    if backend is None:
        logits = model(tokens)
    else:
        with sdpa_kernel(backend):
            logits = model(tokens)
    expected = torch.stack([reference_logits(model, row) for row in tokens])
    assert expected.abs().max() > 0.5  # not a comparison of zeros
    # Some 1e3 roundings of 1e-16 on numbers below 100.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def test_decoder_is_causal():
    model = spread(small_decoder().to(torch.float64))
    tokens = torch.randint(V, (1, T))
    before = model(tokens)
    for t in range(T):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        difference = (model(changed) - before).abs().amax(-1)[0]
        # Later positions have weight exactly zero; at most the order of a sum could change, by some 1e-15.
        assert (difference[:t] < 1e-12).all()
        assert (difference[t:] > 1e-6).all()


@pytest.mark.parametrize("head_width", [2, 4, 16])
def test_rotary_scores_depend_on_relative_positions_alone(head_width):
    """Rung: law. One query and one key at all positions have Toeplitz scores, and no length changes."""
    cos, sin = rotary_tables(40, head_width)
    q, k = torch.randn(2, 1, head_width, dtype=torch.float64).expand(2, 40, head_width)
    rotated_q, rotated_k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = rotated_q @ rotated_k.T  # [40, 40]
    # Angles up to 40 are exact to 40 * 1.1e-16, and the 16 products of a score are of order 1: below 1e-12.
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-14, atol=0)
    assert torch.equal(rotated_q[0], q[0])
    assert scores[0].std() > 0.1  # and they do depend on positions


def test_tied_head_is_one_parameter_through_conversions():
    model = small_decoder()
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    model.to(torch.float64)
    assert model.head.weight is model.embedding.weight
    untied = small_decoder(tied=False)
    assert untied.head.weight is not untied.embedding.weight


def test_decoder_follows_to_float64():
    model = spread(small_decoder())
    tokens = torch.randint(V, (2, T))
    single = model(tokens)
    model.to(torch.float64)
    assert model.cos.dtype == model.sin.dtype == torch.float64
    double = model(tokens)
    assert double.dtype == torch.float64
    # The same function with the same numbers: some 1e3 roundings of 6e-8, that is 6e-5, on numbers below 10.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=6e-4)


def test_rms_norm_stays_in_the_dtype_of_its_input():
    norm = RMSNorm(5).to(torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    # One division and one root away from the definition: a few roundings of 1.1e-16.
    torch.testing.assert_close(
        norm(x).square().mean(-1), x.square().mean(-1) / (x.square().mean(-1) + 1e-6), atol=0, rtol=1e-14
    )


def test_decoder_tables_are_not_in_the_state_dict():
    assert not {"cos", "sin"} & set(small_decoder().state_dict())


def test_decoder_initialisation():
    """Rung: statistics. The deviation of n normal numbers has relative stderr sqrt(1 / 2n); five of them."""
    model = Decoder(vocabulary=64, width=64, depth=3, heads=4, context=8)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        expected = 0.02 / math.sqrt(6) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=5 * math.sqrt(0.5 / parameter.numel())), name


# Second derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "decoder"])
def test_second_derivatives_equal_differences_of_gradients(name):
    """Rung: differences of gradients, which share no second derivative.

    H v against (g(theta + h v) - g(theta - h v)) / 2h.
    """
    model = spread(build(name, KWARGS[name]).to(torch.float64))
    parameters = list(model.parameters())
    inputs = inputs_for(name)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    outputs = V if name == "decoder" else 3
    targets = torch.randint(outputs, (21 if name == "decoder" else 3,))
    v = [torch.randn_like(p) for p in parameters]

    def gradient(create_graph: bool = False) -> Tensor:
        loss = F.cross_entropy(model(inputs).reshape(-1, outputs), targets)
        parts = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return torch.cat([part.flatten() for part in parts])

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, direction in zip(parameters, v, strict=True):
                p.add_(step * direction)
        g = gradient()
        with torch.no_grad():
            for p, direction in zip(parameters, v, strict=True):
                p.sub_(step * direction)
        return g

    with sdpa_kernel(SDPBackend.MATH):
        flat_v = torch.cat([direction.flatten() for direction in v])
        product = torch.autograd.grad(gradient(create_graph=True) @ flat_v, parameters)
        h = 1e-4
        fine, coarse = ((moved(step) - moved(-step)) / (2 * step) for step in (h, 2 * h))
        g_norm = gradient().norm()
    hv = torch.cat([part.flatten() for part in product])
    # The error of the fine difference is c h^2, a third of its distance to the coarse one, which is therefore
    # a bound; rounding adds some 1e3 * 1.1e-16 * |g| / h.
    bound = (coarse - fine).norm() + 1e-13 * g_norm / h
    assert bound < 1e-3 * hv.norm()  # the comparison has power
    assert (hv - fine).norm() < bound


def test_resnet_can_be_differentiated_twice():
    """Rung: law. u'Hv = v'Hu, with batch statistics in the graph."""
    model = build("resnet", KWARGS["resnet"]).to(torch.float64)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs_for("resnet").double()), torch.tensor([0, 1, 2]))
    g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, create_graph=True)])
    u, v = torch.randn(2, len(g), dtype=torch.float64)
    hu, hv = (
        torch.cat([part.flatten() for part in torch.autograd.grad(g @ x, parameters, retain_graph=True)])
        for x in (u, v)
    )
    # Both sides are sums of n products; rounding is below n * 1.1e-16 of the product of the norms.
    assert abs((u @ hv - v @ hu).item()) < len(g) * 1.1e-16 * (u.norm() * hv.norm() + v.norm() * hu.norm()).item()
    assert hv.norm() > 1e-3


# Meta device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_builds_and_runs_on_the_meta_device(name):
    with torch.device("meta"):
        model = build(name, KWARGS[name])
    assert all(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))
    assert model(inputs_for(name).to("meta")).is_meta


@pytest.mark.parametrize("assign", [True, False])
def test_decoder_from_meta_equals_its_source(assign):
    source = spread(small_decoder())
    with torch.device("meta"):
        model = small_decoder()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    model.restore_derived()
    tokens = torch.randint(V, (2, T))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), source(tokens))


# Characters and windows -------------------------------------------------------------------------------------


def test_topics_text_is_text_that_prints_and_survives_the_round_trip():
    text = topics_text()
    assert text == topics_text()
    assert len(text) > 400_000
    assert "statement" in text
    vocabulary = CharacterVocabulary.from_text(text)
    assert list(vocabulary.characters) == sorted(set(text))
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert tokens.max() == len(vocabulary) - 1
    assert vocabulary.decode(tokens) == text


def test_vocabulary_is_frozen_and_compares_by_its_alphabet():
    vocabulary = CharacterVocabulary("abc\n\t")
    assert vocabulary == CharacterVocabulary("abc\n\t")
    with pytest.raises(AttributeError):
        vocabulary.characters = "xyz"  # type: ignore[misc]


def test_vocabulary_encodes_nothing_to_nothing():
    vocabulary = CharacterVocabulary("a")
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode(vocabulary.encode("")) == ""


@pytest.mark.parametrize("table", [None, {}, ["a list"]])
def test_topics_text_says_what_a_reduced_python_lacks(monkeypatch, table):
    if table is None:
        monkeypatch.delattr(pydoc_data, "topics", raising=False)
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    else:
        monkeypatch.setattr(pydoc_data, "topics", types.SimpleNamespace(topics=table), raising=False)
    with pytest.raises(MissingExtra, match=r"no table of topics .*standard library. Install .*from_text"):
        topics_text()


@pytest.mark.parametrize(("n", "length", "count"), [(100, 7, 5), (36, 7, 5), (9, 8, 1), (50, 1, 49)])
def test_spaced_windows_do_not_overlap_and_are_evenly_spaced(n, length, count):
    x, y = spaced_windows(torch.arange(n), length, count)
    assert x.shape == y.shape == (count, length)
    assert torch.equal(y, x + 1)  # the tokens number their own positions
    assert torch.equal(x, x[:, :1] + torch.arange(length))
    assert x.unique().numel() == y.unique().numel() == count * length
    assert x[:, 0].tolist() == list(range(0, count * (n // count), n // count))


def test_spaced_windows_need_exactly_one_token_more_than_they_hold():
    assert spaced_windows(torch.arange(36), 7, 5)[1].max() == 35
    with pytest.raises(InvalidArgument, match=re.escape("tokens of shape (35,) must be [n] with n >= 36")):
        spaced_windows(torch.arange(35), 7, 5)


def test_random_windows_come_from_their_generator_alone():
    tokens = torch.arange(6)
    state = torch.get_rng_state()
    x, y = random_windows(tokens, 4, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(4))
    assert x[:, 0].unique().tolist() == [0, 1]  # both possible places; one is missed by chance 2^-63
    again, _ = random_windows(tokens, 4, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, again)


# Names and refusals -----------------------------------------------------------------------------------------


def test_public_names():
    assert set(BUILDERS) == {"mlp", "resnet", "decoder", "nanogpt"}
    assert all(hasattr(models, name) for name in models.__all__)
    with pytest.raises(TypeError):
        BUILDERS["mlp"] = nn.Linear  # type: ignore[index]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


REFUSALS = {
    "unknown builder, near": (
        lambda: build("ResNett", {}),
        r"no model is called 'ResNett'. The names are 'decoder', 'mlp', 'nanogpt', 'resnet'. "
        r"The nearest is 'resnet'. For a model of your own",
    ),
    "unknown builder, far": (
        lambda: build("transformer", {}),
        r"called 'transformer'. The names are 'decoder', 'mlp', 'nanogpt', 'resnet'. For a",
    ),
    "builder is no string": (lambda: build(["mlp"], {}), r"no model is called \['mlp'\]. The names are"),
    "kwargs is no mapping": (
        lambda: build("mlp", [4, 2]),
        r"kwargs=\[4, 2\] must be a mapping .* Write an empty one",
    ),
    "unknown keyword": (
        lambda: build("resnet", {"widht": 4}),
        r"'resnet' has no keyword argument 'widht'. It takes 'depth', 'in_channels', 'num_classes', 'width'. "
        r"The nearest is 'width'. Remove or rename",
    ),
    "missing keyword": (
        lambda: build("decoder", {"width": 8, "heads": 2, "context": 4}),
        r"'decoder' was given 'context', 'heads', 'width' and lacks 'depth', 'vocabulary'. "
        r"It takes .*'tied'.* Add what",
    ),
    "missing all": (lambda: build("mlp", {}), r"'mlp' was given nothing and lacks 'sizes'. It takes"),
    "value, through build": (lambda: build("resnet", {"depth": 21}), r"depth=21 must be 6m \+ 2"),
    "mlp one size": (
        lambda: MLP([4]),
        r"sizes=\[4\] must be a sequence of at least two integers. .*pass for example",
    ),
    "mlp sizes text": (lambda: MLP("4,2"), r"sizes='4,2' must be a sequence"),
    "mlp sizes number": (lambda: MLP(4), r"sizes=4 must be a sequence"),
    "mlp zero size": (
        lambda: MLP([4, 0, 2]),
        r"sizes\[1\]=0 must be an integer >= 1. It is .* pass for example 32",
    ),
    "mlp bool size": (lambda: MLP([4, True]), r"sizes\[1\]=True must be an integer >= 1"),
    "mlp float size": (lambda: MLP([4.0, 2]), r"sizes\[0\]=4.0 must be an integer >= 1"),
    "mlp activation": (
        lambda: MLP([4, 2], activation="sigmoid"),
        r"activation='sigmoid' must be one of 'relu', 'tanh', 'gelu'. For another one build",
    ),
    "mlp activation list": (
        lambda: MLP([4, 2], activation=["relu"]),
        r"activation=\['relu'\] must be one of",
    ),
    "mlp inputs": (
        lambda: MLP([4, 2])(torch.zeros(3, 5)),
        r"inputs of shape \(3, 5\) must be \[N, ...\] with 4 numbers per example. Reshape",
    ),
    "mlp no batch": (lambda: MLP([4, 2])(torch.zeros(4)), r"inputs of shape \(4,\) must be \[N, ...\]"),
    "resnet depth 2": (
        lambda: ResNet(depth=2),
        r"depth=2 must be 6m \+ 2 with m >= 1: .* Pass for example 8 or 14",
    ),
    "resnet depth 18": (lambda: ResNet(depth=18), r"depth=18 must be 6m \+ 2 .* Pass for example 14 or 20"),
    "resnet depth text": (lambda: ResNet(depth="20"), r"depth='20' must be an integer >= 1"),
    "resnet width": (lambda: ResNet(width=0), r"width=0 must be an integer >= 1"),
    "resnet classes": (lambda: ResNet(num_classes=0), r"num_classes=0 must be an integer >= 1"),
    "resnet channels": (lambda: ResNet(in_channels=-1), r"in_channels=-1 must be an integer >= 1"),
    "resnet images": (
        lambda: ResNet(depth=8, width=2)(torch.zeros(2, 8, 8, 3)),
        r"images of shape \(2, 8, 8, 3\) must be \[N, 3, H, W\]. Permute",
    ),
    "decoder vocabulary": (lambda: small_decoder(vocabulary=0), r"vocabulary=0 must be an integer >= 1"),
    "decoder width": (lambda: small_decoder(width=0), r"width=0 must be an integer >= 1"),
    "decoder depth": (lambda: small_decoder(depth=0), r"depth=0 must be an integer >= 1"),
    "decoder no heads": (lambda: small_decoder(heads=0), r"heads=0 must be an integer >= 1"),
    "decoder context": (lambda: small_decoder(context=None), r"context=None must be an integer >= 1"),
    "decoder hidden": (
        lambda: small_decoder(hidden=0),
        r"hidden=0 must be an integer >= 1. .* pass for example 48",
    ),
    "decoder heads do not divide": (
        lambda: small_decoder(heads=3),
        r"heads=3 must divide width=16 into parts of even length. Pass one of \[1, 2, 4, 8\]",
    ),
    "decoder odd heads": (
        lambda: small_decoder(heads=16),
        r"heads=16 must divide width=16 into parts of even length",
    ),
    "decoder odd width": (
        lambda: small_decoder(width=15, heads=3),
        r"width=15 .* Pass an even width, for example 16",
    ),
    "decoder tied": (lambda: small_decoder(tied="no"), r"tied='no' must be True or False. .* pass a bool"),
    "decoder tokens shape": (
        lambda: small_decoder()(torch.zeros(4, dtype=torch.int64)),
        r"tokens of shape \(4,\) and dtype torch.int64 must be \[N, T\] int64. Pass for example",
    ),
    "decoder tokens dtype": (
        lambda: small_decoder()(torch.zeros(1, 4)),
        r"dtype torch.float32 must be \[N, T\] int64",
    ),
    "decoder tokens long": (
        lambda: small_decoder()(torch.zeros(1, 13, dtype=torch.int64)),
        r"13 tokens in one sequence are more than context=12. Cut",
    ),
    "alphabet empty": (
        lambda: CharacterVocabulary.from_text(""),
        r"characters='' must hold at least one .* call",
    ),
    "alphabet repeats": (
        lambda: CharacterVocabulary("aba"),
        r"characters='aba' must hold .* each once. For the",
    ),
    "alphabet unprintable": (
        lambda: CharacterVocabulary.from_text("a\x00\r"),
        r"\['\\x00', '\\r'\] do not print. Characters that print, .* allowed. Remove",
    ),
    "unknown character": (
        lambda: CharacterVocabulary("abc").encode("abcxay"),
        r"\['x', 'y'\] are not among the 3 known characters; the first is at position 3. Build",
    ),
    "unknown token": (
        lambda: CharacterVocabulary("abc").decode(torch.tensor([0, 3])),
        r"token 3 lies outside \[0, 3\). Tokens number .* Decode with",
    ),
    "negative token": (lambda: CharacterVocabulary("abc").decode([-1]), r"token -1 lies outside \[0, 3\)"),
    "random windows short": (
        lambda: random_windows(torch.arange(4), 4, 2, generator=generator()),
        r"random_windows: tokens of shape \(4,\) must be \[n\] with n >= 5: one window at least, .* Pass",
    ),
    "random windows shape": (
        lambda: random_windows(torch.zeros(9, 9), 4, 2, generator=generator()),
        r"random_windows: tokens of shape \(9, 9\) must be \[n\]",
    ),
    "random windows length": (
        lambda: random_windows(torch.arange(4), 0, 2, generator=generator()),
        r"random_windows: length=0 must be an integer >= 1",
    ),
    "spaced windows short": (
        lambda: spaced_windows(torch.arange(8), 4, 2),
        r"spaced_windows: tokens of shape \(8,\) must be \[n\] with n >= 9: 2 windows without .* Pass",
    ),
    "spaced windows count": (
        lambda: spaced_windows(torch.arange(8), 4, 1.5),
        r"spaced_windows: count=1.5 must be an",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_refusals_say_what_was_found_and_what_to_do(case):
    action, text = REFUSALS[case]
    with pytest.raises(InvalidArgument, match=text):
        action()
