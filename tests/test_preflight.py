"""The preflight: every right model passes, every silently wrong derivative is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import normal, seeded
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch_modules import LAYERS, NO_SECOND_DERIVATIVE, Around, all_layers, batch

from curvkit.errors import UnsupportedModel
from curvkit.losses import BatchLoss
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.models import Decoder, ResNet
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian
from curvkit.operators.preflight import Preflight, preflight, refuse_wrong

# Right modules were seen to agree to 1e-5 at a step of 1e-3 or 1e-4, wrong ones to be off by at least 1e-2 at every step.


def objective(model: nn.Module) -> Objective:
    return Objective(model.eval(), F.cross_entropy, [batch()])


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with seeded():
        return build()


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_torch_passes(name: str):
    """Differences of gradients in float64, which share no second derivative with the products."""
    found = preflight(objective(made(LAYERS[name])))
    assert found.verdict == "right", str(found)
    assert found.dtype == "float64"
    assert found.asymmetry <= 1e-14
    assert not found.suspects


def test_no_layer_of_torch_is_left_out():
    """A new torch with a new layer fails here."""
    assert all_layers() - {*LAYERS} - {*NO_SECOND_DERIVATIVE} == set()


@pytest.mark.parametrize("name", NO_SECOND_DERIVATIVE)
def test_layers_without_a_second_derivative_are_refused(name: str):
    with pytest.raises(UnsupportedModel, match="has no second derivative|cannot be differentiated twice"):
        preflight(objective(made(NO_SECOND_DERIVATIVE[name])))


# ---- silently wrong -------------------------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """Right: its backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class OnceSine(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class DetachedSine(Sine):
    """Symmetric, so that no test of symmetry can see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.cosine


class Applying(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)  # type: ignore[no-any-return]


def test_a_differentiable_function_passes():
    assert preflight(objective(made(lambda: Around(Applying(Sine), 6)))).verdict == "right"


@pytest.mark.parametrize(
    ("function", "evidence", "construct"),
    [
        (OnceSine, "they are not symmetric", "once_differentiable function"),
        (DetachedSine, "differences of gradients are off by", "function that saves detached tensors"),
    ],
)
def test_wrong_functions_are_caught_and_named(function: Any, evidence: str, construct: str):
    """Closed form of their error: the terms with sin'' = -sin are missing."""
    model = made(lambda: Around(Applying(function), 6))
    found = preflight(objective(model))
    assert found.verdict == "wrong"
    assert found.mismatch > 1e-2
    text = f"{evidence} .*module 'module' \\(Applying\\), the function {function.__name__}: {construct}"
    with pytest.raises(UnsupportedModel, match=text):
        refuse_wrong(found)
    with pytest.raises(
        UnsupportedModel, match=rf"second derivatives are wrong.*{construct}.*Nothing was measured.*--no-preflight"
    ):
        sharpness(objective(model), seed=0)


def test_a_small_wrong_layer_in_a_large_network_is_caught():
    """One of eight layers, scaled down so that it makes little of the whole product: parameters are compared one by one."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(7)))
            self.small = nn.Sequential(nn.Linear(4, 3), Applying(DetachedSine), nn.Linear(3, 3))
            self.first = nn.Linear(4, 12)
            self.last = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.large(self.first(x))) + 1e-2 * self.small(x)

    assert preflight(objective(made(Small))).verdict == "wrong"


