"""Is the software there, of the right versions, equal everywhere, and undisturbed by the login's environment?"""

from __future__ import annotations

import re
from collections.abc import Callable

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.seen import Seen, on, released, system
from glmplan.facts.host import Host
from glmplan.facts.system import EngineEnvironment

NVCC_FOR_SM = {120: (12, 8), 121: (12, 9), 100: (12, 8), 103: (12, 9)}
"""The first CUDA toolkit whose nvcc knows an SM (CUDA release notes 12.8 and 12.9)."""
FOREIGN = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|LD_PRELOAD|PYTHONHOME|PYTHONPATH|CUDA_LAUNCH_BLOCKING"
)
"""Left by another launcher, or slowing and shadowing what the engine loads."""
SLOW_NCCL = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_ALGO": "", "NCCL_PROTO": ""}
"""Variables that hold NCCL back; an empty value stands for any."""


def version(text: str | None) -> tuple[int, ...]:
    """`580.159.04` -> (580, 159, 4); empty when unknown."""
    return tuple(int(part) for part in re.findall(r"\d+", text or "")[:4])


def driver(host: Host, seen: Seen) -> Verdict:
    """The driver is new enough for the CUDA that the engine's torch was built with."""
    if host.driver_version is None:
        return skip("no NVIDIA driver answers")
    engine = seen.engine(host)
    words = f"driver {host.driver_version}, CUDA up to {host.cuda_version or 'unknown'}"
    if engine is None or not engine.cuda_version or not host.cuda_version:
        return ok(words)
    if version(engine.cuda_version)[:1] > version(host.cuda_version)[:1]:
        return fail(
            f"{words}; torch {engine.torch_version} was built for CUDA {engine.cuda_version}",
            on(host, "install a newer driver (CUDA 13 needs 580 or newer), or an engine built for CUDA 12"),
        )
    return ok(f"{words}; torch needs CUDA {engine.cuda_version}")


def engine(host: Host, seen: Seen) -> Verdict:
    """The planned engine, in the planned version, is installed in some Python of the host."""
    found, plan = seen.engine(host), seen.plan
    if found is not None and (plan is None or released(found.engine_version) == released(plan.engine_version)):
        return ok(_words(found))
    if plan is None:
        return warn(
            "no Python with SGLang or vLLM was found", on(host, "python3 -m venv ~/venv && ~/venv/bin/pip install sglang")
        )
    wanted = f"{plan.engine_family}=={plan.engine_version}"
    python = found.python if found else "~/venv/bin/python3"
    repair = on(host, f"{python} -m pip install {wanted}" + ("" if found else "  (after: python3 -m venv ~/venv)"))
    if found is None:
        others = [_words(one) for one in system(host).engines if one.engine]
        return fail(f"no Python with {plan.engine_family} was found" + (f"; there is {others[0]}" if others else ""), repair)
    return fail(f"{_words(found)}; the plan is for {plan.engine_version}, with other flags and memory rules", repair)


def _words(found: EngineEnvironment) -> str:
    parts = [f"{found.engine} {found.engine_version}" if found.engine else "no engine"]
    parts += [f"torch {found.torch_version}"] if found.torch_version else []
    parts += [f"NCCL {found.nccl_version}"] if found.nccl_version else []
    return f"{', '.join(parts)} in {found.python}"


