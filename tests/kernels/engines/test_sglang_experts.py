"""Tables of experts: sizes per TP and EP, tiles that fit, both GEMMs of one height, rows that are kept, the lookup."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from glmplan.errors import UnsupportedError, UsageError
from glmplan.kernels import packed
from glmplan.kernels.engines import sglang_expert_tables as tables
from glmplan.kernels.engines import sglang_tune_experts as tuner
from glmplan.kernels.engines.sglang_tables import Config, read_table
from glmplan.kernels.engines.sglang_tune_compile import Ahead
from glmplan.kernels.engines.sglang_tune_steps import TP_SIZES, shared_need, tile

GLM = tuner.Experts("experts", 256, 256)
GIB = 1 << 30
PLACE = f"configs/triton_3_8_0/{tables.file_name(256, 256, 'NVIDIA GeForce RTX 4090')}"


def test_experts_of_every_tp_size_are_whole_blocks():
    for tp_size in TP_SIZES:
        (found,) = tuner.expert_shapes(tp_size, 1, 89)
        assert (found.experts, found.n * tp_size, found.top_k) == (256, 2048, 8)
        assert found.n % 128 == 0
    with pytest.raises(UsageError, match="TP size is 6"):
        tuner.expert_shapes(6, 1, 89)


def test_expert_parallel_ranks_hold_fewer_and_wider_experts():
    (found,) = tuner.expert_shapes(8, 4, 90)
    assert (found.experts, found.n, found.total, found.top_k) == (64, 1024, 256, 8)
    for ep_size in (0, 3, 16):
        with pytest.raises(UsageError, match="EP size"):
            tuner.expert_shapes(8, ep_size, 90)


@pytest.mark.parametrize(("sm", "experts", "top_k"), [(89, 256, 8), (120, 256, 8), (90, 257, 9), (100, 257, 9)])
def test_the_shared_expert_is_among_them_where_launch_leaves_it_fused(sm: int, experts: int, top_k: int):
    (found,) = tuner.expert_shapes(8, 1, sm)
    assert (found.experts, found.top_k, found.total) == (experts, top_k, experts)
    assert found.fused == experts - 256


def test_experts_in_words():
    assert tuner.parse_experts("256,256") == tuner.Experts("256,256", 256, 256, 6144, 8, 256)
    assert tuner.parse_experts("257,256")[4] == 9
    assert tuner.parse_experts("16,512,1024,4")[1:] == (16, 512, 1024, 4, 16)
    for text in ("", "256", "256,100", "0,128", "a,b", "4,128,256,8", "256,256,6144"):
        with pytest.raises(UsageError, match="experts"):
            tuner.parse_experts(text)


def test_one_layer_is_as_large_as_the_model_says():
    assert tuner.Experts("", 256, 2048).weight_bytes() == pytest.approx(9663.7e6, rel=1e-3)
    assert GLM.weight_bytes() + GLM.work_bytes(4096) < 6 * GIB


@pytest.mark.parametrize(("rows", "heights"), [(1, {16}), (64, {16}), (512, {16, 32, 64}), (4096, {32, 64, 128})])
def test_tiles_are_as_high_as_an_expert_has_tokens(rows: int, heights: set[int]):
    found = tuner.expert_candidates(rows, GLM, 232_448)
    assert {config["BLOCK_SIZE_M"] for config in found} == heights
    assert all(128 % config["BLOCK_SIZE_K"] == 0 for config in found), "one scale a step"
    quick = tuner.expert_candidates(rows, GLM, 232_448, quick=True)
    assert set(map(str, quick)) <= set(map(str, found))
    assert 0 < len(quick) <= 8


def test_tiles_fit_the_shared_memory():
    small = tuner.expert_candidates(4096, GLM, 50_000)
    assert small
    assert all(shared_need(config) <= 50_000 for config in small)
    assert len(small) < len(tuner.expert_candidates(4096, GLM, 232_448))


class Pretended:
    """Both GEMMs have a best tile of their own, of different heights; together the height of `up` wins."""

    kept_default: ClassVar[tuple[Config, Config] | None] = None
    made: ClassVar[list[int]] = []
    up, down = tile(32, 128, 128, 4) | {"num_stages": 4}, tile(64, 64, 64, 4)
    slow = 50.0

    def __init__(self, rows: int = 0) -> None:
        self.ahead: list[tuple[str, Config]] = []
        self.timed: list[tuple[str, Config]] = []
        Pretended.made.append(rows)

    def compile_ahead(self, wanted: list[tuple[str, Config]]) -> None:
        self.ahead += wanted

    def time_us(self, part: str, config: Config) -> float:
        assert (part, config) in self.ahead
        self.timed.append((part, config))
        best = self.up if part == "up" else self.down
        height = abs(config["BLOCK_SIZE_M"] - best["BLOCK_SIZE_M"]) * (2 if part == "up" else 0.1)
        rest = sum(abs(config[name] - best[name]) / best[name] for name in best if name != "BLOCK_SIZE_M")
        return 10.0 + height + rest

    def pair_us(self, configs: tuple[Config, Config] | None) -> float:
        if configs is None:
            return self.slow
        return sum(self.time_us(part, config) for part, config in zip(tuner.PARTS, configs, strict=True))


class Compiler:
    """A kernel and Triton's mode for compiling in threads."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def AsyncCompileMode(self, threads: object, ignore_errors: bool) -> Any:
        self.said.append("in threads")
        return contextlib.nullcontext()

    def warmup(self, *arguments: object, grid: object, **words: object) -> None:
        self.said.append((arguments, grid, words))

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: self.said.append("run")


