"""What the slow parts mean: kernels, copies between GPUs, the all-reduce of all ranks and its links. Pure.

Bandwidths are bytes/s. A link is slow when it has less than half of the median of its kind (inside a host, between hosts).
"""

from __future__ import annotations

from statistics import median
from typing import Any

from glmplan.doctor.finding import Verdict, fail, ok, skip, warn
from glmplan.doctor.gpus import numbers
from glmplan.doctor.schedule import Ranks, ranks_of
from glmplan.doctor.seen import Seen, on
from glmplan.errors import GlmplanError
from glmplan.facts.host import Host
from glmplan.transport.node import NodeFailedError
from glmplan.units import KIB, MIB

UNSUPPORTED = 4
SLOW_SHARE = 0.5


def _refusal(found: GlmplanError | dict[str, Any] | None, reason: str) -> Verdict | None:
    """The verdict where there is nothing to judge."""
    if found is None:
        return skip(reason)
    if isinstance(found, NodeFailedError) and found.kind == "no-torch":
        return skip(f"{found.message} {found.next_step}")
    if isinstance(found, GlmplanError):
        return fail(found.message, found.next_step)
    return None


def kernels(host: Host, seen: Seen) -> Verdict:
    """glmplan's kernels give right results on every GPU of the host."""
    answer = seen.deep.of("kernels", host.name)
    if refusal := _refusal(answer, "no GPU with room for it" if host.gpus else "no GPU"):
        return refusal
    assert isinstance(answer, dict)
    right, wrong, unable = [], [], []
    for gpu in answer["gpus"]:
        where, lines = f"GPU {gpu['gpu_index']}", gpu["lines"]
        if gpu["exit_status"] == 0:
            right.append((gpu["gpu_index"], sum(line.endswith(" yes") for line in lines), gpu["elapsed_s"]))
        elif gpu["exit_status"] == UNSUPPORTED:
            unable.append(f"{where}: {_last(gpu['err'])}")
        elif gpu["overran"]:
            wrong.append(f"{where} did not end in {gpu['elapsed_s']:.0f} s")
        else:
            bad = [" ".join(line.split()) for line in lines if line.endswith(" NO")]
            wrong.append(f"{where}: {'; '.join(bad[:3]) or _last(gpu['err'])}")
    python = answer["python"]
    if wrong:
        return fail("; ".join(wrong), on(host, f"CUDA_VISIBLE_DEVICES=N {python} -m glmplan.kernels.verify"))
    if unable:
        return skip("; ".join(unable))
    seconds = max(seconds for _, _, seconds in right)
    return ok(f"{right[0][1]} checks right on {numbers([index for index, _, _ in right])} in {seconds:.0f} s")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip() and "next:" not in line]
    return lines[-1][:300] if lines else "it said nothing"


def copies(host: Host, seen: Seen) -> Verdict:
    """Bytes copied from GPU to GPU arrive as they were sent."""
    answer = seen.deep.of("copies", host.name)
    if refusal := _refusal(answer, "fewer than two GPUs with room for it"):
        return refusal
    assert isinstance(answer, dict)
    repair = on(host, "export NCCL_P2P_DISABLE=1, or add iommu=pt to the kernel's command line and turn ACS off")
    pairs = answer["pairs"]
    wrong = [pair for pair in pairs if pair.get("wrong_elements") or pair.get("error")]
    if answer["stuck_at"] and answer["overran"]:
        source, target = answer["stuck_at"]
        return fail(f"the copy from GPU {source} to GPU {target} never ended", repair)
    if wrong:
        return fail("; ".join(_pair_words(pair) for pair in wrong[:4]), repair)
    if not pairs or answer["exit_status"]:
        return fail(f"the copies ended with status {answer['exit_status']}: {_last(answer['err'])}", on(host, "nvidia-smi"))
    rates = [pair["bytes_per_s"] for pair in pairs]
    direct = sum(pair["direct"] for pair in pairs)
    kind = "all direct" if direct == len(pairs) else f"{direct} direct, the others through host memory"
    return ok(f"{len(pairs)} pairs right by value, {kind}, {rate(min(rates))} to {rate(max(rates))}")


def _pair_words(pair: dict[str, Any]) -> str:
    problem = pair.get("error") or f"{pair['wrong_elements']:,} wrong values"
    return f"GPU {pair['source']} to {pair['target']}: {problem}"