def versions_equal(seen: Seen) -> Verdict:
    """Engine, torch, NCCL, CUDA and driver are the same on every node."""
    if len(seen.hosts) < 2:
        return skip("one host")
    engines = {host.name: seen.engine(host) for host in seen.hosts}
    asked: dict[str, Callable[[Host], str | None]] = {
        "engine": lambda host: _name(engines[host.name]),
        "torch": lambda host: getattr(engines[host.name], "torch_version", None),
        "NCCL": lambda host: getattr(engines[host.name], "nccl_version", None),
        "CUDA of torch": lambda host: getattr(engines[host.name], "cuda_version", None),
        "driver": lambda host: host.driver_version,
    }
    same, differ = [], []
    for what, read in asked.items():
        found = {host.name: read(host) for host in seen.hosts}
        known = {value for value in found.values() if value is not None}
        if len(known) > 1:
            differ.append((what, ", ".join(f"{name} {value or 'none'}" for name, value in found.items())))
        elif known and None not in found.values():
            same.append(f"{what} {known.pop()}")
    if not differ:
        return ok(", ".join(same)) if same else skip("no version is known on all hosts")
    words = "; ".join(f"{what}: {values}" for what, values in differ)
    repair = "install the same versions on every node: pip install ENGINE==VERSION in each environment"
    return (
        warn(words, "install the same driver on every node") if [w for w, _ in differ] == ["driver"] else fail(words, repair)
    )


def _name(found: EngineEnvironment | None) -> str | None:
    return f"{found.engine} {found.engine_version}" if found else None


def nvcc(host: Host, seen: Seen) -> Verdict:
    """CUDA's compiler is there where the engine compiles kernels at the first start, and knows the GPUs."""
    facts, found = system(host), seen.engine(host)
    family = seen.plan.engine_family if seen.plan else (found.engine if found else None)
    if family is None or not host.gpus:
        return skip("no engine or no GPU to compile for")
    if facts.nvcc is None:
        words = "nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda"
        repair = on(host, "install the CUDA toolkit (cuda-nvcc) of torch's CUDA version, or set CUDA_HOME")
        if family == "sglang":
            return fail(f"{words}; SGLang compiles its top-k and indexer kernels with it", repair)
        return warn(f"{words}; vLLM needs it where FlashInfer or DeepGEMM compile kernels", repair)
    have = version(facts.nvcc_version)[:2]
    for sm in sorted({gpu.sm for gpu in seen.gpus(host) if gpu.sm}):
        needed = NVCC_FOR_SM.get(sm)
        if needed and have and have < needed:
            return fail(
                f"nvcc {facts.nvcc_version} does not know sm_{sm}; {needed[0]}.{needed[1]} is the first that does",
                on(host, f"install a CUDA toolkit of {needed[0]}.{needed[1]} or newer and point CUDA_HOME to it"),
            )
    return ok(f"nvcc {facts.nvcc_version or 'of unknown version'} at {facts.nvcc}")


def environment(host: Host, seen: Seen) -> Verdict:
    """The login's environment does not contradict what the launch sets, nor hold NCCL back."""
    found = system(host).environment
    node = seen.node(host)
    wanted = dict(node.network) if node is not None else {}
    if seen.plan is not None:
        wanted |= seen.plan.settings.attention_env
    against, odd = [], []
    for name, value in sorted(found.items()):
        if name in wanted and wanted[name] != value:
            against.append(f"{name}={value}, and the launch sets {wanted[name]}")
        elif name == "CUDA_VISIBLE_DEVICES" and node is not None and node.all_gpus_used:
            odd.append(f"{name}={value} hides GPUs from a plan that counts all of them")
        elif name == "CUDA_DEVICE_ORDER" and value != "PCI_BUS_ID":
            odd.append(f"{name}={value} numbers GPUs in another order than the driver")
        elif name in SLOW_NCCL and SLOW_NCCL[name] in ("", value):
            odd.append(f"{name}={value} holds NCCL back")
        elif FOREIGN.fullmatch(name):
            odd.append(f"{name}={value}")
    names = [words.split("=", 1)[0] for words in against + odd]
    if names:
        return warn(
            "; ".join((against + odd)[:6]),
            on(host, f"unset {' '.join(names)} (and in ~/.bashrc, ~/.profile or /etc/environment)"),
        )
    return ok(
        f"{len(found)} variables of engines, CUDA and NCCL are set; none gets in the way" if found else "nothing is set"
    )
