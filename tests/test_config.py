"""Which configuration belongs to a checkpoint, what it may say, and what only the command line may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvkit.errors import InvalidArgument, RefusedCheckpoint
from curvkit.resolving.config import Config, find_config, read_config
from curvkit.resolving.projects import project_root

TEXT = 'objective = "train.py:objective"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a configuration and a checkpoint below it; the home directory lies elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "project"
    for folder in (root / ".git", root / "runs" / "first", tmp_path / "home"):
        folder.mkdir(parents=True)
    (root / "runs" / "first" / "ckpt.pt").write_bytes(b"")
    (root / "curvkit.toml").write_text(TEXT)
    return root


def written(path: Path, text: str = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- which file ------------------------------------------------------------------------------------------------------


def test_the_nearest_file_upward_from_the_checkpoint(project: Path):
    checkpoint = project / "runs" / "first" / "ckpt.pt"
    for folder in (project, project / "runs", project / "runs" / "first"):
        path = written(folder / "curvkit.toml")
        found = find_config(checkpoint, None, project)
        assert found is not None
        assert found.path == path
        assert found.directory == folder


def test_a_checkpoint_that_is_a_directory_may_hold_it(project: Path):
    path = written(project / "runs" / "first" / "curvkit.toml")
    found = find_config(project / "runs" / "first", None, project)
    assert found is not None
    assert found.path == path


def test_a_relative_checkpoint(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project / "runs")
    found = find_config(Path("first/ckpt.pt"), None, Path.cwd())
    assert found is not None
    assert found.path == project / "curvkit.toml"


def test_pyproject_counts_if_it_speaks_of_curvkit_and_a_file_of_its_own_wins(project: Path):
    checkpoint, runs = project / "runs" / "first" / "ckpt.pt", project / "runs"
    shared = written(runs / "pyproject.toml", '[tool.other]\nobjective = "x"\n')
    assert find_config(checkpoint, None, project) == read_config(project / "curvkit.toml")
    shared.write_text('[tool.curvkit]\nobjective = "shared:objective"\n')
    found = find_config(checkpoint, None, project)
    assert found is not None
    assert (found.path, found.objective) == (shared, "shared:objective")
    own = written(runs / "curvkit.toml")
    assert find_config(checkpoint, None, project) == read_config(own)


def test_a_broken_pyproject_of_another_tool_does_not_matter(project: Path):
    shared = written(project / "runs" / "pyproject.toml", "[tool.other\n")
    assert find_config(project / "runs" / "first" / "ckpt.pt", None, project) == read_config(project / "curvkit.toml")
    shared.write_text("[tool.curvkit]\nobjective = \n")
    with pytest.raises(InvalidArgument, match=r"pyproject\.toml: not valid TOML: .+ Correct it, or name another"):
        find_config(project / "runs" / "first" / "ckpt.pt", None, project)


def test_the_search_ends_at_a_repository(tmp_path: Path, project: Path):
    (project / "curvkit.toml").unlink()
    written(tmp_path / "curvkit.toml")
    assert find_config(project / "runs" / "first" / "ckpt.pt", None, project) is None


def test_the_search_ends_at_the_home_directory(tmp_path: Path, project: Path):
    home = tmp_path / "home"
    (home / "work").mkdir()
    written(tmp_path / "curvkit.toml")
    assert find_config(home / "work" / "ckpt.pt", None, home / "work") is None


def test_a_checkpoint_elsewhere_is_measured_with_the_configuration_of_the_project(tmp_path: Path, project: Path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / ".git").mkdir()
    found = find_config(scratch / "ckpt.pt", None, project / "runs")
    assert found is not None
    assert found.path == project / "curvkit.toml"


def test_none(tmp_path: Path, project: Path):
    (project / "curvkit.toml").unlink()
    assert find_config(project / "runs" / "first" / "ckpt.pt", None, project) is None


# ---- trust -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def download(tmp_path: Path, project: Path) -> Path:
    """A directory as it was unpacked somewhere else, with a configuration that names code."""
    (project / "curvkit.toml").unlink()
    written(tmp_path / "download" / "curvkit.toml", 'objective = "evil.py:objective"\n')
    return tmp_path / "download"


def test_a_configuration_beside_a_foreign_checkpoint_is_refused(project: Path, download: Path):
    with pytest.raises(RefusedCheckpoint) as caught:
        find_config(download / "ckpt.pt", None, project)
    path = download / "curvkit.toml"
    assert str(caught.value) == (
        f"{path}: this configuration lies outside of the current project ({project}). It may choose which code is run, so it is not "
        f"used unasked. If it is yours: -c {path}; to measure without it: --no-config."
    )


def test_it_is_used_if_it_is_named_or_the_checkpoint_trusted(project: Path, download: Path):
    path = download / "curvkit.toml"
    for found in (
        find_config(download / "ckpt.pt", path, project),
        find_config(download / "ckpt.pt", None, project, trusted=True),
        find_config(download / "ckpt.pt", None, download),
    ):
        assert found is not None
        assert found.objective == "evil.py:objective"


def test_the_configuration_of_the_project_wins_over_a_foreign_one(project: Path, download: Path):
    own = written(project / "curvkit.toml")
    assert find_config(download / "ckpt.pt", None, project) == read_config(own)


def test_a_foreign_pyproject_is_refused_too(project: Path, download: Path):
    (download / "curvkit.toml").rename(download / "moved.txt")
    written(download / "pyproject.toml", '[tool.curvkit]\nobjective = "evil:objective"\n')
    with pytest.raises(RefusedCheckpoint, match=r"pyproject\.toml: this configuration lies outside"):
        find_config(download, None, project)


@pytest.mark.parametrize("name", ["link", "runs/../../download", "runs/link/../link"])
def test_neither_a_symlink_nor_dots_make_it_ones_own(project: Path, download: Path, name: str):
    (project / "link").symlink_to(download)
    (project / "runs" / "link").symlink_to(download)
    with pytest.raises(RefusedCheckpoint, match="outside of the current project"):
        find_config(project / name / "ckpt.pt", None, project)


def test_what_lies_above_the_current_directory_is_no_project(tmp_path: Path, project: Path):
    """On a shared machine /tmp/curvkit.toml is anybody's."""
    (tmp_path / "work").mkdir()
    written(tmp_path / "curvkit.toml")
    with pytest.raises(RefusedCheckpoint, match="outside of the current project"):
        find_config(tmp_path / "work" / "ckpt.pt", None, tmp_path / "work")


