"""The NVML probe, through the real pynvml and a C library that answers like the driver."""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from glmplan.facts.gpu_profile import GpuProfile
from glmplan.facts.host import Host
from glmplan.units import GIB, KIB, MIB
from tests.fake_nvml_build import LIBRARY, RECORDED, SOURCE, facts_lines
from tests.probe.conftest import Environment

ROOT = Path(__file__).parents[2]

PROBE = """
import json, sys
from glmplan.errors import ProbeError
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.probe.local import probe_local
profiles = [GpuProfile.model_validate(one) for one in json.load(sys.stdin)]
try:
    print(probe_local(profiles).model_dump_json())
except ProbeError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message, "next_step": error.next_step}))
"""


def profile(name: str, nvml_name: str, mib: tuple[int, int], usable_bytes: int) -> GpuProfile:
    unknown = {"source": "not needed here"}
    return GpuProfile.model_validate(
        {
            "schema_version": 1,
            "name": name,
            "title": name,
            "nvml_names": [nvml_name],
            "nvml_memory_mib": mib,
            "gpus_per_node": 1,
            "memory_total_bytes": {"value": mib[1] * MIB, **unknown},
            "memory_usable_bytes": {"value": usable_bytes, **unknown},
            "link": unknown,
            **{
                field: unknown
                for field in GpuProfile.model_fields
                if field.endswith("per_s") or field in ("sm", "shared_memory_per_block_bytes")
            },
        }
    )


PROFILES = [
    profile("rtx-4090", "NVIDIA GeForce RTX 4090", (24000, 25000), 24 * 10**9),
    profile("rtx-4090-48g", "NVIDIA GeForce RTX 4090", (45000, 50000), 50_900_000_000),
    profile("rtx-5090", "NVIDIA GeForce RTX 5090", (32000, 33000), 33 * 10**9),
    profile("gb10", "NVIDIA GB10", (1, 2**40), 100 * GIB),
]


def answer(env: dict[str, str]) -> dict[str, Any]:
    """What probe_local says in a subprocess with this environment: a host or an error."""
    given = json.dumps([one.model_dump(mode="json") for one in PROFILES])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], input=given, env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def probed(env: dict[str, str]) -> Host:
    return Host.model_validate(answer(env))


def calls(env: dict[str, str]) -> list[str]:
    return Path(env["FAKE_NVML_CALLS"]).read_text().split()


Variant = Callable[..., dict[str, str]]


@pytest.fixture
def variant(fake_nvml: Environment, tmp_path: Path) -> Variant:
    """A recorded facts file with keys of its GPU 0 (or of the system) replaced."""

    def build_variant(name: str, system: dict[str, Any] | None = None, **gpu: Any) -> dict[str, str]:
        facts = json.loads((RECORDED / f"{name}.json").read_text())
        facts.update(system or {})
        facts["gpus"][0].update(gpu)
        path = tmp_path / "variant.json"
        path.write_text(json.dumps(facts))
        return fake_nvml(path)

    return build_variant


def refused(code: str) -> dict[str, str]:
    return {"error": f"NVML_ERROR_{code}"}


def test_eight_modified_4090_are_read_and_matched(fake_nvml: Environment) -> None:
    env = fake_nvml("eight-4090-48g")
    host = probed(env)
    assert (host.driver_version, host.cuda_version, host.nvml_version) == ("580.95.05", "13.0", "13.580.95.05")
    assert host.hostname
    assert host.memory_total_bytes == meminfo("MemTotal")
    assert [gpu.index for gpu in host.gpus] == list(range(8))
    assert len({gpu.uuid for gpu in host.gpus}) == 8
    gpu = host.gpus[0]
    assert (gpu.name, gpu.profile, gpu.sm) == ("NVIDIA GeForce RTX 4090", "rtx-4090-48g", 89)
    assert (gpu.memory_total_bytes, gpu.memory_usable_bytes) == (49140 * MIB, 48540 * MIB)
    assert gpu.memory_in_use_bytes == MIB
    assert (gpu.pcie_generation, gpu.pcie_generation_max) == (1, 4)
    assert [one.pcie_width for one in host.gpus] == [16, 16, 16, 16, 16, 8, 16, 16]
    assert [one.pcie_width_max for one in host.gpus] == [16] * 8
    assert gpu.power_limit_w == 450
    assert (gpu.mig, gpu.unified_memory, gpu.processes) == (False, False, ())


def test_a_refused_reading_is_none_and_never_zero(fake_nvml: Environment) -> None:
    gpu = probed(fake_nvml("eight-4090-48g")).gpus[0]
    assert gpu.ecc is None
    assert gpu.nvlink_active is None
    gpu = probed(fake_nvml("gb10")).gpus[0]
    assert (gpu.pcie_generation, gpu.pcie_generation_max, gpu.pcie_width, gpu.pcie_width_max) == (None,) * 4
    assert gpu.power_limit_w is None


