"""`glmplan tune` as a user runs it: the real tuner and node program in real processes, with worked-out times for a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmplan.kernels.engines.sglang_expert_tables import file_name as expert_file
from glmplan.kernels.engines.sglang_tables import file_name, read_table
from tests import fake_nvml_build
from tests.cli.conftest import Ran
from tests.fleet.control import interruptible
from tests.fleet.fake_engine_python import fake_python
from tests.netns_wire import wait_for

TWO = ("--shapes", "2624,6144", "--shapes", "512,1024", "--rows", "1,64")
FIRST, SECOND = file_name(2624, 6144, "NVIDIA H200"), file_name(512, 1024, "NVIDIA H200")


class Home:
    """A user's machine with an engine and two GPUs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        kept = {
            name: value for name, value in environment.items() if not name.startswith(("GLMPLAN_", "VIRTUAL_ENV", "XDG_"))
        }
        self.environment = {**kept, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "150"}
        self.notes, self.go_on = folder / "notes.jsonl", folder / "go-on"

    def engine(self, hold_from: int = 10**9, **settings: object) -> Path:
        """Case number `hold_from` and those after it wait until `go_on` is there."""
        own = {"notes": str(self.notes), "hold": str(self.go_on), "hold_from": hold_from, **settings}
        return fake_python(self.folder / "venv-sglang", **own)  # type: ignore[arg-type]

    @property
    def tables(self) -> Path:
        return self.folder / ".local" / "share" / "glmplan" / "profiles" / "tuned" / "0.5.23" / "gemm"

    @property
    def state(self) -> Path:
        """What the node program keeps."""
        return self.folder / "state" / "glmplan"

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run it; what it tells people goes into a file that can be read meanwhile."""
        command = [sys.executable, "-m", "glmplan", "tune", *words]
        self.told = self.folder / f"told-{time.monotonic_ns()}"
        with self.told.open("w") as err, interruptible():
            return subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=err, text=True,
            )  # fmt: skip

    def ended(self, process: subprocess.Popen[str]) -> Ran:
        """What it said."""
        out, _ = process.communicate(timeout=300)
        return Ran(process.returncode, out, self.told.read_text())

    def run(self, *words: str) -> Ran:
        return self.ended(self.start(*words))

    def pids(self) -> list[int]:
        """The tuners that were started and still run."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        pids = [json.loads(line)["pid"] for line in lines]
        return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"]

    def starts(self) -> int:
        return len(self.notes.read_text().splitlines()) if self.notes.exists() else 0

    def measured(self) -> list[int]:
        """Rows of experts that were measured, over all runs."""
        noted = Path(f"{self.notes}.experts")
        return [int(line) for line in noted.read_text().splitlines()] if noted.exists() else []


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.fixture
def home(tmp_path: Path, nvml_folder: Path) -> Iterator[Home]:
    own = Home(tmp_path, fake_nvml_build.environment(nvml_folder, "two-h200"))
    yield own
    for pid in own.pids():
        os.kill(pid, signal.SIGKILL)
    if own.state.exists():
        subprocess.run(
            [sys.executable, "-m", "glmplan", "stop", "tune-sglang-0.5.23", "--hosts", "local"], env=own.environment,
            capture_output=True, check=False,
        )  # fmt: skip


def test_tables_come_back_with_their_gains_and_nothing_is_left(home: Home):
    home.engine()
    ran = home.run(*TWO)
    assert ran.code == 0, ran.err
    table = read_table(home.tables / FIRST)
    assert set(table) == {1, 64}
    assert (table[1]["BLOCK_SIZE_M"], table[1]["num_stages"]) == (16, 4)
    assert (home.tables / SECOND).exists()
    gains = json.loads((home.tables / "gains" / FIRST).read_text())
    assert gains["gains"]["1"] == {"default_us": 31.0, "tuned_us": 15.5}
    assert "31.0 -> 15.5 us" in ran.out
    assert "2.00x" in ran.out, "(31/15.5 x 94/47) ^ 1/2"
    assert "2 of 2 tables for SGLang 0.5.23" in ran.out
    assert "[1/2] 2624,6144 2624x6144: 64 rows 94.0 -> 47.0 us, 2.00x" in ran.err
    assert json.loads(home.notes.read_text())["gpus"] == "0"
    assert home.pids() == []
    assert list(home.state.glob("*/start.json")) == []