@pytest.mark.parametrize("style", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_norm_is_made_right(style: Callable[[nn.Module], nn.Module]):
    """Dense autograd of g v / ||v|| written out; torch's own second derivative of weight_norm is off by a fifth."""
    model = made(lambda: nn.Sequential(style(nn.Linear(4, 5)), nn.Tanh(), style(nn.Linear(5, 3)))).double()
    x, y = normal(6, 4), torch.arange(6) % 3
    it = Objective(model, F.cross_entropy, [(x, y)])
    assert preflight(it).verdict == "right"
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = dict(
            zip(
                names,
                (p.view(s) for p, s in zip(flat.split([s.numel() for s in sizes]), sizes, strict=True)),
                strict=True,
            )
        )
        h = x
        for layer in ("0", "2"):
            own = {name.rpartition(".")[2]: p for name, p in parts.items() if name.startswith(layer)}
            g = own.get("original0", own.get("weight_g"))
            v = own.get("original1", own.get("weight_v"))
            h = h @ (g * v / v.norm(dim=1, keepdim=True)).T + own["bias"]
            h = torch.tanh(h) if layer == "0" else h
        return F.cross_entropy(h, y)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    truth = torch.func.hessian(loss)(theta)
    H = Hessian(it)
    V = normal(H.n, 3)
    assert torch.allclose(H.matmat(V), truth @ V, atol=1e-12)
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()], create_graph=True)
    torchs = torch.autograd.grad(plain, [*model.parameters()], [p for p in it.parameters.split(V[:, 0])])
    error = torch.cat([p.flatten() for p in torchs]) - truth @ V[:, 0]
    assert error.norm() > 1e-2 * (truth @ V[:, 0]).norm(), "torch has become right: leave its own weight_norm alone"


def test_sparse_embeddings_are_made_dense_for_the_time_of_a_product():
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(x).sum(1)))

    model, x = made(Sparse).double(), torch.arange(12).reshape(4, 3) % 7
    it = Objective(model, F.cross_entropy, [(x, torch.arange(4) % 3)])
    assert preflight(it).verdict == "right"
    H = Hessian(it)
    sparse = H.matvec(torch.ones(H.n).double())
    assert model.embedding.sparse is True
    model.embedding.sparse = False
    assert torch.equal(Hessian(it).matvec(torch.ones(H.n).double()), sparse)


# ---- not checked, and few rows --------------------------------------------------------------------------------------


class CastDown(nn.Module):
    """A cast inside, as some libraries' RMSNorm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * 1.1).sin().to(x.dtype)


def test_a_cast_inside_is_not_checked_and_not_refused():
    model = made(lambda: Around(CastDown(), 6))
    found = preflight(objective(model))
    assert found.verdict == "not checked"
    assert "or a cast to lower precision inside the model" in str(found)
    refuse_wrong(found)
    result = sharpness(objective(model), seed=0, settings=SharpnessSettings(data_doubt=False))
    assert result.eigenpairs.all_converged
    assert sum("second derivatives not checked" in note for note in result.notes) == 1


def test_a_model_that_cannot_run_in_float64_is_checked_in_float32():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    found = preflight(objective(made(Single)))
    assert found.dtype == "float32"
    assert found.verdict in ("right", "not checked")


@pytest.mark.parametrize("seed", range(40))
def test_right_models_that_run_in_float32_alone_are_not_refused(seed: int):
    """Steps that move no weight, or drown in rounding, must not count as a plateau."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3) if seed % 2 else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    with seeded(seed):
        model = Single()
    assert preflight(objective(model)).verdict in ("right", "not checked")


