"""Hardware as words and as files: the grammar, and one sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmplan.errors import UsageError
from glmplan.facts.gpu import GpuProblem
from glmplan.facts.host import Host, Inventory
from glmplan.facts.inventory import declared_inventory, default_inventory, inventory_text, read_inventory
from glmplan.facts.profiles import gpu_profile, gpu_profiles
from glmplan.facts.system import System
from glmplan.planning.network import with_links
from glmplan.probe.remote import to_host
from glmplan.units import GIB


def shape(text: str, nodes: int | None = None, per_node: int | None = None) -> list[list[str | None]]:
    return [[gpu.profile for gpu in host.gpus] for host in declared_inventory(text, nodes, per_node).hosts]


@pytest.mark.parametrize("text", ["8x h200", "8X H200", "8 x h200", "8*h200", "  8x   h200 ", "8x\th200"])
def test_count_and_name_in_every_spelling(text):
    assert shape(text) == [["h200"] * 8]


def test_a_name_alone_is_one_gpu():
    assert shape("h200") == [["h200"]]


def test_whole_nodes_of_the_usual_size_and_the_rest():
    assert [len(host) for host in shape("20x h200")] == [8, 8, 4]
    assert [len(host) for host in shape("20x h200", None, 4)] == [4] * 5
    assert [len(host) for host in shape("3x gb10")] == [1, 1, 1]


def test_nodes_share_alike():
    assert [len(host) for host in shape("24x h200", 3)] == [8, 8, 8]
    assert [len(host) for host in shape("24x h200", 6)] == [4] * 6


def test_groups_stand_on_hosts_of_their_own_or_all_on_one():
    assert shape("8x rtx-4090-48g + 8x rtx-5090") == [["rtx-4090-48g"] * 8, ["rtx-5090"] * 8]
    assert shape("2x rtx-4090-48g+1x rtx-5090", 1) == [["rtx-4090-48g", "rtx-4090-48g", "rtx-5090"]]


def test_gpus_are_numbered_within_their_host():
    for host in declared_inventory("16x h200", 2, None).hosts:
        assert [gpu.index for gpu in host.gpus] == list(range(8))


def test_hosts_are_numbered_and_declared():
    found = declared_inventory("16x h200", 2, None)
    assert [host.name for host in found.hosts] == ["host0", "host1"]
    assert found.origin == "declared"
    assert found.gpu_count == 16


def test_the_default_is_three_nodes_of_eight_4090s():
    found = default_inventory()
    assert found.origin == "default"
    assert [[gpu.profile for gpu in host.gpus] for host in found.hosts] == [["rtx-4090-48g"] * 8] * 3


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "words"),
    [
        ("", None, None, "cannot be read at ''"),
        ("eight h200", None, None, "cannot be read at 'eight h200'"),
        ("8x h200 +", None, None, "cannot be read at ''"),
        ("-8x h200", None, None, "cannot be read at '-8x h200'"),
        ("8.5x h200", None, None, "cannot be read at '8.5x h200'"),
        ("0x h200", None, None, "names 0 GPUs"),
        ("8x h200 + 0x rtx-5090", None, None, "names 0 GPUs"),
        ("5000x h200", None, None, "names 5,000 GPUs; 4,096 is the limit"),
        ("24x h200", 5, None, "does not divide over 5 nodes"),
        ("24x h200", 0, None, "--nodes is 0"),
        ("8x h200 + 8x rtx-5090", 3, None, "makes 2 hosts, but --nodes is 3"),
    ],
)
def test_what_cannot_be_read_is_named(text, nodes, per_node, words):
    with pytest.raises(UsageError) as raised:
        declared_inventory(text, nodes, per_node)
    assert words in raised.value.message
    assert raised.value.next_step


@pytest.mark.parametrize(("nodes", "per_node"), [(None, 0), (None, -8), (3, 4)])
def test_gpus_per_node_must_be_positive_and_agree_with_nodes(nodes, per_node):
    with pytest.raises(UsageError):
        declared_inventory("24x h200", nodes, per_node)


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(UsageError, match="No GPU profile is named 'rtx-4090'") as raised:
        declared_inventory("8x rtx-4090", None, None)
    assert "rtx-4090-48g" in raised.value.next_step
    assert "rtx-4090-24g" in raised.value.next_step


GOOD = """
schema_version = 1

[[hosts]]
name = "alpha"
address = "10.0.0.1"

[[hosts.gpus]]
profile = "rtx-4090-48g"
count = 7

[[hosts.gpus]]
profile = "rtx-4090-48g"
in_use = "6 GiB"

[[hosts]]
name = "beta"