def test_the_real_parser_takes_what_is_sent(home: Home):
    home.engine()
    assert home.run(*TWO, "--tp-size", "4").code == 0
    argv = json.loads(home.notes.read_text())["argv"]
    assert argv[1:] == [
        *("--out", argv[2], "--json-lines", "--tp-size", "4", "--ep-size", "1", "--kind", "both"),
        *("--shapes", "2624,6144", "512,1024", "--rows", "1,64"),
    ]


def test_all_shapes_of_a_tp_size(home: Home):
    home.engine()
    ran = home.run("--rows", "1", "--tp-size", "16", "--kind", "gemm", "--json", "--out", str(home.folder / "out"))
    found = json.loads(ran.out)
    assert ran.code == 0, ran.err
    assert found["complete"] is True
    assert found["shapes_wanted"] == len(found["shapes"]) == 8
    assert (found["host"], found["gpu_index"], found["tp_size"]) == ("local", 0, 16)
    assert (found["shapes"][0]["name"], found["shapes"][0]["gain"]) == ("fused_qkv_a_proj", pytest.approx(2.0))
    assert len(list((home.folder / "out").glob("*.json"))) == 8


UP = f"configs/triton_3_8_0/{expert_file(256, 128, 'NVIDIA H200')}"
DOWN = f"configs/triton_3_8_0/{expert_file(256, 128, 'NVIDIA H200', down=True)}"


def test_experts_get_two_tables_where_the_engine_looks(home: Home):
    home.engine()
    ran = home.run("--kind", "moe", "--tp-size", "16", "--rows", "1,512")
    assert ran.code == 0, ran.err
    moe = home.tables.parent / "moe"
    up, down = read_table(moe / UP), read_table(moe / DOWN)
    assert {rows: config["BLOCK_SIZE_M"] for rows, config in up.items()} == {1: 16, 512: 16}
    assert all(up[rows]["BLOCK_SIZE_M"] == down[rows]["BLOCK_SIZE_M"] for rows in up)
    gains = json.loads((moe / "gains" / UP).read_text())["gains"]
    assert gains["512"]["default_us"] > gains["512"]["tuned_us"]
    assert "256 x 128 x 6144" in ran.out
    assert f"1 of 1 tables for SGLang 0.5.23 on NVIDIA H200 are in {moe}." in ran.out
    assert "[1/1] experts 256x128x6144: 512 rows" in ran.err
    assert not list(home.tables.glob("*.json"))
    assert not list((moe / "partial").rglob("*.part"))
    kept = json.loads(home.run("--kind", "moe", "--tp-size", "16", "--rows", "1,512", "--json").out)
    assert [(one["experts"], one["measured"]) for one in kept["shapes"]] == [(256, False)]


def test_experts_that_were_stopped_go_on_with_the_rows_that_are_missing(home: Home):
    home.engine(hold_from=2)
    asked = ("--experts", "256,128", "--rows", "1,2,4,8")
    process = home.start(*asked)
    partial = home.tables.parent / "moe" / "partial" / f"{UP}.part"
    wait_for("a row", partial.exists, 100)
    process.send_signal(signal.SIGINT)
    ran = home.ended(process)
    assert ran.code == 130, ran.err
    assert list(json.loads(partial.read_text())["rows"]) == ["1"]
    assert not (home.tables.parent / "moe" / UP).exists(), "half a table is none"
    assert home.measured() == [1]
    home.go_on.touch()
    ran = home.run(*asked, "--json")
    assert ran.code == 0, ran.err
    assert home.measured() == [1, 2, 4, 8]
    assert len(json.loads(ran.out)["shapes"][0]["rows"]) == 4