@pytest.mark.parametrize("function", [OnceSine, DetachedSine])
def test_wrong_functions_are_caught_in_float32_too(function: Any):
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Around(Applying(function), 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    found = preflight(objective(made(Single)))
    assert (found.dtype, found.verdict) == ("float32", "wrong")


def test_a_loss_without_curvature_passes():
    """Closed form: linear in every parameter, H = 0 and every difference of gradients is 0 up to rounding."""
    model = made(lambda: nn.Linear(4, 1))
    it = Objective(model, BatchLoss(lambda m, b: (m(b).sum(), len(b))), [normal(6, 4).float()])
    assert preflight(it).verdict == "right"


@pytest.mark.parametrize("tied", [False, True])
def test_padding_rows_count_as_fixed(tied: bool):
    """Dense autograd of a function in which the padding row of the embedding is a constant; with it moving, differences would not agree."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, padding_idx=0)
            self.head = nn.Linear(3, 5, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(x).sum(1)))

    model = made(Padded).double()
    with torch.no_grad():
        model.embedding.weight.copy_(normal(5, 3))
    x, y = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 2, 1]]), torch.tensor([0, 4, 2])
    it = Objective(model, F.cross_entropy, [(x, y)])
    found = preflight(it)
    assert found.verdict == "right"
    assert found.fixed == (("embedding.weight", 0),)
    frozen = model.embedding.weight.detach().clone()

    def loss(flat: Tensor) -> Tensor:
        E = flat[:15].view(5, 3)
        head = E if tied else flat[15:].view(5, 3)
        rows = torch.where((torch.arange(5) == 0)[:, None], frozen, E)
        return F.cross_entropy(torch.tanh(rows[x].sum(1)) @ head.T, y)

    H = Hessian(it)
    truth = torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in it.tensors]))
    assert torch.allclose(H.matmat(torch.eye(H.n).double()), truth, atol=1e-13)
    note = sharpness(it, seed=0, settings=SharpnessSettings(data_doubt=False)).notes[-1]
    assert note == "padding rows count as fixed: embedding.weight[0]"


def test_a_model_that_needs_more_than_two_rows_is_run_on_all():
    class Picky(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if len(input) < 6:
                raise ValueError("six rows at least")
            return super().forward(input)

    assert preflight(objective(made(lambda: Picky(4, 3)))).verdict == "right"


def test_two_rows_without_a_term_are_not_enough():
    """The first rows' targets are ignored."""
    x, y = batch()
    y[:3] = -100
    assert preflight(Objective(made(lambda: Around(nn.ReLU(), 6)), F.cross_entropy, [(x, y)])).verdict == "right"


def test_nothing_is_disturbed():
    model = made(LAYERS["BatchNorm2d"]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    preflight(objective(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_preflight_nothing_is_checked():
    """The user's word is taken; the asymmetry that the search sees is still refused."""
    model = made(lambda: Around(Applying(DetachedSine), 6))
    result = sharpness(objective(model), seed=0, settings=SharpnessSettings(data_doubt=False, preflight=False))
    assert result.preflight is None
    assert result.eigenpairs.all_converged


def test_a_plateau_is_three_steps():
    """The rule itself: growth with smaller steps is no plateau, three equal mismatches are one."""
    from curvkit.operators.preflight import _plateau

    assert _plateau([3e-2, 2.9e-2, 3e-2, 5e-1], 1e-5)
    assert not _plateau([1e-3, 3e-3, 1e-2, 3e-2], 1e-5)
    assert not _plateau([3e-2, 3e-2, 9e-6], 1e-5)
    assert not _plateau([1e-6, 1e-6, 1e-6], 1e-5)


def test_the_summary_says_what_was_seen():
    right = Preflight("right", 0.0, 0.0, {1e-3: 2e-7}, "float64")
    assert str(right) == "second derivatives agree with differences of gradients to 2e-07 on a few rows"
    unsteady = Preflight("wrong", 0.5, 0.0, {1e-3: 0.5}, "float64")
    assert "two products with the same vector differ by 5e-01; no known construct was found" in str(unsteady)


def test_the_summary_as_plain_values():
    """Everything that the sentence rests on, and null for a reason that there is not."""
    found = preflight(Objective(made(lambda: Around(Applying(DetachedSine), 6)), F.cross_entropy, [few()])).to_dict()
    assert set(found) == {
        "verdict", "repeatability", "asymmetry", "mismatch", "dtype", "suspects", "disagreeing", "estimated", "reason", "fixed",
    }  # fmt: skip
    assert (found["verdict"], found["reason"], found["estimated"], found["fixed"]) == ("wrong", None, [], [])
    assert found["disagreeing"][0].startswith("first.")
    fixed = Preflight("right", 0.0, 0.0, {}, "float64", fixed=(("embedding.weight", 0),), reason="no copy").to_dict()
    assert (fixed["fixed"], fixed["reason"]) == (["embedding.weight[0]"], "no copy")


# ---- whole architectures --------------------------------------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        return self.out(torch.cat([skip, self.up(F.relu(self.middle(F.max_pool2d(skip, 2))))], 1))


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (weights[..., None] * outputs.gather(1, chosen[..., None].expand(-1, -1, 3))).sum(1)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 2, stride=2)
        self.tokens = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.channels = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2)
        h = (h + self.tokens(h)).transpose(1, 2)
        return self.head((h + self.channels(h)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = (
            nn.Embedding(9, 4),
            kind(4, 6, num_layers=2, batch_first=True),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(x))[0][:, -1])


TOKENS = torch.arange(24).reshape(4, 6) % 9
IMAGES = normal(4, 1, 4, 4, dtype=torch.float32)
CLASSES = torch.arange(4) % 3


def hugging_face(name: str) -> tuple[nn.Module, Any, Any]:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": 9, "max_position_embeddings": 16, **small}
    if name == "ViT":
        config = transformers.ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **small)
        return (
            transformers.ViTForImageClassification(config),
            (IMAGES, CLASSES),
            lambda m, b: F.cross_entropy(m(b[0]).logits, b[1]),
        )
    if name == "BERT":
        config = transformers.BertConfig(num_labels=3, **tokens)
        return (
            transformers.BertForSequenceClassification(config),
            (TOKENS, CLASSES),
            lambda m, b: F.cross_entropy(m(b[0]).logits, b[1]),
        )
    if name == "GPT-2":
        config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=12, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **tokens))
    return model, (TOKENS,), lambda m, b: F.cross_entropy(m(b[0]).logits[:, :-1].flatten(0, 1), b[0][:, 1:].flatten())


