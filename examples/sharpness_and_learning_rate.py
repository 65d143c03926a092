# %% [markdown]
# # Sharpness after training with two learning rates
#
# Full-batch gradient descent with step eta cannot stay where the sharpness is above 2 / eta: it bounces along the sharp direction until it is in a flatter
# place. So the run with the larger step ends below its limit 2 / eta, although nothing in the loss asks for it.

# %%
import torch
import torch.nn.functional as F

from curvkit import Objective
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.models import MLP

draw = torch.Generator().manual_seed(0)
x = torch.randn(256, 8, generator=draw)
y = (x[:, 0] * x[:, 1] > 0).long()

# %%
rows = []
for eta in (0.05, 0.4):
    torch.manual_seed(1)
    model = MLP([8, 32, 2], activation="tanh")
    for _ in range(1500):
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= eta * gradient
    result = sharpness(Objective(model, F.cross_entropy, [(x, y)]), seed=0, settings=SharpnessSettings(data_doubt=False))
    low, high = result.eigenpairs.intervals[0].tolist()
    rows.append((eta, 2 / eta, result.loss, result.value, low, high))

# %%
print("  eta   limit 2/eta    loss   sharpness   interval")
for eta, limit, loss, value, low, high in rows:
    print(f"{eta:5.2f}   {limit:11.1f}   {loss:.3f}   {value:9.3f}   [{low:.3f}, {high:.3f}]")

assert all(row[3] < 1.1 * row[1] for row in rows), "sharpness above the limit of the step that led there"
