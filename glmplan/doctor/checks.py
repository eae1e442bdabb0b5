"""The table of all checks: name, what it asks, level, and the function that answers from what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from glmplan.doctor import deep, files, gpus, machine, network, software
from glmplan.doctor.finding import FLEET, Finding, Verdict
from glmplan.doctor.seen import Seen
from glmplan.errors import UsageError
from glmplan.facts.host import Host
from glmplan.units import nearest

PerHost = Callable[[Host, Seen], Verdict]
PerFleet = Callable[[Seen], Verdict]
Need = Literal["facts", "model", "ports", "paths", "disk", "kernels", "copies", "ranks"]


@dataclass(frozen=True)
class Check:
    """`judge` answers for one host, `judge_all` for all together; `need` is what has to be tried first."""

    name: str
    title: str
    judge: PerHost | None = None
    judge_all: PerFleet | None = None
    level: Literal["quick", "deep"] = "quick"
    need: Need = "facts"


REACHABLE = "reachable"
REACHABLE_TITLE = "the host answers, and runs the node program"

CHECKS: tuple[Check, ...] = (
    Check(REACHABLE, REACHABLE_TITLE),
    Check("gpus", "the planned GPUs are there", gpus.present),
    Check("gpu-memory", "the GPUs have the memory their ranks need", gpus.memory),
    Check("gpu-processes", "nobody else computes on the GPUs", gpus.foreign_processes),
    Check("mig", "no GPU is cut into MIG instances", gpus.mig),
    Check("ecc", "ECC is the same on all GPUs", gpus.ecc),
    Check("pcie", "every GPU has its PCIe lanes", gpus.pcie),
    Check("nvlink", "equal GPUs have equally many NVLinks up", gpus.nvlink),
    Check("peer-access", "GPUs of a node reach each other directly", gpus.peer_access),
    Check("iommu", "neither IOMMU nor ACS stands between GPUs on PCIe", machine.iommu),
    Check("power", "equal GPUs have equal power limits", gpus.power),
    Check("throttling", "no GPU is slowed by heat or power supply", gpus.throttling),
    Check("driver", "the driver suits the CUDA of torch", software.driver),
    Check("engine", "the planned engine and version are installed", software.engine),
    Check("versions", "engine, torch, NCCL and driver are equal on all hosts", judge_all=software.versions_equal),
    Check("nvcc", "CUDA's compiler is there where kernels are compiled at start", software.nvcc),
    Check("environment", "no variable of the login contradicts the launch", software.environment),
    Check("model-files", "the checkpoint is whole", files.model_files, need="model"),
    Check("model-equal", "all hosts have the same checkpoint", judge_all=files.models_equal, need="model"),
    Check("disk-space", "there is room for logs, caches and missing files", files.disk_space, need="model"),
    Check("memory", "the host has memory for the ranks' processes", machine.memory),
    Check("shared-memory", "/dev/shm is large enough for NCCL", machine.shared_memory),
    Check("swap", "the host does not live in swap", machine.swap),
    Check("limits", "limits on files, locked memory and processes suffice", machine.limits),
    Check("leftovers", "no engine of an earlier run is left", machine.leftovers),
    Check("clock", "the clock agrees with this machine's", machine.clock),
    Check("hostname", "the host's name does not resolve to loopback", network.hostname),
    Check("interface", "one interface joins the hosts; NCCL and gloo are told which", network.interface),
    Check("mtu", "all hosts use one MTU", judge_all=network.mtu_equal),
    Check("rdma", "InfiniBand and RoCE ports are up", network.rdma),
    Check("exposure", "the rendezvous is not on a public interface", network.exposure),
    Check("ports", "the launch's TCP ports are free", network.ports_free, need="ports"),
    Check("paths", "the other hosts reach the rendezvous port and an ephemeral one", network.paths, need="paths"),
    Check("disk-read", "the model folder is read fast enough", files.disk_read, level="deep", need="disk"),
    Check("kernels", "glmplan's kernels are right on every GPU", deep.kernels, level="deep", need="kernels"),
    Check("copies", "copies between GPUs deliver the right bytes", deep.copies, level="deep", need="copies"),
    Check("all-reduce", "all ranks add up right values", judge_all=deep.all_reduce, level="deep", need="ranks"),
    Check("links", "every link has its latency and bandwidth", deep.links, level="deep", need="ranks"),
)


def chosen(only: str | None, with_deep: bool) -> tuple[Check, ...]:
    """The checks to run: all of the level, or those of `--only a,b`; an unknown name is refused."""
    if only is None:
        return tuple(check for check in CHECKS if with_deep or check.level == "quick")
    known = {check.name: check for check in CHECKS}
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = next((name for name in names if name not in known), None)
    if not names:
        raise UsageError(f"--only {only!r} names no check.", "glmplan doctor --list shows their names.")
    if unknown is not None:
        raise UsageError(f"--only {only!r}: there is no check {unknown!r}.", nearest(unknown, list(known)))
    shallow = next((name for name in names if known[name].level == "deep" and not with_deep), None)
    if shallow is not None:
        raise UsageError(f"--only {shallow} is a deep check.", "Add --deep.")
    return tuple(check for check in CHECKS if check.name in names)


def judge(seen: Seen, checks: Iterable[Check]) -> tuple[Finding, ...]:
    """Findings of all checks, host by host in the order given, then those about all hosts."""
    checks = tuple(checks)
    by_name = {host.name: host for host in seen.hosts}
    found: list[Finding] = []
    for name in seen.names or tuple(by_name):
        if name in seen.unreachable:
            error = seen.unreachable[name]
            found.append(
                Finding(
                    check=REACHABLE,
                    title=REACHABLE_TITLE,
                    host=name,
                    status="fail",
                    evidence=error.message,
                    repair=error.next_step,
                )
            )
            continue
        found += [_finding(check, name, _judged(check, by_name[name], seen)) for check in checks if check.judge_all is None]
    if len(seen.hosts) > 1:
        found += [_finding(check, FLEET, check.judge_all(seen)) for check in checks if check.judge_all is not None]
    elif seen.hosts:
        own = [check for check in checks if check.judge_all is not None]
        found += [_finding(check, seen.hosts[0].name, check.judge_all(seen)) for check in own if check.judge_all]
    return tuple(found)


def _judged(check: Check, host: Host, seen: Seen) -> Verdict:
    if check.judge is not None:
        return check.judge(host, seen)
    system = host.system
    words = (
        f"{system.user or 'someone'} at {host.hostname or host.name}, Python {system.python_version}"
        if system
        else "facts given"
    )
    return Verdict("ok", words)


def _finding(check: Check, host: str, verdict: Verdict) -> Finding:
    return Finding(
        check=check.name,
        title=check.title,
        host=host,
        status=verdict.status,
        evidence=verdict.evidence,
        repair=verdict.repair,
    )
