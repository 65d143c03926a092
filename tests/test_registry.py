"""Estimators by name: our own, and those of packages that are really on the path, sound and broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from oracles import classes, normal, seeded

import curvkit.estimators
from curvkit.checkpoints import Recipe, save
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.estimators import (
    Controlled,
    Deflated,
    DiagonalEstimator,
    Exact,
    ExampleHutchinson,
    Fisher,
    Hutchinson,
    Lanczos,
)
from curvkit.estimators.names.options import made, options
from curvkit.estimators.registry import BUILT_IN, build, describe, described, estimator_class, names
from curvkit.models import MLP

SOUND = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Ones:
    '''All ones.

    More.
    '''

    matrix: ClassVar[str] = "identity"
    size: float = 1.0

    def __post_init__(self):
        if self.size == 3:
            raise ValueError("size=3 is not allowed")

    def estimate(self, objective, *, seed=None):
        return None
"""


def install(path: Path, monkeypatch: pytest.MonkeyPatch, points: str, module: str = "", text: str = SOUND) -> str:
    """A distribution as pip lays it out; the module gets a name of its own, which is put in place of MODULE."""
    count = len(list(path.glob("*.dist-info")))
    module = module or f"third_party_{path.name.replace('-', '_')}_{count}"
    (path / f"{module}.py").write_text(text)
    folder = path / f"third_party_{count}-1.{count}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: third-party-{count}\nVersion: 1.{count}\n")
    (folder / "entry_points.txt").write_text(f"[curvkit.estimators]\n{points.replace('MODULE', module)}\n")
    if str(path) not in sys.path:
        monkeypatch.syspath_prepend(str(path))
    return module


# ---- our own --------------------------------------------------------------------------------------------------------


def test_every_estimator_of_ours_has_a_name():
    """And every name is that of a public class."""
    public = {getattr(curvkit.estimators, name) for name in curvkit.estimators.__all__}
    classes = {found for found in public if is_dataclass(found) and hasattr(found, "estimate")}
    assert {estimator_class(name) for name in BUILT_IN} == classes
    assert names()[: len(BUILT_IN)] == tuple(sorted(BUILT_IN))


def test_our_own_are_described():
    own = [found for found in described() if found.origin == "curvkit"]
    assert [found.name for found in own] == sorted(BUILT_IN)
    for found in own:
        assert found.summary.endswith("."), found.name
        assert found.matrix, found.name
        assert found.options == options(estimator_class(found.name))
    assert describe("hutchinson").matrix == "hessian"
    assert describe("empirical-fisher").options == ()
    assert str(describe("fisher").options[0]) == "num_samples (an integer, default 1)"


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("fishr", {}, "there is no estimator 'fishr'. The nearest is 'fisher'. Known are "),
        ("Example_Hutchinson", {}, "The nearest is 'example-hutchinson'"),
        ("", {}, "there is no estimator ''. Known are "),
        ("fisher", {"num_sample": "1"}, "no option 'num_sample', nearest: 'num_samples'. It takes num_samples (an in"),
        ("empirical-fisher", {"x": "1"}, "estimator empirical-fisher: no option 'x'. It takes no options."),
        ("fisher", {"num_samples": "many"}, "estimator fisher: num_samples='many' must be an integer."),
        ("fisher", {"num_samples": "0"}, "num_samples=0 must be an integer >= 1"),
        (
            "fisher",
            {"num_samples.x": "0"},
            "num_samples.x='0', but 'num_samples' has no options of its own. It is an i",
        ),
    ],
)
def test_what_is_typed_wrong_is_refused(name: str, given: dict[str, str], said: str):
    with pytest.raises(InvalidArgument) as error:
        build(name, given)
    assert said in str(error.value)


