"""A model folder judged against its own index and headers, on real safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmplan.facts.system import ModelFiles
from glmplan.node.model_files import model_files
from tests.facts.files import write_index, write_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model of three files."""
    shards = {f"layer.{number}": f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    for tensor, name in shards.items():
        write_safetensors(tmp_path / name, {tensor: 5000})
    write_index(tmp_path, shards, 15000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def judged(folder: Path | str) -> ModelFiles:
    return ModelFiles.model_validate(model_files(str(folder)))


def test_a_whole_model_is_complete(folder: Path) -> None:
    found = judged(folder)
    assert found.complete
    assert (found.files_expected, found.files_present, found.missing, found.wrong) == (3, 3, (), ())
    assert found.bytes_present == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert found.tokenizer


def test_a_file_that_the_index_names_is_missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = judged(folder)
    assert not found.complete
    assert (found.files_expected, found.files_present) == (3, 2)
    assert found.missing == ("model-00002-of-00003.safetensors",)


def test_one_byte_short_is_wrong_with_both_sizes(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 1)
    assert judged(folder).wrong == (f"{path.name}: {size - 1:,} bytes, its header promises {size:,}",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "hold no whole safetensors header"),
        (b"\xff" * 64, "hold no whole safetensors header"),
        ((2).to_bytes(8, "little") + b"{]", "not safetensors JSON"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "not safetensors JSON"),
    ],
)
def test_what_is_no_safetensors_is_wrong(folder: Path, content: bytes, words: str) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(content)
    found = judged(folder)
    assert words in found.wrong[0]
    assert not found.complete


def test_a_broken_index_is_wrong(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json: cannot be read" in judged(folder).wrong[0]


def test_a_model_of_one_file_needs_no_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": 10})
    (tmp_path / "config.json").write_text("{}")
    found = judged(tmp_path)
    assert found.complete
    assert (found.files_expected, found.files_present, found.tokenizer) == (None, 1, False)


def test_a_config_that_is_no_object_does_not_count(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert not judged(folder).complete


def test_an_empty_folder_and_no_folder_are_not_complete(tmp_path: Path) -> None:
    assert not judged(tmp_path).complete
    assert judged(tmp_path).exists
    assert judged(tmp_path / "none") == ModelFiles(path=str(tmp_path / "none"))


def test_digests_tell_two_versions_apart(folder: Path) -> None:
    first = judged(folder)
    assert judged(folder).index_digest == first.index_digest
    (folder / "config.json").write_text('{"a": 1}')
    second = judged(folder)
    assert second.config_digest != first.config_digest
    assert second.index_digest == first.index_digest


def test_only_the_first_files_of_a_kind_are_named(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{number}": f"{number:02}.safetensors" for number in range(40)})
    found = judged(tmp_path)
    assert len(found.missing) == 5
    assert (found.files_expected, found.files_present) == (40, 0)


def test_an_index_that_points_outside_its_folder_is_kept_inside(tmp_path: Path) -> None:
    write_index(tmp_path, {"t": "../../etc/passwd"})
    assert judged(tmp_path).missing == ("passwd",)


def test_a_repository_is_looked_up_in_the_cache(folder: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path_factory.mktemp("hub")
    cached = hub / "models--zai-org--GLM-5.2-FP8"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "abc123").symlink_to(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert judged("zai-org/GLM-5.2-FP8").complete
    assert not judged("zai-org/GLM-5.1-FP8").exists
    (cached / "refs" / "main").unlink()
    assert not judged("zai-org/GLM-5.2-FP8").exists


def test_answers_are_json(folder: Path) -> None:
    assert json.loads(json.dumps(model_files(str(folder))))["files_present"] == 3
