"""Profiles by name: all packaged ones are valid, the user's win, and a typo is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmplan.errors import UsageError
from glmplan.facts import profiles
from glmplan.facts.gpu_profile import GpuProfile
from glmplan.model.tensors import Role

PACKAGED = Path(__file__).resolve().parents[2] / "profiles"
PROOF = """
schema_version = 1
[[runs]]
engine = "sglang"
engine_version = "0.5.23"
glmplan_version = "0.1.0"
gpu = "made up"
sm = 90
compiled_for = COMPILED
kv_format = "fp8_packed"
scheme = "fp8"
date = "2026-11-20"
record = "docs/proof/made-up.json"
checks = [{ id = "agreement", holds = true }]
"""
ENGINES = sorted(path.stem for path in (PACKAGED / "engines").glob("*.toml"))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's that holds profiles and is named by GLMPLAN_PROFILES."""
    for kind in ("gpus", "models", "engines"):
        (tmp_path / kind).mkdir()
    monkeypatch.setenv("GLMPLAN_PROFILES", str(tmp_path))
    return tmp_path


@pytest.fixture
def _no_extra_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles given with --profile stay for the process; a test's own must not."""
    monkeypatch.setattr(profiles, "_extra_gpus", {})


def changed(kind: str, name: str, old: str, new: str) -> str:
    """A packaged profile with one change."""
    text = (PACKAGED / kind / f"{name}.toml").read_text()
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_every_packaged_engine_is_valid_and_named_after_its_file(name):
    found = profiles.engine_profile(name)
    assert found.id == name
    assert found.family == name.split("-")[0]
    assert found.chunk_by_memory[-1][0] == 0, "the last entry has no bound"
    assert {"mem_fraction", "chunk", "graph_max_bs", "disable_graphs", "attention_dp"} <= found.flags.keys()


@pytest.mark.parametrize("name", profiles.model_names())
def test_every_packaged_checkpoint_has_a_rule_for_known_roles(name):
    model = profiles.model_profile(name)
    assert model.name == name
    for checkpoint in model.checkpoints:
        named = {role for entry in checkpoint.rules for role in entry.roles} | set(checkpoint.f32_roles)
        assert named <= set(Role)
        assert profiles.checkpoint_profile(model, checkpoint.name) is checkpoint


def test_aliases_are_the_newest_versions():
    assert profiles.engine_profile("sglang").id == "sglang-0.5.23"
    assert profiles.engine_profile("vllm").id == "vllm-0.33.0"


def test_a_typo_in_a_key_is_one_sentence_with_file_and_key(mine):
    path = mine / "gpus" / "h200.toml"
    path.write_text(changed("gpus", "h200", "gpus_per_node", "gpus_pr_node"))
    with pytest.raises(UsageError) as raised:
        profiles.gpu_profile("h200")
    assert raised.value.message.startswith(f"{path}: gpus_p")
    assert "\n" not in raised.value.message


def test_a_typo_in_an_engine_s_table_names_the_whole_key(mine):
    path = mine / "engines" / "vllm-0.33.0.toml"
    path.write_text(changed("engines", "vllm-0.33.0", "relays_topk = false", "relays_top = false"))
    with pytest.raises(UsageError, match=r"vllm-0\.33\.0\.toml: parallel\.relays_top"):
        profiles.engine_profile("vllm")


def test_an_attention_option_must_name_a_kv_format(mine):
    text = changed("engines", "vllm-0.33.0", 'kv_format = "fp8_raw"', 'kv_format = "fp8_row"')
    (mine / "engines" / "vllm-0.33.0.toml").write_text(text)
    with pytest.raises(UsageError, match="names kv_format 'fp8_row'"):
        profiles.engine_profile("vllm")


def test_a_profile_cannot_call_itself_proven(mine):
    text = changed("engines", "vllm-0.33.0", 'evidence = "expected"', 'evidence = "proven"')
    (mine / "engines" / "vllm-0.33.0.toml").write_text(text)
    with pytest.raises(UsageError, match=r"attention\.\d+\.evidence"):
        profiles.engine_profile("vllm")


def test_proof_comes_from_the_packaged_records_of_that_version_alone(mine, monkeypatch):
    (mine / "proof").mkdir()
    run = PROOF.replace("COMPILED", "89")
    (mine / "proof" / "sglang-0.5.23.toml").write_text(run)
    assert not [found for found in profiles.engine_profile("sglang").proof if found.gpu == "made up"]
    packaged = mine / "packaged"
    for kind in ("engines", "proof"):
        (packaged / kind).mkdir(parents=True)
    for name in ("sglang-0.5.23", "sglang-0.5.13.post1"):
        (packaged / "engines" / f"{name}.toml").write_text((PACKAGED / "engines" / f"{name}.toml").read_text())
    (packaged / "proof" / "sglang-0.5.23.toml").write_text(run)
    monkeypatch.setattr(profiles, "packaged_folder", lambda: packaged)
    assert [found.gpu for found in profiles.engine_profile("sglang").proof] == ["made up"]
    assert profiles.engine_profile("sglang-0.5.13.post1").proof == ()