def test_both_kinds_go_to_one_folder_that_is_named(home: Home):
    home.engine()
    out = home.folder / "out"
    ran = home.run("--shapes", "512,1024", "--experts", "256,128", "--rows", "1", "--quick", "--out", str(out), "--json")
    found = json.loads(ran.out)
    assert ran.code == 0, ran.err
    assert [(one["experts"], one["file"]) for one in found["shapes"]] == [(None, SECOND), (256, UP)]
    assert (out / SECOND).exists()
    assert (out / UP).exists()
    assert json.loads((out / "gains" / UP).read_text())["setting"]["search"] == "quick"


def test_what_is_there_is_kept_and_measured_again_only_when_asked(home: Home):
    home.engine()
    assert home.run(*TWO[:2], *TWO[4:]).code == 0
    before = (home.tables / FIRST).stat().st_mtime_ns
    ran = home.run(*TWO, "--json")
    found = json.loads(ran.out)
    assert [(one["name"], one["measured"]) for one in found["shapes"]] == [("2624,6144", False), ("512,1024", True)]
    assert found["shapes"][0]["gain"] == pytest.approx(2.0), "the gain of the first run is known"
    assert (home.tables / FIRST).stat().st_mtime_ns == before
    again = json.loads(home.run(*TWO, "--json", "--again").out)
    assert [one["measured"] for one in again["shapes"]] == [True, True]


def test_ctrl_c_stops_the_tuner_keeps_its_tables_and_the_next_run_goes_on(home: Home):
    home.engine(hold_from=3)
    process = home.start(*TWO)
    wait_for("the first table", lambda: (home.tables / FIRST).exists(), 100)
    process.send_signal(signal.SIGINT)
    cut = home.ended(process)
    assert cut.code == 130, cut.err
    assert "1 of 2 tables" in cut.out
    assert "not complete" in cut.out
    assert "Traceback" not in cut.err
    assert home.pids() == []
    assert not (home.tables / SECOND).exists()
    home.go_on.touch()
    ran = home.run(*TWO, "--json")
    assert [one["measured"] for one in json.loads(ran.out)["shapes"]] == [False, True]


def test_a_controller_that_dies_finds_the_tuner_again(home: Home):
    home.engine(hold_from=1)
    process = home.start(*TWO)
    wait_for("the tuner", home.starts, 100)
    process.kill()
    process.communicate()
    assert len(home.pids()) == 1
    other = home.run(*TWO[:2])
    assert other.code == 1
    assert "runs with another plan" in other.err
    process = home.start(*TWO, "--json")
    wait_for("its adoption", lambda: "the tuner goes on" in home.told.read_text(), 100)
    home.go_on.touch()
    ran = home.ended(process)
    assert ran.code == 0, ran.err
    assert home.starts() == 1, "no second tuner was started"
    assert len(json.loads(ran.out)["shapes"]) == 2


def test_a_tuner_that_ended_unseen_has_its_tables_brought_back(home: Home):
    home.engine(hold_from=1)
    process = home.start(*TWO)
    wait_for("the tuner", home.starts, 100)
    process.kill()
    process.communicate()
    home.go_on.touch()
    wait_for("its end", lambda: any("exit_status" in one.read_text() for one in home.state.glob("*/worker.json")), 100)
    ran = home.run(*TWO, "--json")
    assert ran.code == 0, ran.err
    assert "had ended" in ran.err
    assert home.starts() == 1
    assert len(json.loads(ran.out)["shapes"]) == 2
    assert (home.tables / SECOND).exists()


def test_the_time_that_is_given_ends_it(home: Home):
    home.engine(hold_from=3)
    ran = home.run(*TWO, "--minutes", "0.02", "--json")
    found = json.loads(ran.out)
    assert ran.code == 0, ran.err
    assert (found["complete"], found["interrupted"]) == (False, False)
    assert len(found["shapes"]) < 2
    assert home.pids() == []


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"no_cuda": True}, 4, "No CUDA GPU is visible to PyTorch."),
        ({"wrong": True}, 7, "0.5 away from the engine's default"),
        ({"crash": True}, 1, "The tuner on local ended with exit status"),
    ],
)
def test_a_tuner_that_fails_is_a_sentence(home: Home, settings, code, words):
    home.engine(**settings)
    ran = home.run(*TWO)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_no_engine_and_an_unknown_engine_are_sentences(home: Home):
    ran = home.run(*TWO)
    assert ran.code == 4
    assert "local has no Python with SGLang" in ran.err
    fake_python(home.folder / "venv-old", "0.4.1")
    ran = home.run(*TWO)
    assert ran.code == 4
    assert "SGLang 0.4.1" in ran.err
    assert "0.5.13.post1 and 0.5.23" in ran.err
    ran = home.run(*TWO, "--engine-python", "/nowhere/bin/python3")
    assert ran.code == 4
    assert "/nowhere/bin/python3" in ran.err