def test_compiling_ahead_runs_nothing_and_is_given_up_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kernel = Compiler()
    monkeypatch.setitem(sys.modules, "triton", kernel)
    module = SimpleNamespace(kernel=kernel)
    ahead = Ahead(module, "kernel")
    ahead.compile(lambda: module.kernel[7](1, BLOCK=2))
    assert kernel.said == ["in threads", ((1,), 7, {"BLOCK": 2})]
    ahead.compile(lambda: module.nothing)
    assert "Compiling one by one, because compiling ahead failed: AttributeError" in capsys.readouterr().err
    ahead.compile(lambda: module.kernel[7](1))
    assert len(kernel.said) == 3
    module.kernel[7](1)
    assert kernel.said[-1] == "run"


def test_both_gemms_get_their_best_tile_of_one_height():
    case = Pretended()
    up, down = tuner.search_experts(case, 2048, GLM, 232_448)
    assert up == Pretended.up
    assert down == Pretended.down | {"BLOCK_SIZE_M": 32}
    assert len(case.timed) == len({(part, str(config)) for part, config in case.timed}), "none is timed twice"


def test_a_tile_that_cannot_run_is_not_chosen_and_none_at_all_is_said():
    class Small(Pretended):
        def time_us(self, part: str, config: Config) -> float:
            known = super().time_us(part, config)
            return known if part == "down" or config["BLOCK_SIZE_M"] == 64 else float("inf")

    up, down = tuner.search_experts(Small(), 2048, GLM, 232_448)
    assert (up["BLOCK_SIZE_M"], down["BLOCK_SIZE_M"]) == (64, 64)

    class None_(Pretended):
        def time_us(self, part: str, config: Config) -> float:
            return float("inf")

    with pytest.raises(UnsupportedError, match="No tile sizes"):
        tuner.search_experts(None_(), 16, GLM, 232_448)


class Bench:
    device_name, shared_bytes, folder = "A GPU", 232_448, "configs/triton_3_8_0"
    setting: ClassVar[dict[str, str]] = {"gpu": "A GPU"}
    case: ClassVar[Any] = Pretended

    def layer(self, shape: tuner.Experts, most_rows: int) -> Any:
        return SimpleNamespace(case=self.case)


def tuned(out: Path, rows: tuple[int, ...], bench: Any = None) -> list[Any]:
    return list(tuner.tune_experts([GLM], out, rows, bench or Bench(), 8, 9))