@pytest.mark.parametrize("code", ["NO_PERMISSION", "UNKNOWN", "DEPRECATED"])
def test_any_refusal_of_an_optional_reading_is_none(variant: Variant, code: str) -> None:
    keys = ("uuid", "compute_capability", "ecc_mode", "enforced_power_limit_mw", "pcie_width", "processes", "nvlinks")
    gpu = probed(variant("mig", **dict.fromkeys(keys, refused(code)))).gpus[0]
    assert (gpu.uuid, gpu.sm, gpu.ecc, gpu.power_limit_w, gpu.pcie_width, gpu.nvlink_active) == (None,) * 6
    assert gpu.processes == ()


def test_generation_and_width_zero_mean_unknown(variant: Variant) -> None:
    gpu = probed(variant("mixed", pcie_generation=0, pcie_width_max=0)).gpus[0]
    assert (gpu.pcie_generation, gpu.pcie_width_max) == (None, None)


def test_different_gpus_of_one_host_match_different_profiles(fake_nvml: Environment) -> None:
    first, second = probed(fake_nvml("mixed")).gpus
    assert (first.profile, second.profile) == ("rtx-4090", "rtx-5090")
    assert (first.sm, second.sm) == (89, 120)
    assert (first.memory_usable_bytes, second.memory_usable_bytes) == (24217 * MIB, 32114 * MIB)


def test_a_gpu_without_a_profile_keeps_its_name(fake_nvml: Environment) -> None:
    gpu = probed(fake_nvml("mig")).gpus[0]
    assert (gpu.profile, gpu.label) == (None, "NVIDIA A100-SXM4-80GB")


def test_processes_are_named_and_what_the_driver_keeps_is_not_use(fake_nvml: Environment) -> None:
    gpu = probed(fake_nvml("busy")).gpus[0]
    assert gpu.memory_in_use_bytes == 41210 * MIB
    mine, hidden = gpu.processes
    assert mine.used_bytes == 40960 * MIB
    names = {one.pw_name for one in pwd.getpwall() if one.pw_uid == os.getuid()}
    assert mine.owner in (names or {str(os.getuid())})
    assert mine.command == Path("/proc/self/comm").read_text().strip()
    assert (hidden.pid, hidden.used_bytes, hidden.owner, hidden.command) == (4999999, None, None, None)


def test_throttling_is_told_in_words_and_idleness_is_none(fake_nvml: Environment) -> None:
    assert probed(fake_nvml("busy")).gpus[0].throttle_reasons == ("power-cap", "software-thermal")
    assert probed(fake_nvml("mixed")).gpus[0].throttle_reasons == ()


def test_mig_ecc_and_nvlinks_are_read(fake_nvml: Environment) -> None:
    gpu = probed(fake_nvml("mig")).gpus[0]
    assert (gpu.mig, gpu.ecc, gpu.nvlink_active) == (True, True, 11)


def test_modes_that_wait_for_a_reset_do_not_count_yet(variant: Variant) -> None:
    gpu = probed(variant("mig", mig_mode=[0, 1], ecc_mode=[0, 1])).gpus[0]
    assert (gpu.mig, gpu.ecc) == (False, False)


def test_nvlinks_that_are_down_count_zero(variant: Variant) -> None:
    assert probed(variant("mig", nvlinks=[0, 0])).gpus[0].nvlink_active == 0