# ---- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    count: int = 2

    def estimate(self, objective: Any, *, seed: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Every:
    """One option of every kind."""

    needed: int
    share: float = 0.5
    exact: bool = False
    name: str = "x"
    kind: Literal["hessian", "ggn", 3] = "hessian"
    limit: int | None = None
    either: Literal["auto"] | int = "auto"
    inner: DiagonalEstimator = field(default_factory=Inner)
    one: Inner | Fisher | None = None
    sizes: tuple[int, ...] = (1,)
    state: Any = field(default=None, repr=False)

    def estimate(self, objective: Any, *, seed: int | None = None) -> Any: ...


def every(**given: str) -> Every:
    given = {key.replace("__", "."): value for key, value in given.items()}
    known = {"inner": Inner, "every": Every, "fisher": Fisher, "hutchinson": Hutchinson}
    return made("every", Every, {"needed": "1", **given}, known)


def test_texts_become_values():
    found = every(needed="-2", share="1e-3", exact="Yes", name="a b", kind="3", limit="None", either="7")
    assert found == Every(-2, 1e-3, True, "a b", 3, None, 7)
    assert every(limit="4", exact="false", either="auto") == Every(1, limit=4)


def test_estimators_nest():
    assert every(inner="fisher", inner__num_samples="3").inner == Fisher(3)
    assert every(inner__count="5").inner == Inner(5)
    assert every(one="inner").one == Inner()
    assert every(one="none").one is None
    deep = every(inner="every", inner__needed="1", inner__inner="hutchinson", inner__inner__num_probes="4")
    assert deep.inner == Every(1, inner=Hutchinson(4))


def test_our_own_nest():
    given = {"inner": "example-hutchinson", "inner.num_probes": "3", "by": "exact", "by.matrix": "ggn"}
    assert build("controlled", given) == Controlled(ExampleHutchinson(3), Exact("ggn"))
    assert build("lanczos", {"rank": "4", "remainder": "hutchinson"}) == Lanczos(4, Hutchinson())
    assert build("lanczos", {"remainder": "none"}) == Lanczos()
    assert build("deflated", {"inner.num_probes": "6"}) == Deflated(Hutchinson(6))


def test_what_does_not_nest_is_refused_with_what_does():
    """An estimator of H - G is asked for; Fisher is none."""
    with pytest.raises(InvalidArgument) as error:
        build("controlled", {"inner": "fisher"})
    begin = "estimator controlled: inner='fisher' does not fit. It must be "
    assert str(error.value).startswith(begin)
    fitting = str(error.value).removeprefix(begin).removesuffix(".").replace(" or ", ", ").split(", ")
    assert {"hutchinson", "example-hutchinson"} <= set(fitting)
    for inner in fitting:
        assert isinstance(build("controlled", {"inner": inner}).inner, estimator_class(inner))  # pyright: ignore
    with pytest.raises(InvalidArgument, match="there is no estimator 'fischer'. The nearest is 'fisher'"):
        build("controlled", {"inner": "fischer"})


def test_options_are_listed_by_what_repr_shows():
    shown = [str(option) for option in options(Every)]
    assert shown == [
        "needed (an integer, no default)",
        "share (a number, default 0.5)",
        "exact (true or false, default False)",
        "name (a text, default 'x')",
        "kind ('hessian', 'ggn' or 3, default 'hessian')",
        "limit (an integer or none, default None)",
        "either ('auto' or an integer, default 'auto')",
        "inner (an estimator, default Inner(count=2))",
        "one (an estimator (Inner or Fisher) or none, default None)",
        "sizes (of type tuple[int, ...], default (1,))",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": "nan"}, "share='nan' must be a number."),
        ({"exact": "1"}, "exact='1' must be true or false."),
        ({"kind": "fisher"}, "kind='fisher' must be 'hessian', 'ggn' or 3."),
        ({"limit": "x"}, "limit='x' must be an integer or none."),
        ({"sizes": "1"}, "sizes='1' cannot be given as text (of type tuple[int, ...]). Use the estimator from Python."),
        ({"state": "1"}, "no option 'state'"),
        ({"one": "hutchinson"}, "one='hutchinson' does not fit. It must be inner or fisher."),
        (
            {"one__count": "1"},
            "one.count is an option of 'one', which is not given. Say which it is, as one=hutchinson.",
        ),
        ({"inner__cont": "1"}, "estimator every, inner: no option 'cont', nearest: 'count'."),
    ],
)
def test_values_that_do_not_fit_are_refused(given: dict[str, str], said: str):
    with pytest.raises(InvalidArgument) as error:
        every(**given)
    assert said in str(error.value)


def test_a_missing_option_is_named():
    with pytest.raises(InvalidArgument, match=r"estimator every: lacks 'needed'. It takes needed \(an integer, no def"):
        made("every", Every, {}, {})


