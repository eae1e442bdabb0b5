"""Every packaged GPU profile is well formed, has its sources, and is recognised from NVML's name and memory alone."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from glmplan.facts.base import Sourced
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.units import MIB

FOLDER = Path(__file__).resolve().parents[2] / "profiles" / "gpus"

NAMES = {
    "rtx-3090", "rtx-4090-24g", "rtx-4090-48g", "rtx-5090", "rtx-6000-ada", "rtx-pro-6000", "rtx-pro-6000-server",
    "rtx-pro-6000-max-q", "a6000", "a40", "l40s", "a100-40g", "a100-80g", "h100-80g", "h20", "h200", "gh200-96g",
    "gh200-144g", "b200", "b300", "gb200", "gb300", "gb10", "mi300x", "mi355x",
}  # fmt: skip

# What nvidia-smi or rocm-smi prints as name, its total in MiB, and the profile that must be found.
PRINTED = [
    ("NVIDIA GeForce RTX 3090", 24576, "rtx-3090"),
    ("NVIDIA GeForce RTX 3090", 24268, "rtx-3090"),
    ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24g"),
    ("NVIDIA GeForce RTX 4090", 49140, "rtx-4090-48g"),
    ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
    ("NVIDIA RTX 6000 Ada Generation", 46068, "rtx-6000-ada"),
    ("NVIDIA L40S", 46068, "l40s"),
    ("NVIDIA L40S", 49140, "l40s"),
    ("NVIDIA RTX A6000", 49140, "a6000"),
    ("RTX A6000", 46068, "a6000"),
    ("NVIDIA A40", 46068, "a40"),
    ("NVIDIA A40", 45634, "a40"),
    ("NVIDIA A100-SXM4-40GB", 40960, "a100-40g"),
    ("NVIDIA A100-PCIE-40GB", 40960, "a100-40g"),
    ("A100-SXM4-40GB", 40536, "a100-40g"),
    ("NVIDIA A100-SXM4-80GB", 81920, "a100-80g"),
    ("NVIDIA A100 80GB PCIe", 81920, "a100-80g"),
    ("NVIDIA A800-SXM4-80GB", 81920, "a100-80g"),
    ("NVIDIA H100 80GB HBM3", 81559, "h100-80g"),
    ("NVIDIA H100 PCIe", 81559, "h100-80g"),
    ("NVIDIA H20", 97871, "h20"),
    ("NVIDIA H200", 143771, "h200"),
    ("NVIDIA H200 NVL", 143771, "h200"),
    ("NVIDIA GH200 480GB", 97871, "gh200-96g"),
    ("NVIDIA GH200 120GB", 97871, "gh200-96g"),
    ("NVIDIA GH200 144G HBM3e", 146831, "gh200-144g"),
    ("NVIDIA B200", 183359, "b200"),
    ("NVIDIA B300 SXM6 AC", 275040, "b300"),
    ("NVIDIA GB200", 189471, "gb200"),
    ("NVIDIA GB300", 284208, "gb300"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx-pro-6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "rtx-pro-6000-server"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "rtx-pro-6000-max-q"),
    ("NVIDIA GB10", 131072, "gb10"),
    ("NVIDIA GB10", 122500, "gb10"),
    ("AMD Instinct MI300X", 196592, "mi300x"),
    ("AMD Instinct MI300X OAM", 196592, "mi300x"),
    ("AMD Instinct MI355X", 294896, "mi355x"),
]

# Real devices that share a word with a profile and are something else.
STRANGERS = [
    ("NVIDIA GeForce RTX 3090 Ti", 24564),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376),
    ("NVIDIA GeForce RTX 4090 D", 24564),
    ("NVIDIA L40", 46068),
    ("NVIDIA A4000", 16376),
    ("NVIDIA H100 NVL", 95830),
    ("NVIDIA H20", 143771),
    ("AMD Instinct MI325X", 262128),
]

SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
    121: 101_376,
}
LDS = {"AMD gfx942": 65_536, "AMD gfx950": 163_840}


def load(path: Path) -> GpuProfile:
    return GpuProfile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


PROFILES = {path.stem: load(path) for path in sorted(FOLDER.glob("*.toml"))}


def found(name: str, memory_mib: int) -> list[str]:
    return [stem for stem, profile in PROFILES.items() if profile.matches(name, memory_mib * MIB)]


@pytest.fixture(params=sorted(PROFILES))
def profile(request: pytest.FixtureRequest) -> GpuProfile:
    return PROFILES[request.param]


def test_the_expected_profiles_are_there() -> None:
    assert set(PROFILES) >= NAMES


def test_the_file_is_named_after_the_profile() -> None:
    assert {stem: profile.name for stem, profile in PROFILES.items()} == {stem: stem for stem in PROFILES}


def test_titles_are_unique() -> None:
    assert len({profile.title for profile in PROFILES.values()}) == len(PROFILES)


def test_every_source_says_something(profile: GpuProfile) -> None:
    fields = [getattr(profile, name) for name in GpuProfile.model_fields]
    sources = [field.source for field in fields if isinstance(field, Sourced)] + [profile.link.source]
    assert len(sources) == 9
    assert all(len(source.strip()) >= 8 for source in sources)


def test_usable_memory_is_known_and_below_the_total(profile: GpuProfile) -> None:
    total, usable = profile.memory_total_bytes.value, profile.memory_usable_bytes.value
    assert total is not None
    assert usable is not None
    assert 0.9 * total < usable < total


def test_total_memory_lies_in_the_range_that_identifies_the_card(profile: GpuProfile) -> None:
    low, high = profile.nvml_memory_mib
    assert profile.memory_total_bytes.value is not None
    assert low <= profile.memory_total_bytes.value // MIB <= high


def test_narrower_numbers_are_never_slower(profile: GpuProfile) -> None:
    rates = [profile.bf16_flop_per_s.value, profile.fp8_flop_per_s.value, profile.fp4_flop_per_s.value]
    known = [rate for rate in rates if rate is not None]
    assert known
    assert known == sorted(known)


def test_bandwidth_is_known(profile: GpuProfile) -> None:
    assert profile.memory_bandwidth_bytes_per_s.value is not None


def test_shared_memory_agrees_with_the_architecture(profile: GpuProfile) -> None:
    sm = profile.sm.value
    expected = LDS[profile.sm.source] if sm is None else SHARED_MEMORY[sm]
    assert profile.shared_memory_per_block_bytes.value == expected


def test_fp8_and_fp4_rates_exist_only_where_the_tensor_cores_do(profile: GpuProfile) -> None:
    if profile.sm.value is not None:
        assert (profile.fp8_flop_per_s.value is not None) == (profile.sm.value >= 89)
        assert (profile.fp4_flop_per_s.value is not None) == (profile.sm.value >= 100)


def test_amd_boards_are_sized_but_not_served(profile: GpuProfile) -> None:
    amd = profile.vendor == "amd"
    assert (profile.support == "size-only") == amd
    assert (profile.sm.value is None) == amd


def test_only_gb10_has_unified_memory() -> None:
    assert [stem for stem, profile in PROFILES.items() if profile.unified_memory] == ["gb10"]


@pytest.mark.parametrize(("name", "memory_mib", "expected"), PRINTED)
def test_a_printed_name_and_memory_find_one_profile(name: str, memory_mib: int, expected: str) -> None:
    assert found(name, memory_mib) == [expected]
    assert found(name.lower(), memory_mib) == [expected]


@pytest.mark.parametrize(("name", "memory_mib"), STRANGERS)
def test_a_similar_device_finds_none(name: str, memory_mib: int) -> None:
    assert found(name, memory_mib) == []


def test_every_profile_is_reached_by_a_printed_name() -> None:
    assert {expected for _, _, expected in PRINTED} == set(PROFILES)


def test_no_two_profiles_share_a_name_and_a_memory_size() -> None:
    edges = {edge for profile in PROFILES.values() for edge in profile.nvml_memory_mib}
    names = {name for name, _, _ in PRINTED}
    shared = {(name, edge): found(name, edge) for name in names for edge in edges}
    assert {key: stems for key, stems in shared.items() if len(stems) > 1} == {}
