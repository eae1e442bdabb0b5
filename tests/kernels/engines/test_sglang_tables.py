"""Tuned tables: named as the engine looks them up, refused by name when malformed, made shape by shape and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.kernels.engines import sglang_tables as tables
from glmplan.kernels.engines import sglang_tune as tuner

GOOD = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
NAME = tables.file_name(512, 1024, "NVIDIA GeForce RTX 4090")


def table(folder: Path, content: object, name: str = NAME) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_good_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = table(tmp_path, {"1": GOOD, "64": GOOD})
    monkeypatch.setenv("GLMPLAN_TUNED_DIR", str(tmp_path))
    tables.require_readable()
    assert tables.read_table(path) == {1: GOOD, 64: GOOD}
    assert tables.NAME.fullmatch(path.name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ([], "not a dictionary"),
        ({}, "not a dictionary"),
        ({"0": GOOD}, "key '0'"),
        ({"many": GOOD}, "key 'many'"),
        ({"\u00b2": GOOD}, "key '\u00b2'"),
        ("[" * 100_000, "cannot be read"),
        ({"1": {**GOOD, "SPLIT_K": 2}}, "M=1 not exactly"),
        ({"1": {key: GOOD[key] for key in list(GOOD)[1:]}}, "M=1 not exactly"),
        ({"1": {**GOOD, "num_warps": 3}}, "num_warps=3"),
        ({"1": {**GOOD, "num_stages": True}}, "num_stages=True"),
        ({"1": {**GOOD, "BLOCK_SIZE_M": "16"}}, "BLOCK_SIZE_M='16'"),
    ],
)
def test_a_malformed_table_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, said: str):
    path = table(tmp_path, content)
    monkeypatch.setenv("GLMPLAN_TUNED_DIR", str(tmp_path))
    with pytest.raises(UsageError) as refused:
        tables.require_readable()
    assert str(path) in refused.value.message
    assert said in refused.value.message


def test_a_folder_that_is_none_and_a_name_that_is_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLMPLAN_TUNED_DIR", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="not a folder"):
        tables.require_readable()
    monkeypatch.setenv("GLMPLAN_TUNED_DIR", str(tmp_path))
    table(tmp_path, {"1": GOOD}, "some.json")
    with pytest.raises(UsageError, match=r"some\.json"):
        tables.require_readable()
    monkeypatch.setenv("GLMPLAN_TUNED_DIR", " ")
    tables.require_readable()


def test_shapes_of_every_tp_size_are_blocks_and_distinct():
    for tp_size in tuner.TP_SIZES:
        found = tuner.shapes(tp_size, "0.5.23")
        assert len({(shape.n, shape.k) for shape in found}) == len(found)
        assert all(shape.k % 128 == 0 for shape in found)
    assert ("o_proj", 6144, 2048) in tuner.shapes(8, "0.5.23")
    assert len(tuner.shapes(8, "0.5.13.post1")) == len(tuner.shapes(8, "0.5.23")) + 1
    with pytest.raises(UsageError, match="TP size is 6"):
        tuner.shapes(6, "0.5.23")


def test_the_search_finds_the_fastest_and_times_nothing_that_cannot_fit():
    best = {**GOOD, "BLOCK_SIZE_M": 32, "num_stages": 4, "GROUP_SIZE_M": 32}
    timed: list[dict[str, int]] = []

    def time_us(config: dict[str, int]) -> float:
        timed.append(config)
        return 10.0 + sum(abs(config[name] - best[name]) / best[name] for name in best)

    found, took = tuner.search(64, 101_376, time_us)
    assert (found, took) == (best, 10.0)
    assert all(tuner.shared_need(config) <= 101_376 for config in timed)
    assert len(timed) < 80


def test_what_is_timed_was_compiled_ahead_and_tiles_of_which_none_runs_are_told():
    ahead: list[dict[str, int]] = []

    def time_us(config: dict[str, int]) -> float:
        assert config in ahead
        return float("inf")

    with pytest.raises(UnsupportedError, match="with 64 rows"):
        tuner.search(64, 101_376, time_us, quick=True, ahead=ahead.extend)
    assert len(ahead) == len(set(map(str, ahead)))


def test_few_rows_get_low_tiles():
    assert {config["BLOCK_SIZE_M"] for config in tuner.candidates(1, 10**6)} == {16}
    assert {config["BLOCK_SIZE_K"] for config in tuner.candidates(1, 10**6)} == {128}
    assert {config["BLOCK_SIZE_K"] for config in tuner.candidates(1, 10**6, 64)} == {64, 128}


class Pretended:
    """A bench whose kernel is fastest with GOOD, and slower than its default nowhere."""

    device_name, shared_bytes, smallest_k = "A GPU", 101_376, 128
    setting: ClassVar[dict[str, str]] = {}
    default = None
    made = 0

    def case(self, shape: tuner.Shape, rows: int) -> Pretended:
        Pretended.made += 1
        return self

    def compile_ahead(self, wanted: Sequence[dict[str, int]]) -> None:
        self.ahead = list(wanted)

    def time_us(self, config: dict[str, int] | None) -> float:
        assert config is None or config in self.ahead
        return 50.0 if config is None else 20.0 if config == GOOD else 30.0

    def require_agreement(self, config: dict[str, int]) -> None:
        pass


def test_tables_are_written_whole_and_kept(tmp_path: Path):
    asked = [tuner.Shape("a", 512, 1024), tuner.Shape("b", 1024, 512)]
    events = list(tuner.tune(asked, tmp_path, (1, 64), Pretended()))
    assert [event.kind for event in events] == ["shape", "rows", "rows", "done"] * 2
    path = tmp_path / tables.file_name(512, 1024, "A GPU")
    assert tables.read_table(path) == {1: GOOD, 64: GOOD}
    gains: dict[str, Any] = json.loads((tmp_path / "gains" / path.name).read_text())
    assert gains["gains"]["64"] == {"default_us": 50.0, "tuned_us": 20.0}
    made = Pretended.made
    assert [event.kind for event in tuner.tune(asked, tmp_path, (1, 64), Pretended())] == ["kept", "kept"]
    assert Pretended.made == made
    assert not list(tmp_path.glob("**/.tune-*"))


def test_a_default_that_no_table_may_hold_is_not_written_where_it_is_faster(tmp_path: Path):
    """0.5.23 ships tables with SPLIT_K and SWAP_AB for Hopper."""

    class Faster(Pretended):
        default = GOOD | {"SPLIT_K": 2}

        def time_us(self, config: dict[str, int] | None) -> float:
            return 10.0 if config is None else super().time_us(config)

    *_, rows, _ = tuner.tune([tuner.Shape("a", 512, 1024)], tmp_path, (1,), Faster())
    assert (rows.config, rows.default_us, rows.tuned_us) == (GOOD, 10.0, 20.0)
    assert tables.read_table(tmp_path / tables.file_name(512, 1024, "A GPU")) == {1: GOOD}
    Faster.default = GOOD | {"num_stages": 4}
    *_, rows, _ = tuner.tune([tuner.Shape("b", 512, 128)], tmp_path, (1,), Faster())
    assert (rows.config, rows.tuned_us) == (Faster.default, 10.0)


def test_more_rows_are_added_to_a_table_and_only_those_are_measured(tmp_path: Path):
    asked = [tuner.Shape("a", 512, 1024)]
    list(tuner.tune(asked, tmp_path, (1, 64), Pretended()))
    made = Pretended.made
    assert [event.rows for event in tuner.tune(asked, tmp_path, (1, 2), Pretended())] == [None, 2, None]
    assert Pretended.made == made + 1
    path = tmp_path / tables.file_name(512, 1024, "A GPU")
    assert set(tables.read_table(path)) == {1, 2, 64}
    assert set(json.loads((tmp_path / "gains" / path.name).read_text())["gains"]) == {"1", "2", "64"}


def test_a_full_search_replaces_the_rows_of_a_quick_one_and_not_the_other_way(tmp_path: Path):
    asked = [tuner.Shape("a", 512, 1024)]

    def rows(quick: bool, *wanted: int) -> list[int]:
        events = list(tuner.tune(asked, tmp_path, wanted, Pretended(), quick=quick))
        return [event.rows for event in events if event.rows is not None]

    assert rows(True, 1, 2) == [1, 2]
    assert rows(True, 1, 2) == []
    assert rows(False, 1, 4) == [1, 4]
    assert rows(True, 1, 4) == []
    assert rows(False, 1, 2, 4) == [2], "the row that was still a quick one"


@pytest.mark.parametrize("gains", ["{", "[]", '{"gains": 1}', '{"gains": {"x": {"search": "quick"}, "1": 3}}'])
def test_damaged_gains_are_as_none(tmp_path: Path, gains: str):
    asked = [tuner.Shape("a", 512, 1024)]
    list(tuner.tune(asked, tmp_path, (1,), Pretended()))
    (tmp_path / "gains" / tables.file_name(512, 1024, "A GPU")).write_text(gains)
    assert [event.kind for event in tuner.tune(asked, tmp_path, (1,), Pretended())] == ["kept"]


@pytest.mark.parametrize("text", ["", "2624", "2624x6144", "a,b", "0,128", "\u00b2,128", "9" * 5000 + ",128", "1,2,3"])
def test_a_shape_that_is_none_is_refused(text: str):
    with pytest.raises(UsageError, match="not a shape"):
        tuner.parse_shape(text)


def test_rows_are_numbers_in_order():
    assert tuner.parse_rows("256,1,16,1") == (1, 16, 256)
    for text in ("", "1,", "-1", "0", " 1", "\u00b2", "9" * 5000):
        with pytest.raises(UsageError, match="are not row counts"):
            tuner.parse_rows(text)


def test_without_the_engine_nothing_is_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("sys.modules", {**__import__("sys").modules, "sglang": None, "sglang.version": None})
    assert tuner.main(["--out", str(tmp_path)]) == 4
    assert "SGLang is not installed here." in capsys.readouterr().err
