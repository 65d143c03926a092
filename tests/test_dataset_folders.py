"""Directories of datasets: no file that they name lies outside, and no row opens another file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.dataset_folders import open_rows

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEXTS = ["the cat", "sat on"]


@pytest.fixture(autouse=True)
def _no_bars():
    datasets.disable_progress_bars()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "table")
    datasets.Dataset.from_dict({"text": ["secret"]}).save_to_disk(tmp_path / "outside")
    return tmp_path / "table"


@pytest.fixture
def splits(tmp_path: Path, table: Path) -> Path:
    parts = {"train": datasets.Dataset.from_dict({"text": TEXTS})}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def named(folder: Path, name: Any) -> None:
    changed(folder / "state.json", lambda state: state["_data_files"][0].update(filename=name))


def test_rows_are_read(table: Path, splits: Path):
    assert list(open_rows(table, None)) == TEXTS
    assert list(open_rows(splits, None)) == TEXTS


OUTWARDS = "data-00000-of-00001.arrow"


@pytest.mark.parametrize("name", [f"../outside/{OUTWARDS}", "{folder}/outside/" + OUTWARDS, "/dev/zero", "absent", ""])
def test_tables_outside_of_the_directory(table: Path, splits: Path, name: str):
    name = name.format(folder=table.parent)
    for folder, path in ((table, table), (splits / "train", splits)):
        named(folder, name)
        with pytest.raises(RefusedCheckpoint, match=r"state\.json: "):
            open_rows(path, None)


def test_links_and_splits_outside_of_the_directory(table: Path, splits: Path, tmp_path: Path):
    (table / OUTWARDS).unlink()
    (table / OUTWARDS).symlink_to(tmp_path / "outside" / OUTWARDS)
    with pytest.raises(RefusedCheckpoint, match="is a link to"):
        open_rows(table, None)
    changed(splits / "dataset_dict.json", lambda content: content.update(splits=["../outside"]))
    with pytest.raises(RefusedCheckpoint, match="names the file"):
        open_rows(splits, None)


@pytest.mark.parametrize("content", ["[]", '{"splits": 3}', "{", '{"splits": [], "splits": []}'])
def test_descriptions_that_list_nothing(splits: Path, content: str):
    (splits / "dataset_dict.json").write_text(content)
    with pytest.raises(UnknownObjective, match=r"datasets cannot open it .*save_to_disk\('splits'\)"):
        open_rows(splits, None)


def test_damaged_states(table: Path):
    changed(table / "state.json", lambda state: state.update(_data_files=[3]))
    with pytest.raises(UnknownObjective, match=r"state.json or dataset_dict.json lists no files"):
        open_rows(table, None)


def test_a_picture_in_place_of_a_text_opens_no_file(table: Path, tmp_path: Path):
    """A column "text" of pictures is decoded by opening the path, or the address, that a row has."""
    rows = {"text": [{"path": str(tmp_path / "secret.png"), "bytes": None}]}
    features = datasets.Features({"text": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}})
    made = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "secret.png").write_bytes(b"anything")
    made.cast_column("text", datasets.Image()).save_to_disk(tmp_path / "pictures")
    with pytest.raises(UnknownObjective, match=r"the column 'text' is of the type Image, neither text nor ids"):
        open_rows(tmp_path / "pictures", None)
    made.save_to_disk(tmp_path / "plain")
    with pytest.raises(UnknownObjective, match=r"the column 'text' is of the type dict, neither text nor ids"):
        open_rows(tmp_path / "plain", None)