@pytest.mark.parametrize("code", ["FUNCTION_NOT_FOUND", "NOT_SUPPORTED", "ARGUMENT_VERSION_MISMATCH"])
def test_without_memory_v2_the_profile_tells_what_is_usable(variant: Variant, code: str) -> None:
    env = variant("no-memory-v2", memory_v2=refused(code))
    matched, unmatched = probed(env).gpus
    assert "nvmlDeviceGetMemoryInfo" in calls(env)
    free = (49140 - 600 - 1000) * MIB
    assert (matched.profile, matched.memory_usable_bytes) == ("rtx-4090-48g", 50_900_000_000)
    assert matched.memory_in_use_bytes == 50_900_000_000 - free
    total = 49140 * MIB
    assert (unmatched.profile, unmatched.memory_usable_bytes) == (None, total - total // 50)
    assert unmatched.unified_memory is False


def test_a_profile_never_makes_more_usable_than_there_is(variant: Variant) -> None:
    total = 46000 * MIB
    gpu = probed(variant("no-memory-v2", memory={"total": total, "free": total, "used": 0})).gpus[0]
    assert (gpu.profile, gpu.memory_usable_bytes, gpu.memory_in_use_bytes) == ("rtx-4090-48g", total, 0)


def test_memory_v1_is_not_asked_when_v2_answers(fake_nvml: Environment) -> None:
    env = fake_nvml("mixed")
    probed(env)
    assert "nvmlDeviceGetMemoryInfo_v2" in calls(env)
    assert "nvmlDeviceGetMemoryInfo" not in calls(env)


def test_old_drivers_tell_throttling_under_the_old_name(fake_nvml: Environment) -> None:
    host = probed(fake_nvml("no-memory-v2"))
    assert host.cuda_version == "11.4"
    assert host.gpus[0].throttle_reasons == ("hardware-slowdown",)


def test_a_gpu_without_memory_of_its_own_has_the_systems(fake_nvml: Environment) -> None:
    gpu = probed(fake_nvml("gb10")).gpus[0]
    assert gpu.unified_memory is True
    assert (gpu.profile, gpu.sm) == ("gb10", 121)
    assert gpu.memory_total_bytes == gpu.memory_usable_bytes == meminfo("MemTotal")
    assert 0 < gpu.memory_in_use_bytes < gpu.memory_total_bytes


def test_two_gpus_cannot_both_own_the_systems_memory(variant: Variant) -> None:
    env = variant("mixed", memory=refused("NOT_SUPPORTED"), memory_v2=refused("NOT_SUPPORTED"))
    said = answer(env)
    assert said["error"] == "ProbeError"
    assert said["message"] == "GPU 0 could not be read: Not Supported (code 3)."


def test_memory_that_is_for_root_only_is_an_error_with_its_index(variant: Variant) -> None:
    env = variant("mig", memory=refused("NO_PERMISSION"), memory_v2=refused("NO_PERMISSION"))
    said = answer(env)
    assert "GPU 0 could not be read: Insufficient Permissions" in said["message"]
    assert "MIG" in said["next_step"]


def test_no_gpus_is_its_own_sentence(fake_nvml: Environment) -> None:
    env = fake_nvml("no-gpus")
    said = answer(env)
    assert said["error"] == "NoDriverError"
    assert "0 GPUs" in said["message"]
    assert "--gpus" in said["next_step"]
    assert calls(env)[-1] == "nvmlShutdown"


def test_a_driver_mismatch_names_the_version_and_the_reload(fake_nvml: Environment) -> None:
    said = answer(fake_nvml("driver-mismatch"))
    assert said["error"] == "ProbeError"
    assert "13.580.95.05" in said["message"]
    assert "does not match the loaded kernel module" in said["message"]
    assert said["next_step"].startswith("Reboot")


def test_a_lost_gpu_is_named_by_its_index(fake_nvml: Environment) -> None:
    env = fake_nvml("lost-gpu")
    said = answer(env)
    assert said["error"] == "ProbeError"
    assert said["message"].startswith("GPU 2 does not answer: GPU is lost.")
    assert "nvidia-smi -r -i 2" in said["next_step"]
    assert "reboot" in said["next_step"]
    assert calls(env)[-1] == "nvmlShutdown"


@pytest.mark.parametrize("key", ["memory_v2", "ecc_mode", "nvlinks", "processes"])
def test_a_gpu_lost_during_the_reading_is_no_none(variant: Variant, key: str) -> None:
    said = answer(variant("mixed", **{key: refused("GPU_IS_LOST")}))
    assert said["message"].startswith("GPU 0 does not answer")


def test_a_kernel_module_that_is_not_loaded_is_told(variant: Variant) -> None:
    said = answer(variant("mixed", system={"init": refused("DRIVER_NOT_LOADED")}))
    assert said["error"] == "NoDriverError"
    assert "modprobe nvidia" in said["next_step"]


def test_another_failure_of_init_is_told_with_its_code(variant: Variant) -> None:
    said = answer(variant("mixed", system={"init": refused("NO_PERMISSION")}))
    assert said["error"] == "ProbeError"
    assert said["message"] == "NVML could not start: Insufficient Permissions (code 4)."


def test_a_failure_outside_any_gpu_is_no_traceback(variant: Variant) -> None:
    env = variant("mixed", system={"driver_version": refused("RESET_REQUIRED")})
    assert answer(env)["message"] == "NVML failed: GPU requires restart (code 16)."
    assert calls(env)[-1] == "nvmlShutdown"


def test_a_library_that_cannot_be_loaded_means_no_driver(fake_nvml: Environment, tmp_path: Path) -> None:
    (tmp_path / LIBRARY).write_bytes(b"")
    said = answer({**fake_nvml("mixed"), "LD_LIBRARY_PATH": str(tmp_path)})
    assert said["error"] == "NoDriverError"


def test_no_library_at_all_means_no_driver(fake_nvml: Environment) -> None:
    env = {name: value for name, value in fake_nvml("mixed").items() if name != "LD_LIBRARY_PATH"}
    load = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({LIBRARY!r})"]
    if subprocess.run(load, env=env, capture_output=True).returncode == 0:
        pytest.skip("this machine has an NVIDIA driver")
    said = answer(env)
    assert said["error"] == "NoDriverError"
    assert said["message"] == ("NVML could not be loaded: this machine has no NVIDIA driver (libnvidia-ml.so.1 not found).")
    assert "Install the NVIDIA driver" in said["next_step"]
    assert '--gpus "8x rtx-4090-48g"' in said["next_step"]


def test_the_probe_shuts_nvml_down_once(fake_nvml: Environment) -> None:
    env = fake_nvml("eight-4090-48g")
    probed(env)
    assert calls(env)[0] == "nvmlInitWithFlags"
    assert calls(env).count("nvmlShutdown") == 1
    assert calls(env)[-1] == "nvmlShutdown"


def test_importing_the_probe_does_not_load_pynvml() -> None:
    program = "import sys, glmplan.probe.local; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("size", "struct"),
    [
        ("fake_sizeof_memory", pynvml.c_nvmlMemory_t),
        ("fake_sizeof_memory_v2", pynvml.c_nvmlMemory_v2_t),
        ("fake_sizeof_process", pynvml.c_nvmlProcessInfo_v3_t),
        ("fake_sizeof_pci", pynvml.nvmlPciInfo_t),
    ],
)
def test_the_fakes_structs_have_pynvmls_sizes(nvml_library: Path, size: str, struct: type[ctypes.Structure]) -> None:
    assert getattr(ctypes.CDLL(str(nvml_library)), size)() == ctypes.sizeof(struct)