OWN: dict[str, Callable[[], Objective]] = {
    "ResNet-20": lambda: Objective(
        ResNet(), F.cross_entropy, [(normal(3, 3, 8, 8, dtype=torch.float32), torch.arange(3))]
    ),
    "decoder": lambda: Objective(
        Decoder(vocabulary=9, width=8, depth=2, heads=2, context=6),
        BatchLoss(lambda m, b: F.cross_entropy(m(b)[:, :-1].flatten(0, 1), b[:, 1:].flatten())),
        [TOKENS],
    ),
    "LSTM": lambda: Objective(Recurrent(nn.LSTM), F.cross_entropy, [(TOKENS, CLASSES)]),
    "GRU": lambda: Objective(Recurrent(nn.GRU), F.cross_entropy, [(TOKENS, CLASSES)]),
    "U-Net": lambda: Objective(UNet(), F.mse_loss, [(IMAGES, IMAGES)]),
    "mixture of experts": lambda: Objective(MixtureOfExperts(), F.cross_entropy, [(normal(4, 4).float(), CLASSES)]),
    "MLP-Mixer": lambda: Objective(Mixer(), F.cross_entropy, [(IMAGES, CLASSES)]),
}


@pytest.mark.parametrize("name", OWN)
def test_whole_architectures_pass(name: str):
    with seeded():
        it = OWN[name]()
    it.model.eval()
    assert preflight(it).verdict == "right"


@pytest.mark.extra
@pytest.mark.parametrize(
    ("name", "verdict"), [("ViT", "right"), ("BERT", "right"), ("GPT-2", "right"), ("Llama", "not checked")]
)
def test_hugging_face_architectures_pass(name: str, verdict: str):
    """Tiny, from configs. Llama's RMSNorm casts to float32, so that its differences never agree; its derivatives are right."""
    with seeded():
        model, data, loss = hugging_face(name)
    assert preflight(Objective(model.eval(), BatchLoss(loss), [data])).verdict == verdict


