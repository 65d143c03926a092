"""The floor plan holds: imports go downwards, extras stay optional, laws that show in the source are kept.

Each checker is also run on a planted fault, so that one which can no longer fail is noticed.
"""

from pathlib import Path

import pytest
from structure import cli_faults, extra_faults, law_faults, layer_faults, name_faults

ROOT = Path(__file__).parents[1]


def test_imports_go_downwards():
    assert layer_faults(ROOT / "curvkit") == []


def test_optional_packages_are_imported_in_one_file_each():
    assert extra_faults(ROOT / "curvkit") == []


def test_command_line_imports_itself_relatively():
    assert cli_faults(ROOT / "cli") == []


@pytest.mark.parametrize(("folder", "name"), [("curvkit", "curvkit"), ("cli", "curvkit_cli")])
def test_no_module_hides_a_public_object(folder: str, name: str):
    assert name_faults(ROOT / folder, name) == []


@pytest.mark.parametrize(("folder", "name"), [("curvkit", "curvkit"), ("cli", "curvkit_cli")])
def test_laws_that_can_be_read_off_the_source(folder: str, name: str):
    assert law_faults(ROOT / folder, name) == []


def plant(tmp_path: Path, folder: str, files: dict[str, str]) -> Path:
    planted = tmp_path / folder
    for name, text in {"__init__.py": "", **files}.items():
        path = planted / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return planted


SOUND = {
    "__init__.py": "from curvkit.objectives import objective\nfrom curvkit.demos import train\n",
    "errors.py": "import math\nimport torch\n",
    "objectives.py": "from curvkit.errors import Bad\ndef objective(): ...\n",
    "linalg/__init__.py": "from curvkit.linalg import lanczos\n__all__ = ['lanczos']\n",
    "linalg/maps.py": "from .. import errors\n",
    "linalg/lanczos.py": "from curvkit.linalg.maps import LinearMap\nfrom curvkit import errors\n",
    "report.py": "def draw():\n    import matplotlib.pyplot as plt\n",
    "demos.py": "import importlib\nimportlib.import_module('curvkit.errors')\n",
}


def test_a_sound_package_has_no_faults(tmp_path: Path):
    folder = plant(tmp_path, "curvkit", SOUND)
    assert layer_faults(folder) + extra_faults(folder) + name_faults(folder, "curvkit") == []
    assert law_faults(folder, "curvkit") == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"errors.py": "from curvkit.seeds import draw\n", "seeds.py": ""},
            "errors imports seeds, a later room",
        ),
        ({"errors.py": "from curvkit import seeds\n", "seeds.py": ""}, "errors imports seeds, a later room"),
        ({"errors.py": "from . import seeds\n", "seeds.py": ""}, "errors imports seeds, a later room"),
        (
            {"linalg/a.py": "from ..models import b\n", "models/b.py": ""},
            "linalg imports models, a later room",
        ),
        (
            {"linalg/a.py": "from ..models.b import c\n", "models/b.py": ""},
            "linalg/a.py:1: linalg imports models, a later room",
        ),
        (
            {"errors.py": "def f():\n    import curvkit.seeds\n", "seeds.py": ""},
            "errors.py:2: errors imports seeds, a later room",
        ),
        (
            {"errors.py": "import importlib\nimportlib.import_module('curvkit.seeds')\n", "seeds.py": ""},
            "errors.py:2: errors imports seeds, a later room",
        ),
        ({"seeds.py": "from curvkit import Objective\n"}, "imports from the package root"),
        ({"seeds.py": "import curvkit\n"}, "imports from the package root"),
        ({"seeds.py": "import curvkit.nowhere\n"}, "curvkit.nowhere does not exist"),
        ({"seeds.py": "import curvkit_cli\n"}, "the package imports the command line"),
        ({"seeds.py": "from cli import main\n"}, "the package imports the command line"),
        ({"seeds.py": "import scipy\n"}, "scipy is not a dependency"),
        ({"helpers.py": ""}, "the room 'helpers' is not on the floor plan"),
        ({"helpers/inner/a.py": ""}, "the room 'helpers' is not on the floor plan"),
        (
            {"linalg/a.py": "from curvkit.linalg import b\n", "linalg/b.py": "from .a import f\n"},
            "imports in a circle: curvkit.linalg.",
        ),
        (
            {"linalg/__init__.py": "from .a import f\n", "linalg/a.py": "from curvkit.linalg import g\n"},
            "imports in a circle: curvkit.linalg",
        ),
    ],
)
def test_planted_import_is_found(tmp_path: Path, files: dict[str, str], fault: str):
    [found] = layer_faults(plant(tmp_path, "curvkit", files))
    assert fault in found


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"report.py": "import matplotlib\n"},
            "report.py:1: matplotlib is optional and imported outside a function",
        ),
        (
            {"report.py": "try:\n    from torch.utils import tensorboard\nexcept ImportError:\n    pass\n"},
            "tensorboard",
        ),
        (
            {
                "report.py": "def f():\n    import lightning.pytorch\n",
                "monitor.py": "def f():\n    import pytorch_lightning\n",
            },
            "lightning is imported in 2 files: curvkit/monitor.py, curvkit/report.py",
        ),
    ],
)
def test_planted_extra_is_found(tmp_path: Path, files: dict[str, str], fault: str):
    [found] = extra_faults(plant(tmp_path, "curvkit", files))
    assert fault in found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import curvkit_cli.options\n", "imports itself absolutely"),
        ("def f():\n    from cli import options\n", "imports itself absolutely"),
        ("from ... import options\n", "leaves the package"),
        ("import yaml\n", "imports yaml"),
    ],
)
def test_planted_command_line_import_is_found(tmp_path: Path, text: str, fault: str):
    assert cli_faults(plant(tmp_path, "cli", {"commands/__init__.py": "from ..main import x\n"})) == []
    [found] = cli_faults(plant(tmp_path, "cli", {"commands/bad.py": text}))
    assert fault in found


@pytest.mark.parametrize(
    "text",
    [
        "from curvkit.errors import objective\n",
        "from .errors import decorate as objective\n",
        "__all__ = ['objective']\n",
        "_TABLE = {'objective': 'curvkit.objective'}\n__all__ = sorted(_TABLE)\n",
        "def objective(): ...\n",
    ],
)
def test_planted_module_name_is_found(tmp_path: Path, text: str):
    folder = plant(tmp_path, "curvkit", {"__init__.py": text, "objective.py": ""})
    assert name_faults(folder, "curvkit") == ["curvkit/__init__.py: 'objective' is a module and a public object"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("assert x\n", "assert"),
        ("print(1)\n", "print"),
        ("p.data = 1\n", ".data"),
        ("p.data[0] = 1\n", ".data"),
        ("self.p.data += 1\n", ".data"),
        ("p.data.copy_(q)\n", ".data"),
        ("torch.manual_seed(0)\n", "global random state"),
        ("with torch.no_grad():\n    torch.manual_seed(0)\n", "global random state"),
        ("from torch import manual_seed\n", "global random state"),
        ("np.random.seed(0)\n", "global random state"),
    ],
)
def test_planted_breach_of_a_law_is_found(tmp_path: Path, text: str, fault: str):
    allowed = "self.data = data\nx = p.data\ngenerator.manual_seed(0)\np.copy_(q)\n"
    allowed += "with random_state():\n    torch.manual_seed(0)\n"
    assert law_faults(plant(tmp_path, "curvkit", {"seeds.py": allowed}), "curvkit") == []
    [found] = law_faults(plant(tmp_path, "curvkit", {"seeds.py": text}), "curvkit")
    assert fault in found
