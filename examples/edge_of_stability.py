# %% [markdown]
# # The edge of stability
#
# Full-batch gradient descent with step eta on a smooth network: the sharpness rises ("progressive sharpening") until it
# reaches 2 / eta, where the step would become unstable, and stays there while the loss goes on falling (Cohen et al.,
# arXiv 2103.00065). Each reading below is an interval that is certain to hold an eigenvalue of the Hessian.

# %%
import torch
import torch.nn.functional as F

from curvkit import Objective
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.models import MLP

eta = 0.1
draw = torch.Generator().manual_seed(0)
x = torch.randn(100, 10, generator=draw)
y = torch.sin(2 * x[:, :1]) * x[:, 1:2]

torch.manual_seed(0)
model = MLP([10, 50, 50, 1], activation="tanh")
parameters = list(model.parameters())

# %%
print(f"  step       loss   sharpness   interval              limit 2/eta = {2 / eta:.1f}")
readings = []
for step in range(3001):
    if step % 250 == 0:
        settings = SharpnessSettings(data_doubt=False)
        result = sharpness(Objective(model, F.mse_loss, [(x, y)]), seed=0, settings=settings)
        low, high = result.eigenpairs.intervals[0].tolist()
        readings.append(result.value)
        bar = "#" * round(result.value)
        print(f"{step:6d}   {result.loss:8.2e}   {result.value:9.3f}   [{low:.3f}, {high:.3f}]   {bar}")
    gradient = torch.autograd.grad(F.mse_loss(model(x), y), parameters)
    with torch.no_grad():
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter -= eta * g

# %%
assert readings[0] < 0.5 * (2 / eta), "training begins far below the limit"
assert all(abs(reading * eta / 2 - 1) < 0.02 for reading in readings[-5:]), "and ends within 2 % of it"
