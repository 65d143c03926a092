"""What holds around every test: few threads, a clean environment, torch flags that stay as they were, no modules left behind."""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)  # small kernels would spin, waiting for a second thread


def torch_flags() -> dict[str, object]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _torch_flags_are_left_alone():
    before = torch_flags()
    assert before["grad mode"] is True
    assert before["default dtype"] is torch.float32
    assert before["deterministic algorithms"] is False
    yield
    after = torch_flags()
    torch.set_grad_enabled(True)  # so that the tests after this one do not fail as well
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test changed global torch flags (before, after): {changed}"


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("CURVKIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _modules_that_tests_wrote_are_forgotten(tmp_path_factory: pytest.TempPathFactory):
    yield
    written = str(tmp_path_factory.getbasetemp())  # also what a fixture of a whole module imported
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]
