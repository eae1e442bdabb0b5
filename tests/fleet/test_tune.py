"""Tuning on another host, over a real sshd: a link that comes back costs nothing, a host that is gone is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmplan.errors import UsageError
from glmplan.facts.gpu import Gpu, GpuProcess
from glmplan.facts.host import Host
from glmplan.facts.system import EngineEnvironment, System
from glmplan.fleet.tune_order import Tuning, check_shapes, choose_gpu, choose_python, tuned_folder
from glmplan.fleet.tune_result import Event, PartialLine, RowGain, TableLine, Tables, Tuned, mean_gain, parse_line
from glmplan.kernels.engines.sglang_expert_tables import file_name as expert_file
from glmplan.kernels.engines.sglang_tables import file_name
from tests import fake_nvml_build
from tests.fleet.control import Controller
from tests.fleet.fake_engine_python import fake_python
from tests.netns import Network, network, why_not
from tests.netns_wire import wait_for

TWO = ("--shapes", "2624,6144", "--shapes", "512,1024", "--rows", "1,64")
FIRST, SECOND = file_name(2624, 6144, "NVIDIA H200"), file_name(512, 1024, "NVIDIA H200")
EXPERTS = f"configs/triton_3_8_0/{expert_file(16, 512, 'NVIDIA H200')}"
CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, nvml_folder: Path) -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    whole = fake_nvml_build.environment(nvml_folder, "two-h200")
    wanted = {name: whole[name] for name in ("LD_LIBRARY_PATH", "FAKE_NVML_FACTS", "FAKE_NVML_CALLS")}
    wanted["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    with network("h1", folder=tmp_path_factory.mktemp("net"), environment={"h1": wanted}) as found:
        yield found


@pytest.fixture
def controller(hosts: Network, tmp_path: Path) -> Iterator[Controller]:
    found = Controller(hosts, tmp_path)
    yield found
    left = found.left()
    if left:
        hosts.reboot("h1")
    shutil.rmtree(hosts["h1"].state, ignore_errors=True)
    assert left == {}


def words(hosts: Network, folder: Path, **settings: Any) -> tuple[str, ...]:
    python = fake_python(folder / "engine", notes=str(folder / "notes"), **settings)
    return ("tune", "--hosts", hosts.names, "--engine-python", str(python), "--out", str(folder / "out"), *TWO)


def test_a_link_that_is_lost_and_comes_back_costs_nothing(controller: Controller, tmp_path: Path):
    go_on = tmp_path / "go_on"
    with controller.program(*words(controller.hosts, tmp_path, hold=str(go_on)), "--json") as tune:
        tune.says("the tuner started")
        wait_for("the tuner", (tmp_path / "notes").exists)
        controller.hosts.drop_link("h1")
        try:
            signs = ("did not answer", "is lost", "broke")
            wait_for("silence", lambda: any(sign in tune.err for sign in signs) or tune.process.poll() is not None, 240)
        finally:
            controller.hosts.restore_link("h1")
            go_on.touch()
        assert tune.end() == 0, tune.err
    assert "h1: answers again" in tune.err
    assert len((tmp_path / "notes").read_text().splitlines()) == 1
    assert len(json.loads(tune.out)["shapes"]) == 2
    assert (tmp_path / "out" / SECOND).exists()


def test_a_host_that_reboots_ends_it_and_the_next_run_goes_on(controller: Controller, tmp_path: Path):
    go_on = tmp_path / "go_on"
    asked = words(controller.hosts, tmp_path, hold=str(go_on), hold_from=3)
    with controller.program(*asked) as tune:
        wait_for("the first table", (tmp_path / "out" / FIRST).exists, 240)
        controller.hosts.reboot("h1")
        assert tune.end() == 1, tune.err
    assert "went with a reboot" in tune.err or "vanished" in tune.err
    assert "Run the same command again" in tune.err
    go_on.touch()
    ran = controller.run(*asked, "--json")
    assert ran.code == 0, ran.err
    assert [one["measured"] for one in json.loads(ran.out)["shapes"]] == [False, True]


def test_ctrl_c_stops_the_tuner_on_the_host(controller: Controller, tmp_path: Path):
    with controller.program(*words(controller.hosts, tmp_path, hold=str(tmp_path / "never"))) as tune:
        wait_for("the tuner", (tmp_path / "notes").exists, 240)
        tune.interrupt()
        assert tune.end() == 130, tune.err
    assert controller.left() == {}


def host(*engines: tuple[str, str], gpus: tuple[Gpu, ...] = ()) -> Host:
    found = tuple(EngineEnvironment(python=python, engine="sglang", engine_version=version) for python, version in engines)
    return Host(name="h1", gpus=gpus, system=System(engines=found))


def gpu(index: int, used: int) -> Gpu:
    process = (GpuProcess(pid=1, used_bytes=used),) if used else ()
    return Gpu(index=index, name="NVIDIA H200", memory_total_bytes=1 << 37, memory_usable_bytes=1 << 37, processes=process)


def test_a_known_engine_is_chosen_among_several():
    both = host(("/old/bin/python3", "0.4.1"), ("/new/bin/python3", "0.5.23"))
    assert choose_python(both, None) == ("/new/bin/python3", "0.5.23")
    assert choose_python(host(("/root/venv/bin/python3", "0.5.23")), "~/venv")[1] == "0.5.23"
    assert choose_python(host(("/opt/v/bin/python3", "0.5.23")), "/opt/v/")[1] == "0.5.23"


def test_a_gpu_that_others_use_is_not_measured_on_but_our_own_tuners_is():
    busy = host(gpus=(gpu(0, 20 << 30), gpu(1, 0)))
    assert choose_gpu(busy)[0] == 1
    assert choose_gpu(busy, held=0)[0] == 0
    with pytest.raises(Exception, match="All 1 GPUs of h1 are in use"):
        choose_gpu(host(gpus=(gpu(0, 20 << 30),)))
    hidden = gpu(0, 0).model_copy(update={"memory_in_use_bytes": 20 << 30})  # a process of another container
    assert choose_gpu(host(gpus=(hidden, gpu(1, 0))))[0] == 1


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("GLMPLAN_PROFILES", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert tuned_folder("0.5.23") == tmp_path / "glmplan" / "profiles" / "tuned" / "0.5.23" / "gemm"
    assert tuned_folder("0.5.23", "moe").name == "moe"
    monkeypatch.setenv("GLMPLAN_PROFILES", f"{tmp_path / 'own'}{os.pathsep}/other")
    assert tuned_folder("0.5.23") == tmp_path / "own" / "tuned" / "0.5.23" / "gemm"


def test_what_the_tuner_prints_is_read_and_what_libraries_print_is_not():
    event = {"kind": "rows", "shape": "o_proj", "n": 6144, "k": 2048, "step": 1, "steps": 8, "rows": 16, "default_us": 9.5}
    assert isinstance(parse_line(json.dumps({**event, "config": CONFIG, "new": 1})), Event)
    assert isinstance(parse_line(json.dumps({"kind": "table", "file": FIRST, "table": {"1": CONFIG}})), TableLine)
    for line in ("", "loading ...", "{half", '{"a":' * 100_000, "[1]", '{"kind": "else"}', '{"kind": "table", "file": 3}'):
        assert parse_line(line) is None


def test_a_table_with_another_name_or_wrong_sizes_is_refused(tmp_path: Path):
    away = FIRST.replace("NVIDIA", "/../../../NVIDIA")
    for name in ("../../.bashrc", "N=1.json", "configs/E=1.json", f"configs/../{EXPERTS}", away, FIRST.replace("_", "\0")):
        with pytest.raises(Exception, match="The host sent a table named"):
            Tables().add(TableLine(kind="table", file=name, table={"1": CONFIG}), tmp_path)
    with pytest.raises(Exception, match="num_stages=99"):
        Tables().add(TableLine(kind="table", file=FIRST, table={"1": {**CONFIG, "num_stages": 99}}), tmp_path)
    assert not (tmp_path / FIRST).exists()


def test_what_is_known_of_experts_is_kept_until_their_table_comes(tmp_path: Path):
    moe = tmp_path / "moe"
    known = {"of": {"shape": [16]}, "rows": {"1": {"up": CONFIG}}}
    line = parse_line(json.dumps({"kind": "partial", "file": f"{EXPERTS}.part", "content": known}))
    assert isinstance(line, PartialLine)
    tables = Tables.read(tmp_path / "gemm", moe)
    tables.add_partial(line, moe)
    assert Tables.read(tmp_path / "gemm", moe).partial == {f"{EXPERTS}.part": known}
    for name in ("../x.part", f"{EXPERTS}/../../x.part"):
        with pytest.raises(UsageError, match="The host sent a file named"):
            tables.add_partial(PartialLine(kind="partial", file=name, content={}), moe)
    tables.add(TableLine(kind="table", file=EXPERTS, table={"1": CONFIG}), moe)
    again = Tables.read(tmp_path / "gemm", moe)
    assert (again.partial, set(again.tables)) == ({}, {EXPERTS})
    (moe / "partial" / f"{EXPERTS}.part").write_text('{"of": ')
    with pytest.raises(UsageError, match=r"partial/configs.*\.part, cannot be read"):
        Tables.read(tmp_path / "gemm", moe)


def test_where_tables_go_is_told_for_what_is_tuned():
    def folders(**asked: Any) -> tuple[str, ...]:
        tuning = Tuning("python3", "0.5.23", 0, "NVIDIA H200", 8, Path("gemm"), experts_out=Path("moe"), **asked)
        return tuple(map(str, tuning.folders))

    assert folders() == ("gemm", "moe")
    assert folders(kind="moe") == folders(experts=("256,256",)) == ("moe",)
    assert folders(kind="gemm") == folders(shapes=("512,1024",)) == ("gemm",)


def test_the_gain_is_the_geometric_mean_over_what_could_run():
    rows = [RowGain(rows=1, default_us=40.0, tuned_us=10.0), RowGain(rows=2, default_us=10.0, tuned_us=10.0)]
    assert mean_gain(rows) == pytest.approx(2.0)
    assert mean_gain([*rows, RowGain(rows=4, default_us=None, tuned_us=1.0)]) == pytest.approx(2.0)
    assert mean_gain([]) is None


@pytest.mark.parametrize(
    "gains", ["{", "[1]", '{"gains": [1]}', '{"gains": {"x": 1, "2": {"default_us": "a", "tuned_us": 0}}}']
)
def test_gains_that_were_damaged_are_named_or_left_out(tmp_path: Path, gains: str):
    (tmp_path / "gains").mkdir()
    (tmp_path / FIRST).write_text(json.dumps({"1": CONFIG}))
    (tmp_path / "gains" / FIRST).write_text(gains)
    if gains == "{":
        with pytest.raises(UsageError, match=r"gains/.*cannot be read"):
            Tables.read(tmp_path)
        return
    kept = Event(kind="kept", shape="o_proj", n=2624, k=6144, step=1, steps=1, file=FIRST)
    tuning = Tuning("python3", "0.5.23", 0, "NVIDIA H200", 8, tmp_path)
    (shape,) = Tuned.of(tuning, "local", [kept], Tables.read(tmp_path), interrupted=False, timed_out=False).shapes
    assert (shape.gain, shape.measured) == (None, False)


def test_shapes_are_read_before_a_host_is_asked():
    assert check_shapes(["2624,6144", "2624,6144"]) == ("2624,6144",)
    for text in ("2624", "0,128", "a,b", "1,2,3", "-1,2"):
        with pytest.raises(Exception, match="is not a shape"):
            check_shapes([text])


def test_the_program_that_is_sent_needs_no_package(tmp_path: Path):
    from glmplan.fleet import tune_program

    ran = subprocess.run(
        [sys.executable, "-I", "-S", tune_program.__file__, str(tmp_path)], capture_output=True, check=False
    )
    assert b"SGLang is not installed here" in ran.stderr, "the tuner was reached, and its exit status passed on"
    assert ran.returncode == 4