def test_a_repository_of_the_home_directory_makes_no_project_of_it(tmp_path: Path, project: Path):
    home = tmp_path / "home"
    (home / ".git").mkdir()
    (home / "work").mkdir()
    assert project_root(home / "work") == home / "work"
    assert project_root(project / "runs" / "first") == project
    written(home / "downloads" / "curvkit.toml")
    with pytest.raises(RefusedCheckpoint, match="outside of the current project"):
        find_config(home / "downloads" / "ckpt.pt", None, home / "work")


def test_below_a_directory_that_is_no_repository_a_configuration_may_be_a_download(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
):
    for here in (tmp_path / "home", tmp_path / "plain"):
        path = written(here / "downloads" / "model" / "curvkit.toml", 'objective = "evil.py:objective"\n')
        monkeypatch.chdir(here)
        for checkpoint in (path.parent / "ckpt.pt", Path("downloads/model/ckpt.pt"), path.parent):
            with pytest.raises(RefusedCheckpoint) as caught:
                find_config(checkpoint, None, here)
            assert str(caught.value) == (
                f"{path}: this configuration lies below the current directory, {here}, which is no repository, so that it may be part of "
                "a download. It may choose which code is run, so it is not used unasked. "
                f"If it is yours: -c {path}; to measure without it: --no-config."
            )
            assert find_config(checkpoint, path, here) == read_config(path)
            assert find_config(checkpoint, None, here, trusted=True) == read_config(path)
        own = written(here / "curvkit.toml")
        assert find_config(path.parent / "ckpt.pt", None, here) == read_config(own)
    (tmp_path / "plain" / ".git").mkdir()
    found = find_config(tmp_path / "plain" / "downloads" / "model", None, tmp_path / "plain")
    assert found is not None  # what is unpacked inside of a repository counts as its own