def test_two_tables_appear_whole_and_are_kept(tmp_path: Path):
    events = tuned(tmp_path, (1, 256))
    assert [(event.kind, event.step, event.steps) for event in events] == [
        ("shape", 9, 9), ("rows", 9, 9), ("rows", 9, 9), ("done", 9, 9),
    ]  # fmt: skip
    path = tmp_path / "configs/triton_3_8_0" / tables.file_name(256, 256, "A GPU")
    assert set(read_table(path)) == set(read_table(path.with_name(tables.down_of(path.name)))) == {1, 256}
    gains = json.loads((tmp_path / "gains" / path.relative_to(tmp_path)).read_text())
    assert gains["setting"] == {"gpu": "A GPU", "search": "full"}
    assert gains["gains"]["256"]["default_us"] == 50.0
    made = len(Pretended.made)
    assert [event.kind for event in tuned(tmp_path, (256,))] == ["kept"]
    assert len(Pretended.made) == made
    path.with_name(tables.down_of(path.name)).unlink()
    assert [event.kind for event in tuned(tmp_path, (1, 256))][-1] == "done"
    assert len(Pretended.made) == made, "its rows were known"


def test_rows_that_are_done_survive_a_crash_and_other_settings_do_not(tmp_path: Path):
    class Broken(Bench):
        def layer(self, shape: tuner.Experts, most_rows: int) -> Any:
            def case(rows: int) -> Any:
                if rows == 64:
                    raise RuntimeError("the GPU fell off the bus")
                return Pretended(rows)

            return SimpleNamespace(case=case)

    with pytest.raises(RuntimeError):
        tuned(tmp_path, (1, 64), Broken())
    assert not list(tmp_path.rglob("configs/*/E=*.json"))
    Pretended.made.clear()
    assert [event.kind for event in tuned(tmp_path, (1, 64))] == ["shape", "rows", "rows", "done"]
    assert Pretended.made == [64]
    other = Bench()
    other.setting = {"gpu": "A GPU", "sglang": "another"}  # type: ignore[misc]
    (tmp_path / "configs/triton_3_8_0" / tables.file_name(256, 256, "A GPU")).unlink()
    Pretended.made.clear()
    tuned(tmp_path, (1, 64), other)
    assert Pretended.made == [1, 64]


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.pop("up"),
        lambda row: row["down"].update(BLOCK_SIZE_M=5),
        lambda row: row["up"].update(num_warps=True),
        lambda row: row.update(default_us="1"),
        lambda row: row.update(tuned_us=float("nan")),
    ],
)
def test_rows_of_a_damaged_file_are_measured_again(tmp_path: Path, damage: Any):
    tuned(tmp_path, (1, 64))
    path = tmp_path / "configs/triton_3_8_0" / tables.file_name(256, 256, "A GPU")
    path.unlink()
    partial = tmp_path / "partial" / path.relative_to(tmp_path).with_name(f"{path.name}.part")
    known = json.loads(partial.read_text())
    damage(known["rows"]["64"])
    partial.write_text(json.dumps(known))
    Pretended.made.clear()
    assert [event.kind for event in tuned(tmp_path, (1, 64))] == ["shape", "rows", "rows", "done"]
    assert Pretended.made == [64]


def test_more_rows_are_added_to_both_tables(tmp_path: Path):
    tuned(tmp_path, (1, 64))
    (tmp_path / "partial").rename(tmp_path / "gone")
    Pretended.made.clear()
    tuned(tmp_path, (64, 256))
    assert Pretended.made == [256]
    path = tmp_path / "configs/triton_3_8_0" / tables.file_name(256, 256, "A GPU")
    assert set(read_table(path)) == set(read_table(path.with_name(tables.down_of(path.name)))) == {1, 64, 256}
    assert set(json.loads((tmp_path / "gains" / path.relative_to(tmp_path)).read_text())["gains"]) == {"1", "64", "256"}


def test_the_default_is_kept_where_nothing_is_faster(tmp_path: Path):
    class Fast(Pretended):
        slow = 5.0
        kept_default = (tile(64, 128, 128, 4), tile(64, 128, 128, 8))

    bench = Bench()
    bench.case = Fast  # type: ignore[misc]
    tuned(tmp_path, (256,), bench)
    path = tmp_path / "configs/triton_3_8_0" / tables.file_name(256, 256, "A GPU")
    assert read_table(path) == {256: tile(64, 128, 128, 4)}
    assert read_table(path.with_name(tables.down_of(path.name))) == {256: tile(64, 128, 128, 8)}


