"""What is installed is what lies in the folders, and it can be imported without any optional package."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"curvkit": "curvkit", "cli": "curvkit_cli"}
OPTIONAL = ("backpack", "pyhessian", "matplotlib", "scipy", "sklearn", "curvlinops", "torchvision")
OPTIONAL += ("transformers", "accelerate", "peft", "lightning", "pytorch_lightning", "tensorboard")


def files_of(folder: str) -> list[Path]:
    inside = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in inside if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """The file names of the source distribution and of the wheel made from it; the wheel's entry points."""
    # A copy, since a build leaves folders behind that the next one would pack.
    copy = tmp_path_factory.mktemp("source") / "curvkit"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        wheel = set(archive.namelist())
        [entry_points] = [name for name in wheel if name.endswith(".dist-info/entry_points.txt")]
        return source, wheel, archive.read(entry_points).decode()


def test_wheel_holds_exactly_the_files_of_the_folders(built: tuple[set[str], set[str], str]):
    expected = {f"{package}/{path.as_posix()}" for folder, package in FOLDERS.items() for path in files_of(folder)}
    packed = {name for name in built[1] if ".dist-info/" not in name}
    assert packed == expected
    assert "curvkit/py.typed" in packed


def test_source_distribution_holds_the_files_of_the_folders(built: tuple[set[str], set[str], str]):
    expected = {f"{folder}/{path.as_posix()}" for folder in FOLDERS for path in files_of(folder)}
    assert expected <= built[0]
    assert {"pyproject.toml", "README.md", "LICENSE"} <= built[0]


def test_wheel_installs_the_command(built: tuple[set[str], set[str], str]):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(built[2])
    assert dict(entry_points["console_scripts"]) == {"curvkit": "curvkit_cli.main:main"}


def test_every_folder_with_python_is_a_package():
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_version_is_the_changelog_s_newest():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0].startswith(f"## [{version}]")


IMPORT_ALL = """
import importlib, importlib.metadata, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

OPTIONAL = sys.argv[1].split(",")
sys.meta_path.insert(0, Absent())
for root in ("curvkit", "curvkit_cli"):
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, f"{root}."):
        if module.name.rpartition(".")[2] != "__main__":
            importlib.import_module(module.name)
            print(module.name)
import curvkit
for name in getattr(curvkit, "__all__", ()):
    getattr(curvkit, name)
"""


def test_every_module_is_imported_without_the_optional_packages(tmp_path: Path):
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, ",".join(OPTIONAL)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    imported = set(ran.stdout.split())
    for folder, package in FOLDERS.items():
        parts = [(package, *path.with_suffix("").parts) for path in files_of(folder) if path.suffix == ".py"]
        expected = {".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts} - {package}
        assert {name for name in expected if not name.endswith("__main__")} <= imported