@pytest.mark.parametrize(("rule", "words"), [('roles = ["routed_expert"]', "routed_expert"), ('layers = "77-3"', "77-3")])
def test_a_rule_that_matches_nothing_is_refused(mine, rule, words):
    old = 'roles = ["routed_experts"]\nlayers = "3-77"'
    new = f"{rule}\n" + ('layers = "3-77"' if "roles" in rule else 'roles = ["routed_experts"]')
    (mine / "models" / "glm-5.2.toml").write_text(changed("models", "glm-5.2", old, new))
    with pytest.raises(UsageError, match=words):
        profiles.checkpoint_profile(profiles.model_profile("glm-5.2"), "nvfp4").storage_rules()


@pytest.mark.parametrize(
    ("content", "problem"), [(b"name = ", "is not TOML"), (b"\xff\xfe", "cannot be read"), (b"", "field required")]
)
def test_a_file_that_is_no_profile_is_named(mine, content, problem):
    path = mine / "gpus" / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as raised:
        profiles.gpu_profile("mine")
    assert raised.value.message.startswith(str(path))


def test_the_user_s_folder_wins(mine):
    (mine / "gpus" / "h200.toml").write_text(changed("gpus", "h200", "gpus_per_node = 8", "gpus_per_node = 4"))
    assert profiles.gpu_profile("h200").gpus_per_node == 4
    assert profiles.gpu_profile("h20").gpus_per_node == 8


def test_a_new_name_in_the_user_s_folder_is_known(mine):
    (mine / "gpus" / "my-card.toml").write_text(changed("gpus", "h200", 'name = "h200"', 'name = "my-card"'))
    assert profiles.gpu_profile("my-card").name == "my-card"
    assert "my-card" in profiles.gpu_names()
    assert "my-card" in {profile.name for profile in profiles.gpu_profiles()}


def test_the_last_of_several_folders_wins(tmp_path, monkeypatch):
    for number in (1, 2):
        folder = tmp_path / str(number) / "gpus"
        folder.mkdir(parents=True)
        text = changed("gpus", "h200", "gpus_per_node = 8", f"gpus_per_node = {number}")
        (folder / "h200.toml").write_text(text)
    monkeypatch.setenv("GLMPLAN_PROFILES", f"{tmp_path / '1'}:{tmp_path / '2'}")
    assert profiles.gpu_profile("h200").gpus_per_node == 2


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMPLAN_PROFILES", str(tmp_path / "nope"))
    with pytest.raises(UsageError, match="which is not a folder"):
        profiles.gpu_names()


@pytest.mark.usefixtures("_no_extra_gpus")
def test_a_profile_given_by_path_wins_for_this_process(tmp_path):
    path = tmp_path / "h200.toml"
    path.write_text(changed("gpus", "h200", "gpus_per_node = 8", "gpus_per_node = 2"))
    assert isinstance(profiles.add_gpu_profile(path), GpuProfile)
    assert profiles.gpu_profile("h200").gpus_per_node == 2
    assert next(profiles.gpu_profiles()).gpus_per_node == 2


@pytest.mark.usefixtures("_no_extra_gpus")
def test_a_profile_without_memory_is_refused(tmp_path):
    text = (PACKAGED / "gpus" / "h200.toml").read_text()
    head, tail = text.split("[memory_usable_bytes]\n")
    path = tmp_path / "mine.toml"
    path.write_text(head + "[memory_usable_bytes]\n" + tail.split("\n", 1)[1])
    with pytest.raises(UsageError, match="memory_usable_bytes is None"):
        profiles.add_gpu_profile(path)


@pytest.mark.parametrize(
    ("find", "name", "near"),
    [
        (profiles.gpu_profile, "rtx4090", "rtx-4090-48g"),
        (profiles.engine_profile, "sglan", "sglang"),
        (profiles.model_profile, "glm5.2", "glm-5.2"),
        (lambda name: profiles.checkpoint_profile(profiles.model_profile("glm-5.2"), name), "awq-int", "awq-int4"),
    ],
)
def test_an_unknown_name_suggests_near_ones(find, name, near):
    with pytest.raises(UsageError, match=f"named '{name}'") as raised:
        find(name)
    assert near in raised.value.next_step


def test_a_name_near_nothing_lists_the_known_ones():
    with pytest.raises(UsageError) as raised:
        profiles.model_profile("qqqqqq")
    assert raised.value.next_step == "Known names: glm-5, glm-5.1, glm-5.2."