def read_with_peers(env: dict[str, str]) -> dict[str, Any]:
    """What the node program reads, peers included."""
    program = "import json; from glmplan.node.gpus import read_gpus; print(json.dumps(read_gpus(peers=True)))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def paths(env: dict[str, str]) -> dict[tuple[int, int], tuple[str | None, bool | None]]:
    pairs = read_with_peers(env)["peers"]
    return {(one["gpu_index"], one["peer_index"]): (one["path"], one["p2p"]) for one in pairs}


def test_links_through_switches_are_counted_as_nvidia_smi_counts_them(fake_nvml: Environment) -> None:
    assert paths(fake_nvml("two-h200")) == {(0, 1): ("NV18", True)}


def test_bridges_join_pairs_and_the_rest_goes_over_the_system(fake_nvml: Environment) -> None:
    found = paths(fake_nvml("bridged-a6000"))
    assert len(found) == 6
    assert found[0, 1] == found[2, 3] == ("NV4", True)
    assert {found[pair] for pair in found if pair not in ((0, 1), (2, 3))} == {("SYS", False)}


def test_pcie_boxes_tell_sockets_apart_and_that_p2p_is_refused(fake_nvml: Environment) -> None:
    found = paths(fake_nvml("eight-4090-48g"))
    assert len(found) == 28
    assert (found[0, 3], found[3, 4]) == (("NODE", False), ("SYS", False))


@pytest.mark.parametrize("status", [[0, 6], None])
def test_p2p_that_the_driver_does_not_tell_is_none(variant: Variant, status: list[int] | None) -> None:
    key = {"p2p_read": status} if status else {"p2p_read": refused("NOT_SUPPORTED")}
    assert paths(variant("two-h200", **key)) == {(0, 1): ("NV18", None)}


def test_peers_without_any_answer_are_unknown(fake_nvml: Environment) -> None:
    assert paths(fake_nvml("mixed")) == {(0, 1): (None, None)}


def test_every_call_of_the_fake_is_one_that_the_probe_makes(fake_nvml: Environment) -> None:
    """Only nvmlErrorString is never asked: pynvml knows the words of the usual codes."""
    made = set()
    for name in ("eight-4090-48g", "no-memory-v2", "driver-mismatch"):
        env = fake_nvml(name)
        answer(env)
        made |= set(calls(env))
    for name in ("eight-4090-48g", "bridged-a6000"):
        env = fake_nvml(name)
        read_with_peers(env)
        made |= set(calls(env))
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(Path(env["FAKE_NVML_FACTS"]).parent / LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {one for one in symbols if one.startswith("nvml")} - made == {"nvmlErrorString"}


def test_a_misspelt_key_in_a_facts_file_is_an_error() -> None:
    with pytest.raises(KeyError, match="nvlink is no key"):
        facts_lines({"gpus": [{"nvlink": [1]}]})


def test_every_recorded_facts_file_is_readable_and_says_where_it_is_from() -> None:
    for path in sorted(RECORDED.glob("*.json")):
        facts = json.loads(path.read_text())
        assert facts["source"], path
        assert facts_lines(facts), path
    assert SOURCE.exists()


def meminfo(name: str) -> int:
    rows = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return next(int(row[1]) * KIB for row in rows if row[0] == f"{name}:")