def all_reduce(seen: Seen) -> Verdict:
    """All ranks join and add up right values, at what latency and bandwidth."""
    ranks, answers = ranks_of(seen), _rank_answers(seen)
    if not answers:
        refusals = [_refusal(seen.deep.of("ranks", host.name), "it did not run") for host in seen.hosts]
        return next((found for found in refusals if found), skip("it did not run"))
    found = [(host.name, seen.deep.of("ranks", host.name)) for host in seen.hosts]
    broken = [f"{name}: {error.message}" for name, error in found if isinstance(error, GlmplanError)]
    broken += [f"{ranks.label(one['rank'])}: {one['error']}" for one in answers if "error" in one]
    if broken:
        more = f"; and {len(broken) - 4} more" if len(broken) > 4 else ""
        return fail("; ".join(broken[:4]) + more, "glmplan doctor --only paths,ports,interface; then with NCCL_DEBUG=INFO")
    wrong = [one for one in answers if any(size["wrong_elements"] for size in one["all_reduce"])]
    if wrong:
        return fail(
            f"wrong sums on {', '.join(ranks.label(one['rank']) for one in wrong)}",
            "glmplan doctor --deep --only copies,links",
        )
    return ok(_reduce_words(ranks, answers))


def _rank_answers(seen: Seen) -> list[dict[str, Any]]:
    found = [seen.deep.of("ranks", host.name) for host in seen.hosts]
    return [rank for answer in found if isinstance(answer, dict) for rank in answer["ranks"]]


def _reduce_words(ranks: Ranks, answers: list[dict[str, Any]]) -> str:
    n, parts = ranks.world_size, []
    for position, size in enumerate(answers[0]["all_reduce"]):
        seconds = max(one["all_reduce"][position]["seconds"] for one in answers)
        bus = 2 * (n - 1) / n * size["bytes"] / seconds
        parts.append(f"{count(size['bytes'])} in {span(seconds)}" + (f" (bus {rate(bus)})" if size["bytes"] >= MIB else ""))
    version = answers[0].get("nccl_version")
    name = f"NCCL {version}" if version else "gloo on the CPUs"
    paths = sorted({path for one in answers for path in one.get("paths", ())})
    over = f" over {', '.join(paths)}" if paths else ""
    return (
        f"{n} ranks, {name}{over}, right by value: {', '.join(parts)}; joined in {max(a['join_s'] for a in answers):.1f} s"
    )


def links(host: Host, seen: Seen) -> Verdict:
    """The links from this host's ranks: latency, bandwidth, right values."""
    ranks, answers = ranks_of(seen), [one for one in _rank_answers(seen) if "error" not in one]
    mine = [(one["rank"], link) for one in answers if ranks.host_of(one["rank"]) == host.name for link in one["links"]]
    if not mine:
        return skip("the all-reduce did not come so far")
    wrong = [f"{ranks.label(rank)} to {ranks.label(link['peer'])}" for rank, link in mine if link["wrong_elements"]]
    if wrong:
        return fail(f"wrong values between {'; '.join(wrong[:4])}", on(host, "glmplan doctor --deep --only copies"))
    everywhere = [(one["rank"], link) for one in answers for link in one["links"]]
    words, slow = [], []
    for inside in (True, False):
        kind = [(rank, link) for rank, link in mine if (ranks.host_of(link["peer"]) == host.name) == inside]
        if not kind:
            continue
        usual = median(
            link["bytes_per_s"]
            for rank, link in everywhere
            if (ranks.host_of(rank) == ranks.host_of(link["peer"])) == inside
        )
        words.append(_link_words("inside the host" if inside else "to other hosts", [link for _, link in kind]))
        slow += [
            f"{ranks.label(rank)} to {ranks.label(link['peer'])} {rate(link['bytes_per_s'])} (median {rate(usual)})"
            for rank, link in kind
            if link["bytes_per_s"] < SLOW_SHARE * usual
        ]
    if slow:
        return warn(
            f"slow: {'; '.join(slow[:4])}; {', '.join(words)}",
            on(host, "nvidia-smi topo -m; ethtool NIC; look for errors on the link"),
        )
    return ok(", ".join(words))


def _link_words(where: str, found: list[dict[str, Any]]) -> str:
    rates, latency_s = [link["bytes_per_s"] for link in found], max(link["latency_s"] for link in found)
    spread = rate(min(rates)) if len(rates) == 1 else f"{rate(min(rates))} to {rate(max(rates))}"
    return f"{len(found)} link{'s' if len(found) > 1 else ''} {where}: {spread}, latency up to {span(latency_s)}"


def rate(bytes_per_s: float) -> str:
    """Decimal gigabytes, as link speeds are sold."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def span(seconds: float) -> str:
    """Microseconds below a millisecond."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def count(size: int) -> str:
    """Round sizes as people say them."""
    if size >= MIB:
        return f"{size // MIB} MiB"
    return f"{size // KIB} KiB" if size >= KIB else f"{size} bytes"