def test_annotations_that_are_not_there_are_refused():
    @dataclass(frozen=True)
    class Vague:
        x: Nowhere = 0  # noqa: F821  # pyright: ignore

    with pytest.raises(
        InvalidArgument, match="the estimator Vague: its annotations cannot be evaluated .NameError: .*TYPE_"
    ):
        options(Vague)


# ---- other packages -------------------------------------------------------------------------------------------------


def test_an_installed_package_is_listed_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = install(tmp_path, monkeypatch, "ones = MODULE:Ones")
    assert names() == (*sorted(BUILT_IN), "ones")
    listed = described()[-1]
    assert (listed.name, listed.origin, listed.matrix, listed.failure) == ("ones", "third-party-0 1.0", None, None)
    assert build("fisher", {}) == Fisher()
    with pytest.raises(InvalidArgument, match="no estimator 'one'. The nearest is 'ones'"):
        build("one", {})
    assert module not in sys.modules
    assert build("ones", {"size": "2"}).size == 2.0
    assert module in sys.modules
    for found in (describe("ones"), described(load=True)[-1]):
        assert (found.matrix, found.summary, found.failure) == ("identity", "All ones.", None)
        assert str(found.options[0]) == "size (a number, default 1.0)"


def test_what_a_stranger_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, monkeypatch, "ones = MODULE:Ones")
    with pytest.raises(InvalidArgument, match=r"estimator ones: size=3 is not allowed. It takes size \(a number"):
        build("ones", {"size": "3"})


