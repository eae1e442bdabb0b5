"""`glmplan probe` and `size` on what a driver says: the real pynvml over a stand-in library, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glmplan.facts.inventory import read_inventory
from glmplan.probe.remote import ProbeReport
from tests import fake_nvml_build
from tests.facts.files import write_safetensors

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, facts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One glmplan process that sees these facts."""
    environment = fake_nvml_build.environment(folder, facts)
    command = [sys.executable, "-m", "glmplan", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_probe_prints_every_gpu(nvml_folder):
    ran = run(nvml_folder, "eight-4090-48g", "probe")
    assert ran.returncode == 0
    assert ran.stdout.count("rtx-4090-48g") == 8


def test_probe_json_is_the_host_s_facts(nvml_folder):
    host = json.loads(run(nvml_folder, "busy", "probe", "--json").stdout)
    assert any(gpu["processes"] for gpu in host["gpus"])


def test_size_takes_the_local_gpus(nvml_folder):
    plan = json.loads(run(nvml_folder, "eight-4090-48g", "size", "--json").stdout)
    assert plan["inventory_origin"] == "probe"
    assert not plan["fits"]
    assert plan["ranks"][0]["gpu"] == "rtx-4090-48g"


def test_a_mig_slice_is_refused_with_the_command_that_ends_it(nvml_folder):
    ran = run(nvml_folder, "mig", "size")
    assert ran.returncode == 2
    assert "MIG" in ran.stderr
    assert "nvidia-smi -i" in ran.stderr


@pytest.mark.parametrize(("facts", "words"), [("driver-mismatch", "does not match"), ("lost-gpu", "does not answer")])
def test_a_driver_in_trouble_is_one_sentence(nvml_folder, facts, words):
    for command in ("probe", "size"):
        ran = run(nvml_folder, facts, command)
        assert ran.returncode == 1
        assert words in ran.stderr
        assert "Traceback" not in ran.stderr


def test_no_driver_is_one_sentence(glmplan):
    ran = glmplan("probe")
    assert ran.code == 1
    assert "no NVIDIA driver" in ran.err
    assert "--gpus" in ran.err


def test_no_driver_still_tells_the_rest_of_the_machine(glmplan):
    assert "kernel" in glmplan("probe").out


def test_hosts_json_holds_hosts_and_failures(nvml_folder):
    ran = run(nvml_folder, "eight-4090-48g", "probe", "--hosts", "local,no-such-host.invalid", "--json")
    assert ran.returncode == 5
    report = ProbeReport.model_validate_json(ran.stdout)
    assert [host.name for host in report.hosts] == ["local"]
    assert len(report.hosts[0].gpus) == 8
    assert [failure.name for failure in report.failures] == ["no-such-host.invalid"]
    assert "no-such-host.invalid" in ran.stderr
    assert "next:" in ran.stderr


def test_parts_of_this_machine_are_hosts_of_their_own(nvml_folder):
    ran = run(nvml_folder, "eight-4090-48g", "probe", "--hosts", "local#0-3,local#4-7", "--json")
    assert ran.returncode == 0, ran.stderr
    first, second = ProbeReport.model_validate_json(ran.stdout).hosts
    assert [gpu.index for gpu in second.gpus] == [4, 5, 6, 7]
    assert (first.address, second.address) == ("127.0.0.1", "127.0.0.2")


def test_a_saved_inventory_is_what_was_probed_and_size_reads_it(nvml_folder, tmp_path):
    path = tmp_path / "inventory.toml"
    arguments = ("probe", "--hosts", "local#0-3,local#4-7", "--save", str(path), "--json")
    ran = run(nvml_folder, "eight-4090-48g", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert read_inventory(path).hosts == ProbeReport.model_validate_json(ran.stdout).hosts
    sized = run(nvml_folder, "eight-4090-48g", "size", "--inventory", str(path), "--checkpoint", "nvfp4", "--json")
    assert [rank["host"] for rank in json.loads(sized.stdout)["ranks"]][:1] == ["local#0-3"]
    again = run(nvml_folder, "eight-4090-48g", *arguments)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_nothing_is_saved_when_a_host_failed(nvml_folder, tmp_path):
    path = tmp_path / "inventory.toml"
    ran = run(nvml_folder, "mixed", "probe", "--hosts", "local,no-such-host.invalid", "--save", str(path))
    assert ran.returncode == 5
    assert "was not written: 1 of 2 hosts failed" in ran.stderr
    assert not path.exists()


def test_size_plans_for_the_probed_hosts_with_their_addresses(nvml_folder):
    arguments = ("size", "--hosts", "local#0-3,local#4-7", "--context", "8k", "--json")
    plan = json.loads(run(nvml_folder, "eight-4090-48g", *arguments).stdout)
    assert plan["inventory_origin"] == "probe"
    assert {rank["host"] for rank in plan["ranks"]} == {"local#0-3", "local#4-7"}
    assert [node["address"] for node in plan["nodes"]] == ["127.0.0.1", "127.0.0.2"]


def test_size_names_every_host_that_failed(nvml_folder):
    ran = run(nvml_folder, "mixed", "size", "--hosts", "local,a.invalid,b.invalid")
    assert ran.returncode == 5
    assert "2 of 3 hosts failed: a.invalid, b.invalid." in ran.stderr
    assert ran.stdout == ""


def test_size_refuses_hosts_whose_gpus_cannot_be_read(nvml_folder):
    ran = run(nvml_folder, "lost-gpu", "size", "--hosts", "local")
    assert ran.returncode == 1
    assert "local: GPU 2 does not answer" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("size", "--hosts", "a", "--gpus", "8x h200"), "--gpus and --hosts contradict"),
        (("size", "--hosts", "a", "--gpu", "h200"), "--gpu and --hosts contradict"),
        (("size", "--hosts", "a,,b"), "empty name"),
        (("probe", "--hosts", "a,a"), "names a twice"),
        (("probe", "--disk-read"), "--disk-read measures a model folder"),
        (("probe", "--disk-seconds", "0"), "--disk-seconds is 0"),
        (("probe", "--hosts", "a", "--ssh-config", "/no/such/config"), "is no file"),
    ],
)
def test_contradictions_are_usage_errors(glmplan, arguments, words):
    ran = glmplan(*arguments)
    assert ran.code == 2
    assert words in ran.err


def test_a_recipes_gpus_give_way_to_hosts(nvml_folder):
    ran = run(nvml_folder, "eight-4090-48g", "size", "--recipe", "8x-h200", "--hosts", "local")
    assert "rtx-4090-48g (sm_89)" in ran.stderr


def test_a_model_folder_is_judged_and_measured(nvml_folder, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": 40 * 1024**2})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    arguments = ("probe", "--model-path", str(tmp_path), "--disk-read", "--disk-seconds", "0.2")
    ran = run(nvml_folder, "two-h200", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert "complete" in ran.stdout
    assert "reads " in ran.stdout
    assert "NV18 in 1; P2P in all" in ran.stdout


def test_the_screen_shows_every_subject(nvml_folder):
    out = run(nvml_folder, "bridged-a6000", "probe", "--hosts", "local").stdout
    for word in ("system", "CPU", "memory", "disk", "6 pairs of GPUs: SYS in 4, NV4 in 2; P2P in 2"):
        assert word in out