# ---- fields that are no gradient of the loss, and copies ------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Between(nn.Module):
    """Two layers, with a function of their activations between them and one after them."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: Callable[[Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        y = self.last(self.between(h))
        return y if self.after is None else self.after(y, h)


def scaled(x: Tensor) -> Tensor:
    with torch.no_grad():
        largest = x.abs().max()
    return x / largest


def doubled(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: 2 * gradient)
    return x


def few() -> tuple[Tensor, Tensor]:
    return normal(8, 4).float(), torch.arange(8) % 3


@pytest.mark.parametrize(
    "build",
    [
        lambda: Between(Straight.apply),
        lambda: Between(scaled),
        lambda: Between(torch.detach),
        lambda: Between(doubled),
        lambda: Between(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)),
        lambda: Between(torch.sin, lambda y, h: y * h.detach().mean(1, keepdim=True)),
    ],
    ids=["straight-through", "no_grad", "detached", "hook", "fake_quantize", "detached factor"],
)
def test_parameters_whose_gradient_is_not_that_of_the_loss_are_named(build: Callable[[], nn.Module]):
    """Closed form: what lies before the cut is `first`; differences of the loss itself are what shows it. No rule is recommended."""
    found = preflight(Objective(made(build), F.cross_entropy, [few()]))
    assert found.verdict == "wrong"
    assert found.estimated == ("first.weight", "first.bias")
    with pytest.raises(
        UnsupportedModel, match="not the derivative of the loss for 'first.weight', 'first.bias'"
    ) as error:
        refuse_wrong(found)
    assert "rule='difference'" not in str(error.value)
    assert "saves detached" not in str(error.value)
    assert "leave them out by patterns" in str(error.value)


@pytest.mark.parametrize("function", [OnceSine, DetachedSine])
def test_a_right_gradient_with_a_wrong_second_derivative_is_told_from_that(function: Any):
    """The function lies between the two layers: it is the model's own, not the next layer's."""
    found = preflight(Objective(made(lambda: Between(function.apply)), F.cross_entropy, [few()]))
    assert found.verdict == "wrong"
    assert not found.estimated
    assert [s.where for s in found.suspects] == [f"the model (Between), the function {function.__name__}"]
    assert {"first.weight", "first.bias"} <= {*found.disagreeing}
    assert "rule='difference'" in str(found)
    assert "most for '" in str(found)


def test_a_rounded_embedding_gradient_is_found():
    """scale_grad_by_freq divides the gradient of a row by the times that it is used."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 6, scale_grad_by_freq=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.words(x)).mean(1))

    found = preflight(Objective(made(Words), F.cross_entropy, [(torch.arange(12).view(4, 3) % 2, torch.arange(4) % 3)]))
    assert (found.verdict, found.estimated) == ("wrong", ("words.weight",))


def test_a_cast_is_named():
    found = preflight(Objective(made(lambda: Between(lambda x: x.bfloat16().to(x.dtype))), F.cross_entropy, [few()]))
    assert found.verdict == "wrong"
    assert "cast to bfloat16 or float16 inside the model, what is rounded has steps" in str(found)


def test_a_view_that_the_model_holds_is_right():
    """Oracle: the same product by torch alone on the model itself. The copy's view is one of the copy's parameter."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.turned = self.last.weight.t()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.first(x)) @ self.turned + self.last.bias

    model, (x, y) = made(Held).double(), few()
    model.turned = model.last.weight.t()  # .double() gave the parameter another storage
    it = Objective(model, F.cross_entropy, [(x.double(), y)])
    found = preflight(it)
    assert found.verdict == "right", str(found)
    H = Hessian(it)
    v = normal(H.n)
    gradient = torch.autograd.grad(F.cross_entropy(model(x.double()), y), [*model.parameters()], create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(flat @ v, [*model.parameters()])])
    assert (H.matvec(v) - truth).norm() <= 1e-12 * truth.norm()
    # differences move the copy's parameter, and its view with it; their error is 1e-9
    assert (DifferenceHessian(it).matvec(v) - truth).norm() <= 1e-7 * truth.norm()
    single = Objective(made(Held), F.cross_entropy, [(x, y)]).converted(dtype=torch.float64)
    assert single.model.turned.dtype == torch.float64


def test_a_tensor_computed_earlier_is_not_checked():
    """A copy cannot follow it, so that there are no differences; the products of the model itself are right."""

    class Held(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.twice = 2 * self.weight

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.twice, self.bias)

    found = preflight(Objective(made(Held), F.cross_entropy, [few()]))
    assert found.verdict == "not checked"
    assert "not checked: Objective: the loss cross_entropy uses the parameter 'weight'" in str(found)
    assert "compute tensors in forward" in str(found)
