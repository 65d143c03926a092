"""BatchNorm folded into the linear map before it: the same function and the same second derivatives, or nothing changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.models import ResNet
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.operators.folding import FoldBatchNorm

# float64 rounding, 2.2e-16, over a few layers and sums of a few hundred terms.
EXACT = 1e-12


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _shaken(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with running statistics and affine parameters that are not the initial ones."""
    model = model.double().eval()
    with torch.no_grad():
        for i, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if tensor.dtype.is_floating_point:
                drawn = _draw(*tensor.shape, seed=i)
                tensor.copy_(drawn.abs() + 0.5 if name.endswith(("running_var",)) else 0.5 * drawn)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh()), (4, 2, 7), 1),
    "conv2d, stride, padding, groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.Tanh()),
        (3, 4, 6, 6),
        1,
    ),
    "conv2d without bias, dilated": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, bias=False, dilation=2), nn.BatchNorm2d(3)),
        (3, 2, 6, 6),
        1,
    ),
    "conv2d, reflected padding": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3)),
        (3, 2, 5, 5),
        1,
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh()), (2, 1, 3, 4, 3), 1),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)), (5, 4), 1),
    "without affine parameters": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, affine=False), nn.Tanh()),
        (3, 2, 4, 4),
        1,
    ),
    "two in a row": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)), (5, 3), 1),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Tanh()), (2, 5, 3), 0),
    "first of all": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), (5, 3), 0),
    "after an activation in place": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)),
        (5, 3),
        0,
    ),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3)), (2, 2, 3, 3), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_folded_output_and_number(name: str):
    """Law: the same function; and only what follows a linear map untouched is folded."""
    make, shape, expected = CASES[name]
    model, x = _shaken(make()), _draw(*shape, seed=9)
    with FoldBatchNorm(model) as folding:
        folded = model(x)
    assert folding.folded == expected
    torch.testing.assert_close(folded, model(x), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", CASES)
def test_product_equals_dense_autograd_of_the_unfolded_model(name: str):
    """Dense autograd, float64: all parameters, the affine ones of the normalisation included."""
    make, shape, _ = CASES[name]
    model, x = _shaken(make()), _draw(*shape, seed=9)
    y = _draw(*model(x).shape, seed=10)
    H = Hessian(Objective(model, F.mse_loss, [(x, y)]))

    def loss(theta: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, H.space.unflatten(theta), (x,)), y)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    truth = torch.autograd.functional.hessian(loss, theta)
    error = (H.matmat(torch.eye(H.n, dtype=torch.float64)) - truth).norm() / truth.norm()
    assert error <= EXACT


def test_every_normalisation_of_a_resnet_is_folded():
    """Law: one fold per BatchNorm layer, and the same logits."""
    model, x = _shaken(ResNet(depth=8, width=3)), _draw(2, 3, 8, 8)
    with FoldBatchNorm(model) as folding:
        folded = model(x)
    assert folding.folded == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(folded, model(x), rtol=EXACT, atol=EXACT)


def test_a_hooked_or_kept_output_is_not_folded():
    """Law: somebody who looks at the convolution's output gets its gradient as without folding."""
    model, x = _shaken(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))), _draw(2, 2, 4, 4)
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(seen.append)

    model[0].register_forward_hook(watch)
    with FoldBatchNorm(model) as folding:
        model(x).sum().backward()
    assert folding.folded == 0
    assert len(seen) == 1


def test_batch_statistics_are_not_folded():
    """Law: training mode normalises by the batch; that is another function."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), _draw(5, 3)
    with FoldBatchNorm(model) as folding:
        model(x)
    assert folding.folded == 0


def test_the_layers_get_their_own_forward_back():
    """Law: also when the forward pass raises, and without touching layers that somebody has patched."""
    model, x = _shaken(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), _draw(5, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), FoldBatchNorm(model):
        model(x[:, :2])
    assert not any("forward" in vars(module) for module in model.modules())
    own = model[0].forward
    model[0].forward = own
    with FoldBatchNorm(model) as folding:
        model(x)
    assert folding.folded == 0
    assert model[0].forward is own


def test_models_without_batch_norm_are_left_alone():
    """Law: nothing is replaced where there is nothing to fold."""
    model = nn.Linear(2, 2)
    with FoldBatchNorm(model):
        assert "forward" not in vars(model)
