"""Every page and every docstring example runs, and prints what it says."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

import curvkit

ROOT = Path(__file__).parents[1]
SLOW = {"docs/cli.md", "docs/concepts/comparison.md", "docs/concepts/resume.md", "docs/quickstart.md"}
"""Pages that take more than about ten seconds."""
PAGES = [path.relative_to(ROOT) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "curvkit").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "pages.py"), str(page)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.as_posix() in SLOW else ()) for page in PAGES],
    ids=str,
)
def test_page_runs(page: Path, tmp_path: Path):
    ran = run_page(ROOT / page, tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_the_reference_names_what_there_is():
    """mkdocs fails too, but only where it is run; and it does not know what is missing."""
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = [name if name == "curvkit.errors" else resolved(name) for name in named]
    assert len(set(map(id, found))) == len(named)
    assert {f"curvkit.{name}" for name in curvkit.__all__} - {"curvkit.CurvkitError"} <= set(named)


def resolved(name: str) -> object:
    home, _, last = name.rpartition(".")
    return getattr(importlib.import_module(home), last)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=options, report=True)
    assert tried > 0
    assert failed == 0, "the examples that differ are in the captured output"


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("", "", True),
        ("", "a", False),
        ("a", "", False),
        ("a\nb", "a\nb\n\n", True),
        ("a", "a   ", True),
        ("a", " a", False),
        ("a", "ab", False),
        ("a.c", "abc", False),
        ("1 ... 3", "1 2 3", True),
        ("1 ... 3", "1 2 3 4", False),
        ("x = ...", "x = 0.123", True),
        ("...s", "0.123 s", True),
        ("...", "", True),
        ("...", "a\nb", True),
        ("a\n...", "a", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nb\nc", False),
        ("...\nb\n...\nb", "a\nb\nc\nb", True),
        ("...\nb\nc", "b\nb\nc", True),
        ("...\nc\n...", "a\nb", False),
        ("a\n...\nb", "b\na", False),
    ],
)
def test_output_matches(expected: str, actual: str, same: bool):
    assert pages.matches(tuple(expected.splitlines()), tuple(actual.splitlines())) is same


SOUND_PAGE = """
# Title

```python
import pathlib
x = 2
pathlib.Path("a.txt").write_text("first\\nsecond")
```

```console
$ cat a.txt
first
se...nd
$ echo $((20 + \\
> 1)) > b.txt
$ false
$ echo $?
1
```

- an item

    ```python
    assert x * int(pathlib.Path("b.txt").read_text()) == 42
    ```

<!-- not run: needs a GPU -->
```python
raise SystemExit
```

```bash
false
```

```
$ plain text
```
"""


def test_page_in_order_and_in_one_namespace(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(SOUND_PAGE)
    ran = run_page(page, tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```python\nx = 1\nassert x == 2, 'two'\n```\n", "AssertionError: two"),
        ("```python\nimport warnings\nwarnings.warn('old')\n```\n", "UserWarning: old"),
        ("```python\nraise SystemExit(0)\n```\n", "the python block at line 2 failed"),
        (
            "```python\nx = 1\n```\n```console\n$ echo a\nb\n```\n",
            "line 5: $ echo a\n(- on the page, + printed)\n- b\n+ a",
        ),
        ("```console\n$ echo a\n```\n", "+ a"),
        ("```console\n$ echo a >&2\n```\n", "+ a"),
        ("```console\n$ false\n```\n", "exit code 1; follow it with"),
        ("```console\necho a\n```\n", "a console block starts with '$ '"),
        ("```python\nx = 1\n", "the block is not closed"),
        ("```py\nx = 1\n```\n", "write python for py"),
        ("<!-- not run -->\n```python\nx = 1\n```\n", "write <!-- not run: reason -->"),
        ("<!-- not run: slow -->\n\n```python\nx = 1\n```\n", "stands before no block"),
        ("<!-- not run: slow -->\n```bash\nls\n```\n", "a bash block never runs"),
        ('```python\n--8<-- "tests/pages.py"\n```\n', "tests/pages.py is not a file of examples/"),
    ],
)
def test_planted_page_fault_is_found(text: str, fault: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(text)
    ran = run_page(page, tmp_path)
    assert ran.returncode == 1
    assert fault in ran.stderr