def test_the_root_of_the_file_system_is_no_project(project: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("config", "projects"):
        monkeypatch.setattr(f"curvkit.resolving.{module}.is_repository", lambda directory: directory == Path("/"))
    path = written(project / "runs" / "curvkit.toml")
    with pytest.raises(RefusedCheckpoint, match="below the current directory, /, which is no repository"):
        find_config(path.parent / "first" / "ckpt.pt", None, Path("/"))


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_everything_that_may_stand_in_it(tmp_path: Path):
    path = written(
        tmp_path / "any.toml",
        'objective = "train:objective"\n[set]\nhidden = 128\np = 0.5\nname = "wide"\nflag = true\n'
        '[defaults]\nseed = 0\nmax-products = 50\n[defaults.trace]\nseed = 1\n"--by" = "param"\nparams = ["a.*"]\n',
    )
    config = read_config(path)
    assert config == Config(
        path,
        "train:objective",
        {"hidden": "128", "p": "0.5", "name": "wide", "flag": "true"},
        {"seed": 0, "max_products": 50, "trace": {"seed": 1, "by": "param", "params": ["a.*"]}},
    )
    assert config.for_command("sharpness") == {"seed": 0, "max_products": 50}
    assert config.for_command("trace") == {"seed": 1, "max_products": 50, "by": "param", "params": ["a.*"]}


def test_an_empty_file_says_nothing(tmp_path: Path):
    path = written(tmp_path / "curvkit.toml", "")
    assert read_config(path) == Config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objektive = 'a:b'", "unknown key 'objektive', nearest: 'objective'. The keys are objective, set, defaults."),
        ("trust = true", "unknown key 'trust'"),
        ("zzz = 1", "unknown key 'zzz'. The keys are objective, set, defaults."),
        ("objective = 3", 'objective = 3; write a text like "train.py:objective".'),
        ("objective = 'train.py'", "objective = 'train.py'; write a text like"),
        ("set = 3", "set = 3 must be a table: a line [set], below it one line per value."),
        ("defaults = []", "defaults = [] must be a table"),
        ("[set]\nlayers = [1, 2]", "[set] layers is a list; only text, numbers, true and false can be given to"),
        ("[set]\nday = 2020-01-01", "[set] day is a date; only text"),
        ("[defaults]\ntrust = true", "[defaults] sets 'trust', which opens a door for whatever file is measured."),
        ("[defaults]\ntrust = false", "Type --trust on the command line, where it is meant for one file."),
        ("[defaults.sharpness]\nallow = ['a.B']", "[defaults] sets 'allow', which opens a door"),
        ("[defaults.sharpness]\n'--Trust' = true", "[defaults] sets '--Trust', which opens a door"),
        ("objective = ", "not valid TOML: "),
        ("a = " + "[" * 5000, "not valid TOML: it is nested too deeply."),
        ("#" * (1 << 21), "larger than 1 MiB, which no configuration is."),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str):
    path = written(tmp_path / "curvkit.toml", text)
    with pytest.raises(InvalidArgument) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "curvkit.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument, match="not valid TOML"):
        read_config(path)


def test_a_pyproject_that_is_named_must_have_the_table(tmp_path: Path):
    path = written(tmp_path / "pyproject.toml", "tool = 3\n")
    with pytest.raises(
        InvalidArgument, match=r"it has no table \[tool\.curvkit\]\. Add one, or name another file with -c\."
    ):
        read_config(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InvalidArgument, match=r"the configuration cannot be read \(no such file or directory\)"):
        read_config(tmp_path / "nothing.toml")
    with pytest.raises(InvalidArgument, match=r"the configuration cannot be read \(is a directory\)"):
        read_config(tmp_path)


def test_an_unreadable_file(tmp_path: Path):
    path = written(tmp_path / "curvkit.toml")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(InvalidArgument, match="permission denied"):
        read_config(path)


def test_a_file_that_cannot_be_listed_or_is_no_file_is_passed_over(project: Path):
    os.mkfifo(project / "runs" / "curvkit.toml")  # reading it would wait for ever
    (project / "runs" / "first" / "curvkit.toml").mkdir()
    found = find_config(project / "runs" / "first" / "ckpt.pt", None, project)
    assert found is not None
    assert found.path == project / "curvkit.toml"


def test_torch_is_not_imported():
    script = "import sys; import curvkit.resolving.config; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0
