"""Headers of real files: bytes by tensor, and every way a download can be broken."""

from __future__ import annotations

import json
import os
import struct

import pytest

from glmplan.errors import UsageError
from glmplan.facts.safetensors import read_checkpoint, read_header
from tests.facts.files import write_index, write_safetensors

SIZES = {"lm_head.weight": 12, "model.norm.weight": 4, "model.embed_tokens.weight": 0}


def test_bytes_are_read_by_name(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", SIZES, {"format": "pt"})
    stored = read_checkpoint(tmp_path)
    assert stored is not None
    assert stored.bytes_by_name == SIZES
    assert stored.total_bytes == 16
    assert stored.files == 1


def test_all_shards_are_read_and_the_origin_says_headers(tmp_path):
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": 5})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"b": 7})
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, 999)
    stored = read_checkpoint(tmp_path)
    assert stored is not None
    assert stored.bytes_by_name == {"a": 5, "b": 7}
    assert stored.total_bytes == 12, "headers win over the index's total"
    assert "headers" in stored.origin
    assert "2 files" in stored.origin


def test_metadata_is_no_tensor(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {}, {"format": "pt"})
    assert read_header(path) == {"__metadata__": {"format": "pt"}}


def test_the_index_alone_gives_its_total(tmp_path):
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"}, 4096)
    stored = read_checkpoint(tmp_path)
    assert stored is not None
    assert stored.total_bytes == 4096
    assert stored.bytes_by_name == {}
    assert stored.files == 0
    assert "index" in stored.origin


@pytest.mark.parametrize("total", [None, 0])
def test_an_index_without_a_total_says_nothing(tmp_path, total):
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"}, total)
    assert read_checkpoint(tmp_path) is None


def test_an_empty_folder_says_nothing(tmp_path):
    assert read_checkpoint(tmp_path) is None


def test_a_missing_shard_is_named(tmp_path):
    write_safetensors(tmp_path / "model-00001-of-00003.safetensors", {"a": 5})
    write_index(tmp_path, {letter: f"model-0000{n}-of-00003.safetensors" for n, letter in enumerate("abc", 1)})
    with pytest.raises(UsageError, match=r"lacks 2 of 3 shards.*model-00002-of-00003") as raised:
        read_checkpoint(tmp_path)
    assert raised.value.next_step == "Finish the download."


def test_incomplete_data_is_reported_with_both_ends(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", {"a": 5000})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UsageError, match="tensors end at byte 5,000 but 4,999 bytes follow"):
        read_checkpoint(tmp_path)


def test_a_truncated_header_is_reported_with_both_sizes(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", {"a": 5000})
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    os.truncate(path, 8 + length - 1)
    with pytest.raises(UsageError, match=rf"header claims {length} bytes and the file has {length + 7}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated or not safetensors"),
        (b"\x02\x00", "truncated or not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "truncated or not safetensors"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 8) + b'{"a":{}}', "data_offsets"),
        (struct.pack("<Q", 7) + b'{"a":5}', "data_offsets"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, problem):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 0, 0], ["a", 0]])
def test_offsets_that_are_not_a_pair_of_numbers_are_refused(tmp_path, offsets):
    text = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UsageError, match="data_offsets"):
        read_checkpoint(tmp_path)


def test_an_index_that_is_not_json_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UsageError, match=r"index\.json is not JSON"):
        read_checkpoint(tmp_path)


def test_files_the_index_does_not_name_are_not_counted(tmp_path):
    """Engines load what the index names; a consolidated copy beside the shards would count twice."""
    write_safetensors(tmp_path / "model-00001-of-00001.safetensors", {"a": 5})
    write_safetensors(tmp_path / "consolidated.safetensors", {"layers.0.a": 5})
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    stored = read_checkpoint(tmp_path)
    assert stored is not None
    assert stored.total_bytes == 5