def test_a_named_python_is_used(home: Home):
    home.engine()
    other = fake_python(home.folder / "engines" / "b", notes=str(home.notes))
    ran = home.run(*TWO, "--engine-python", str(other.parents[1]), "--json")
    assert json.loads(ran.out)["python"] == str(other)


def test_no_gpu_is_a_sentence(tmp_path: Path, nvml_folder: Path):
    own = Home(tmp_path, fake_nvml_build.environment(nvml_folder, "no-gpus"))
    own.engine()
    ran = own.run(*TWO)
    assert ran.code == 4
    assert "has no GPU to tune for" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("--shapes", "12"), ("--minutes", "0"), ("--hosts", "a,b"), ("--tp-size", "3"), ("--rows", "many"),
        ("--kind", "all"), ("--experts", "256"), ("--experts", "256,100"), ("--ep-size", "3"), ("--rows", "\u00b2"),
        ("--experts", "9" * 5000 + ",128"), ("--ep-size", "0"), ("--kind", "moe", "--shapes", "512,1024"),
        ("--kind", "gemm", "--experts", "256,128"), ("--ep-size", "8", "--experts", "32,2048"),
        ("--experts", "256,128", "--experts", "256,128,1024,8"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_a_host_is_asked(glmplan, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = glmplan("tune", *words)  # there is no GPU and no engine, which would be told
    assert ran.code == 2, ran.err
    assert "Traceback" not in ran.err
    assert "SGLang" not in ran.err
    assert "GPU to tune" not in ran.err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(home: Home):
    home.engine()
    ran = home.run(*TWO, "--out", "/proc/tables")
    assert ran.code == 2
    assert "/proc/tables cannot be written" in ran.err
    assert home.starts() == 0


def test_experts_that_do_not_fit_have_their_exit_code(home: Home):
    home.engine(small=True)
    ran = home.run("--experts", "256,128", "--rows", "1")
    assert ran.code == 3, ran.err
    assert "256 experts take 9.7 GB to tune. Tune with a larger --tp-size." in ran.err


def test_again_does_not_promise_to_go_on(home: Home):
    home.engine(hold_from=1)
    ran = home.run(*TWO, "--minutes", "0.01", "--again")
    assert "Run it without --again" in ran.out
    assert "goes on with" not in ran.out


def test_a_full_search_replaces_a_quick_one_and_rows_are_added(home: Home):
    home.engine()
    asked = ("--shapes", "512,1024", "--experts", "256,128", "--json")

    def measured(*words: str) -> list[tuple[bool, int]]:
        ran = home.run(*asked, *words)
        assert ran.code == 0, ran.err
        return [(one["measured"], len(one["rows"])) for one in json.loads(ran.out)["shapes"]]

    assert measured("--rows", "1,64", "--quick") == [(True, 2), (True, 2)]
    assert measured("--rows", "1", "--quick") == [(False, 2), (False, 2)]
    assert measured("--rows", "1,64") == [(True, 2), (True, 2)]
    assert measured("--rows", "16") == [(True, 3), (True, 3)]
    assert set(read_table(home.tables.parent / "moe" / DOWN)) == set(read_table(home.tables / SECOND)) == {1, 16, 64}
    assert home.measured() == [1, 64, 1, 64, 16]


def test_the_folder_of_the_user_comes_first(home: Home):
    home.engine()
    own = home.folder / "mine"
    own.mkdir()
    home.environment["GLMPLAN_PROFILES"] = str(own)
    assert home.run(*TWO[:2], *TWO[4:]).code == 0
    assert (own / "tuned" / "0.5.23" / "gemm" / FIRST).exists()