[[hosts.gpus]]
index = 3
name = "NVIDIA Strange"
sm = 89
memory_total_bytes = 50000000000
memory_usable_bytes = 49000000000
memory_in_use_bytes = 1000000000
"""


def test_a_file_gives_names_addresses_counts_and_memory_in_use(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text(GOOD)
    found = read_inventory(path)
    alpha, beta = found.hosts
    assert found.origin == "file"
    assert (alpha.name, alpha.address, len(alpha.gpus)) == ("alpha", "10.0.0.1", 8)
    assert [gpu.memory_in_use_bytes for gpu in alpha.gpus] == [0] * 7 + [6 * GIB]
    assert [gpu.index for gpu in alpha.gpus] == list(range(8))
    usable = gpu_profile("rtx-4090-48g").memory_usable_bytes.value
    assert usable is not None
    assert alpha.gpus[7].available_bytes == usable - 6 * GIB
    assert (beta.gpus[0].index, beta.gpus[0].available_bytes) == (3, 48_000_000_000)


GPU = '[[hosts]]\n[[hosts.gpus]]\nprofile = "h200"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[hosts", "is not TOML"),
        ("", "has no [[hosts]]"),
        ("hosts = []", "has no [[hosts]]"),
        ("hosts = [5]", "hosts entry 0 is not a table"),
        ('[[host]]\nname = "a"', "unknown key 'host'"),
        (f"schema_version = 2\n{GPU}", "schema_version is 2"),
        ('[[hosts]]\nname = "a"\ngpu = 8', "host a: gpu: extra inputs are not permitted"),
        (GPU + "coutn = 8", "host host0: unknown key 'coutn'"),
        (GPU + "count = 0", "count is 0, not 1 to 64"),
        (GPU + "count = 65", "count is 65, not 1 to 64"),
        (GPU + 'count = "8"', "count is '8', not 1 to 64"),
        (GPU + 'in_use = "much"', "in_use 'much' is not a size"),
        (GPU + 'in_use = "-1 GiB"', "in_use '-1 GiB' is not a size"),
        ("[[hosts]]\n[[hosts.gpus]]\ncount = 8", "a gpus entry has no profile"),
        ('[[hosts]]\n[[hosts.gpus]]\nprofile = "h201"', "No GPU profile is named 'h201'"),
        ("[[hosts]]\ngpus = [5]", "a gpus entry is not a table"),
        ('[[hosts]]\n[[hosts.gpus]]\nname = "x"\nindex = 0\nmemory_total_bytes = 5', "memory_usable_bytes: field required"),
        ('[[hosts]]\nname = "a"\n[[hosts]]\nname = "a"', "two hosts have the same name"),
        (
            GPU + '[[hosts.gpus]]\nname = "x"\nindex = 0\nmemory_total_bytes = 5\nmemory_usable_bytes = 5',
            "two GPUs have the same index",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "hosts.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_inventory(path)
    assert words in raised.value.message
    assert raised.value.next_step


def test_gpus_that_are_no_list_are_one_sentence(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text("[[hosts]]\ngpus = 5")
    with pytest.raises(UsageError, match="gpus"):
        read_inventory(path)


RECORDED = Path(__file__).parents[1] / "recorded" / "hosts"


def saved_and_read(inventory: Inventory, path: Path) -> Inventory:
    path.write_text(inventory_text(inventory))
    return read_inventory(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.json")))
def test_a_probed_host_is_read_back_equal(tmp_path, name):
    answer = json.loads((RECORDED / f"{name}.json").read_text())
    hosts = with_links([to_host(answer, name, gpu_profiles(), (0.0, 1.0))])
    found = saved_and_read(Inventory(origin="probe", hosts=hosts), tmp_path / "inventory.toml")
    assert found.hosts == hosts
    assert found.origin == "file"


def test_a_declared_inventory_is_read_back_equal(tmp_path):
    declared = declared_inventory("8x rtx-4090-48g + 2x gb10", None, None)
    assert saved_and_read(declared, tmp_path / "inventory.toml").hosts == declared.hosts


def test_hosts_without_gpus_and_odd_words_are_read_back_equal(tmp_path):
    system = System(
        os_name='a "quoted"\\ name\n',
        limits={"open_files": None, "processes": 5},
        ephemeral_ports=(1, 2),
        environment={"A.B": "é"},
    )
    problem = GpuProblem(kind="no-driver", message="none")
    hosts = (Host(name="a", gpu_problem=problem, network={"NCCL_SOCKET_IFNAME": "=eth0"}, system=system), Host(name="b"))
    assert saved_and_read(Inventory(hosts=hosts), tmp_path / "inventory.toml").hosts == hosts