BROKEN = {
    "absent": ("ones = nowhere_to_be_found:Ones", SOUND, "cannot be imported .ModuleNotFoundError: No module"),
    "no such class": ("ones = MODULE:Twos", SOUND, "cannot be imported .AttributeError: module .* has no attribute"),
    "raises": ("ones = MODULE:Ones", "raise RuntimeError('a\\nb')", "cannot be imported .RuntimeError: a b.. Reinst"),
    "exits": ("ones = MODULE:Ones", "import sys\nsys.exit(3)", "cannot be imported .SystemExit: 3"),
    "syntax": ("ones = MODULE:Ones", "def", "cannot be imported .SyntaxError: "),
    "no class": ("ones = MODULE:Ones", "def Ones(): ...", "is refused: MODULE:Ones is no class. It must be a frozen d"),
    "not frozen": ("ones = MODULE:Ones", SOUND.replace("frozen=True", ""), "MODULE:Ones is no frozen dataclass"),
    "plain": ("ones = MODULE:Ones", "class Ones: ...", "MODULE:Ones is no frozen dataclass. Its authors write @datac"),
    "no estimate": ("ones = MODULE:Ones", SOUND.replace("estimate", "guess"), "has no method estimate.objective, "),
    "no seed": ("ones = MODULE:Ones", SOUND.replace(", *, seed=None", ""), "has no method estimate.objective, .*seed"),
    "annotations": (
        "ones = MODULE:Ones",
        "from __future__ import annotations\n" + SOUND.replace("float", "Nowhere"),
        "annotations cannot be evaluated",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_has_a_reason_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    points, text, said = BROKEN[case]
    module = install(tmp_path, monkeypatch, points, text=text)
    install(tmp_path, monkeypatch, "sound = MODULE:Ones")
    with pytest.raises(CurvkitError, match=said.replace("MODULE", module)):
        build("ones", {"size": "1"})
    found = {one.name: one for one in described(load=True)}
    assert found["ones"].failure
    assert found["sound"].failure is None
    assert build("sound", {}).size == 1.0


@pytest.mark.parametrize(
    ("points", "name", "said"),
    [
        ("fisher = MODULE:Ones", "fisher", "it bears the name of one of curvkit's own"),
        ("Ones = MODULE:Ones", "Ones", "its name is not of small letters, digits and single hyphens"),
        ("nothing", "third-party-0", "its entry points cannot be read"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str, name: str, said: str):
    module = install(tmp_path, monkeypatch, points)
    install(tmp_path, monkeypatch, "sound = MODULE:Ones")
    refused = next(found for found in described() if found.origin != "curvkit" and found.name == name)
    assert said in str(refused.failure)
    assert names() == (*sorted(BUILT_IN), "sound")
    assert estimator_class("fisher") is Fisher
    assert module not in sys.modules


def test_a_refused_name_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, monkeypatch, "Ones = MODULE:Ones")
    with pytest.raises(
        CurvkitError, match="the estimator 'Ones' of third-party-0 1.0 is refused: its name is not of small"
    ):
        build("Ones", {})


def test_two_packages_with_one_name_are_both_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for _ in range(2):
        install(tmp_path, monkeypatch, "ones = MODULE:Ones")
    assert "ones" not in names()
    with pytest.raises(CurvkitError, match="the name is claimed by third-party-0 1.0 and third-party-1 1.1"):
        build("ones", {})


def test_a_package_that_is_on_the_path_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        install(tmp_path / folder, monkeypatch, "ones = MODULE:Ones", module="third_party_twice")
    assert names() == (*sorted(BUILT_IN), "ones")


def test_a_damaged_distribution_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for _ in range(3):
        install(tmp_path, monkeypatch, "ones = MODULE:Ones")
    first, second, _ = sorted(tmp_path.glob("*.dist-info"))
    (first / "entry_points.txt").write_bytes(b"[curvkit.estimators]\n\xff\xfe = a:b\n")
    (second / "METADATA").unlink()
    (second / "entry_points.txt").write_text("[curvkit.estimators]\ntwos = a:b\n")
    assert "ones" in names()
    assert build("ones", {"size": "2"}).size == 2.0  # pyright: ignore


def test_a_name_that_is_not_there_cannot_be_described():
    with pytest.raises(InvalidArgument, match="there is no estimator 'fishr'. The nearest is 'fisher'"):
        describe("fishr")


def test_an_own_one_whose_extra_is_missing_says_so(monkeypatch: pytest.MonkeyPatch):
    from curvkit.estimators import registry

    monkeypatch.setitem(registry.EXTRAS, "fisher", "a_package_that_is_nowhere")
    assert describe("fisher").failure == (
        "it needs a_package_that_is_nowhere, which is not installed. Type: pip install 'curvkit[fisher]'"
    )


# ---- a package that pip installs ------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "write_an_estimator.py"
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "signed-ggn"
version = "0.3"

[tool.setuptools]
py-modules = ["signed_ggn"]

"""


@pytest.mark.slow
def test_the_example_as_an_installed_package(tmp_path: Path):
    """The class and the two lines of the example's text; pip builds and installs them without a network."""
    text = EXAMPLE.read_text(encoding="utf-8")
    cells = text.split("# %%")
    code = next(cell for cell in cells if "class SignedGGN" in cell).strip("\n")
    own = code[code.index("@dataclass") :].splitlines()
    assert len(own) < 40
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    begin = lines.index('[project.entry-points."curvkit.estimators"]')
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "signed_ggn.py").write_text(code)
    (source / "pyproject.toml").write_text(PROJECT + "\n".join(lines[begin : begin + 2]) + "\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    ran([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)], tmp_path)

    listed = ran([sys.executable, "-c", ASKED], tmp_path, target)
    assert listed.split() == ["True", "signed-ggn", "0.3", "False", "SignedGGN(num_probes=20)"]
    shown = ran([*CURVKIT, "estimators", "--plain"], tmp_path, target)
    assert any(line.startswith("signed-ggn\t") and "signed-ggn 0.3" in line for line in shown.splitlines())
    x, y = normal(12, 4, dtype=torch.float32), classes(12, num=3)
    with seeded():
        model = MLP([4, 3])
    recipe = Recipe("mlp", {"sizes": [4, 3]}, "cross_entropy", {"x": x, "y": y})
    save(tmp_path / "ckpt.pt", model=model, recipe=recipe)
    command = [*CURVKIT, "diagonal", "ckpt.pt", "--estimator", "signed-ggn", "--set", "num_probes=20", "--seed", "1"]
    measured = json.loads(ran([*command, "--json"], tmp_path, target))
    text = json.dumps(measured)
    assert "SignedGGN(num_probes=20)" in text
    assert '"ggn"' in text


CURVKIT = [sys.executable, "-c", "from curvkit_cli.main import main; main()"]
ASKED = """
import sys
from curvkit.estimators.registry import build, described, names
print("signed-ggn" in names(), described()[-1].origin, "signed_ggn" in sys.modules)
print(build("signed-ggn", {"num_probes": "20"}))
"""


def ran(command: list[str], folder: Path, path: Path | None = None) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
