# %% [markdown]
# # The edge of stability
#
# Full-batch gradient descent with step eta on a smooth network: the sharpness rises ("progressive sharpening") until it
# reaches 2 / eta, where the step would become unstable, and stays there while the loss goes on falling (Cohen et al.,
# arXiv 2103.00065). Adam does the same with the sharpness that it sees, that of P^-1 H with P its divisor of the gradient,
# at 38 / lr (arXiv 2207.14484). Each reading below is an interval that is certain to hold an eigenvalue.

# %%
import importlib.util
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from curvkit import Objective
from curvkit.checkpoints import read, save
from curvkit.checkpoints.optimizer_state import optimizer_state
from curvkit.measures import SharpnessSettings, stability
from curvkit.models import MLP

torch.set_num_threads(1)  # the matrices are small: a second thread would only wait
draw = torch.Generator().manual_seed(0)
x = torch.randn(100, 10, generator=draw)
y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
settings = SharpnessSettings(data_doubt=False)


# %% [markdown]
# A checkpoint has all that is needed: the weights, the learning rate, and for Adam its second moment.


# %%
def reading(model, optimizer):
    """Where the optimizer stands beside its limit, from a checkpoint that is written and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "ckpt.pt", model=model, optimizer=optimizer)
        state = optimizer_state(read(path), {name: p.shape for name, p in model.named_parameters()})
    return stability(Objective(model, F.mse_loss, [(x, y)]), state, seed=0, settings=settings)


def train(make, steps, every):
    """Train with all the data at each step, and read now and then."""
    torch.manual_seed(0)
    model = MLP([10, 50, 50, 1], activation="tanh")
    optimizer = make(model.parameters())
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if step % every == 0 or step in (20, 50, 100):
            result = reading(model, optimizer)
            if not found:
                print(f"\n{result.optimizer}: {result.quantity}, limit {result.limit_text} = {result.limit:.4g}")
                print("  step       loss       value   interval                  ratio")
            low, high = result.interval
            bar = "█" * round(20 * result.ratio)
            shown = f"[{low:.5g}, {high:.5g}]"
            print(f"{step:6d}   {loss.item():8.2e}   {result.value:9.4g}   {shown:20}   {result.ratio:8.3f}  {bar}")
            found.append((step, result))
    return found


# %%
descent = train(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=2000, every=200)
adam = train(lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.99)), steps=1600, every=200)

# %%
assert all(found[0][1].verdict == "below the full-batch limit" for found in (descent, adam)), (
    "training begins far below"
)
assert all(abs(result.ratio - 1) < 0.02 for _, result in descent[-5:]), "and ends within 2 % of it"
assert all(result.verdict == "at the full-batch limit" for _, result in descent[-5:] + adam[-5:])

# %% [markdown]
# With matplotlib there is a figure; the bars above are the same in any terminal.

# %%
if importlib.util.find_spec("matplotlib") is not None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, found in zip(panels, (descent, adam), strict=True):
        steps, results = zip(*found, strict=True)
        panel.plot(steps, [result.value for result in results], marker="o", label=results[-1].quantity)
        panel.axhline(results[-1].limit, color="black", linestyle="--", label=f"limit {results[-1].limit_text}")
        panel.set(title=results[-1].optimizer, xlabel="step", ylim=(0, 1.25 * results[-1].limit))
        panel.legend(loc="lower right")
    figure.savefig("edge_of_stability.png", dpi=120)
    print("\nedge_of_stability.png has the same as a figure")