def test_names_of_tables_below_the_folder():
    assert tables.PLACE.fullmatch(PLACE)
    assert tables.PLACE.fullmatch(tables.down_of(PLACE))
    assert tables.version_folder("3.8.0") == "configs/triton_3_8_0"
    for name in ("E=1.json", PLACE.replace("configs", ".."), PLACE.replace("triton_3_8_0", "a/../.."), f"{PLACE}.part"):
        assert not tables.PLACE.fullmatch(name)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's naming and a lookup that notes the folder it was called with."""
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", "3.8.0")
    said: list[str] = []
    seen: list[str | None] = []

    def name(E: int, N: int, dtype: str, block: list[int], per_channel: bool, down_moe: bool) -> str:
        return tables.file_name(E, N, "A GPU", down_moe)

    def original(E: int, N: int, *rest: Any) -> Any:
        seen.append(tables.folder() and str(tables.folder()))
        return {1: "theirs"}

    monkeypatch.setitem(sys.modules, tables.LOOKUP, SimpleNamespace(get_config_file_name=name))
    monkeypatch.setattr(tables, "say", said.append)
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    tables._looked_up.cache_clear()
    return SimpleNamespace(original=original, said=said, seen=seen, folder=tmp_path)


def put(folder: Path, version: str, down: bool = False, content: object = None) -> Path:
    path = folder / f"configs/triton_{version}" / tables.file_name(16, 512, "A GPU", down)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or {"1": tile(16, 64, 128, 4)}))
    return path


def test_a_table_that_is_loaded_is_told_once(engine: Any):
    up, down = put(engine.folder, "3_8_0"), put(engine.folder, "3_8_0", down=True)
    for down_moe in (False, True, False):
        assert tables.moe_configs(engine.original, 16, 512, "fp8_w8a8", 128, 128, down_moe=down_moe) == {1: "theirs"}
    assert engine.said == [f"glmplan tables: {up}", f"glmplan tables: {down}"]
    assert engine.seen == [str(engine.folder)] * 2


def test_shapes_that_the_folder_lacks_keep_the_engine_s_own_tables(engine: Any):
    put(engine.folder, "3_8_0")
    tables.moe_configs(engine.original, 256, 256, "fp8_w8a8", 128, 128)
    tables.moe_configs(engine.original, 16, 512, "fp8_w8a8", 128, 128, down_moe=True)
    assert engine.seen == [None, str(engine.folder)], "the second GEMM takes the first one's, as the engine does"
    assert engine.said == []
    assert tables.folder() == engine.folder


def test_another_triton_s_table_is_found_newest_first(engine: Any):
    put(engine.folder, "3_6_0")
    newer = put(engine.folder, "3_10_0")
    assert tables.find(16, 512, "fp8_w8a8", 128, 128, False, False) == newer
    exact = put(engine.folder, "3_8_0")
    assert tables.find(16, 512, "fp8_w8a8", 128, 128, False, False) == exact


def test_a_folder_that_is_none_and_a_malformed_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="has no folder configs"):
        tables.require_readable()
    put(tmp_path, "3_8_0", content={"1": tile(16, 64, 128, 4) | {"USE_TMA": True}})
    tables.require_readable()
    put(tmp_path, "3_8_0", content={"1": tile(16, 64, 128, 4) | {"USE_TMA": 1}})
    with pytest.raises(UsageError, match="M=1 not exactly"):
        tables.require_readable()
    (tmp_path / "configs/triton_3_8_0/E=8,N=64,device_name=A.json").write_text("another kind's")
    amd = tables.file_name(8, 64, "AMD Instinct MI300X")
    (tmp_path / "configs/triton_3_8_0" / amd).write_text('{"1": {"waves_per_eu": 2}}')
    put(tmp_path, "3_8_0")
    tables.require_readable()


def test_a_folder_that_the_engine_cannot_sort_is_refused_but_for_this_triton_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.__version__", "3.9.0+git12ab")
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    put(tmp_path, "3_9_0+git12ab")
    tables.require_readable()
    put(tmp_path, "3_8_0.old")
    with pytest.raises(UsageError, match=r"triton_3_8_0\.old is not named as a version of Triton"):
        tables.require_readable()


def test_tables_of_experts_travel_with_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLMPLAN_PROFILES", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    put(tmp_path / "tuned/0.5.23/moe", "3_8_0")
    assert "moe" in packed.tuned_kinds("0.5.23")
    name = tables.file_name(16, 512, "A GPU")
    assert f"glmplan/profiles/tuned/0.5.23/moe/configs/triton_3_8_0/{name}" in packed._files()
