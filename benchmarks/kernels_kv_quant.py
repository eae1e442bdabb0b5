"""How fast are KV rows and index pages written and read, against the bytes they must move?

`python benchmarks/kernels_kv_quant.py [--sglang FOLDER]`; FOLDER holds dsa_quant_k_cache.py and dequant_k_cache.py of an
SGLang release to time beside ours (its writer stops at two temporaries: the copy into the cache is not counted).
Medians over CUDA-graph replays; every launch in a graph uses its own tokens and slots, together larger than the L2 cache
where the size allows. Floor: the bytes each launch must move over the bandwidth of a plain copy measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glmplan.kernels import run_as
from glmplan.kernels.kv_quant import op, reference
from glmplan.kernels.results import graph_microseconds

DEVICE = "cuda"
CAPACITY = 1_048_576  # 138 MB of index pages, 688 MB of packed rows: slots spread over more than any L2
WRITE_BYTES = {"packed": 1152 + 656 + 4, "raw": 1152 + 576 + 4, "keys": 256 + 132 + 4}
READ_BYTES = {"packed": 656 + 1152 + 4, "raw": 576 + 1152 + 4, "keys": 132 + 132 + 4}


def copy_bytes_per_us() -> float:
    """The better of torch's copy and its negation of f32, 2 GB each, counting bytes read and written."""
    source, target = (torch.ones(500_000_000, device=DEVICE) for _ in range(2))
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(8 * source.numel() / graph_microseconds([way]) for way in ways)


def sets_for(n: int) -> int:
    """Enough different tokens and slots that one graph touches far more than the L2 cache: 4 to 64."""
    return max(4, min(64, 256_000_000 // (n * 1152)))


def cases(n: int, sglang: dict[str, ModuleType]) -> list[tuple[str, float | None, float | None, int, float]]:
    """(name, baseline us, eager us, bytes, ours us) for one number of tokens."""
    sets = []
    for _ in range(sets_for(n)):
        fused = torch.randn(n, 576, device=DEVICE).bfloat16()
        sets.append((fused[:, :512], fused[:, 512:], torch.randperm(CAPACITY, device=DEVICE)[:n].int()))
    packed = torch.randint(0, 127, (CAPACITY, 656), dtype=torch.uint8, device=DEVICE)
    raw = torch.randint(0, 127, (CAPACITY, 576), dtype=torch.uint8, device=DEVICE)
    pages = torch.randint(0, 127, (CAPACITY // 64, 8448), dtype=torch.uint8, device=DEVICE)
    out = torch.empty(n, 576, dtype=torch.bfloat16, device=DEVICE)

    def timed(launch: Any) -> float:
        return graph_microseconds([lambda one=one: launch(*one) for one in sets])

    quantise, dequantise = sglang.get("dsa_quant_k_cache"), sglang.get("dequant_k_cache")
    theirs = timed(lambda la, ro, _: quantise.quantize_k_cache_separate(la, ro)) if quantise else None
    dense = packed.view(torch.float8_e4m3fn).view(-1, 1, 1, 656)[:n]
    read = graph_microseconds([lambda: dequantise.dequantize_k_cache(dense)] * 4) if dequantise else None
    eager = timed(lambda la, ro, _: reference.packed_rows(la, ro))
    return [
        (
            "write packed",
            theirs,
            eager,
            WRITE_BYTES["packed"] * n,
            timed(lambda la, ro, s: op.write_packed_rows(packed, la, ro, s)),
        ),
        ("write raw", None, None, WRITE_BYTES["raw"] * n, timed(lambda la, ro, s: op.write_raw_rows(raw, la, ro, s))),
        (
            "write keys",
            None,
            None,
            WRITE_BYTES["keys"] * n,
            timed(lambda la, ro, s: op.write_index_keys(pages, la[:, :128], s)),
        ),
        (
            "read packed",
            read,
            None,
            READ_BYTES["packed"] * n,
            timed(lambda la, ro, s: op.gather_packed_rows(packed, s, out)),
        ),
        ("read raw", None, None, READ_BYTES["raw"] * n, timed(lambda la, ro, s: op.gather_raw_rows(raw, s, 1.0, out))),
        ("read keys", None, None, READ_BYTES["keys"] * n, timed(lambda la, ro, s: op.gather_index_keys(pages, s))),
    ]


def load(folder: str | None) -> dict[str, ModuleType]:
    """SGLang's two files as modules of their own; they import torch and triton only."""
    modules = {}
    for path in sorted(Path(folder).glob("*.py")) if folder else []:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[path.stem])
    return modules


def main() -> int:
    parser = argparse.ArgumentParser(description="Time kv_quant.")
    parser.add_argument("--sglang", help="folder with SGLang's dsa_quant_k_cache.py and dequant_k_cache.py")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32, 128, 1024, 4096, 131_072])
    arguments = parser.parse_args()
    run_as.enable_from_environment()
    sglang = load(arguments.sglang)
    bandwidth = copy_bytes_per_us()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    device = f"{torch.cuda.get_device_name()}, kernels for sm_{run_as.target_sm()}"
    print(f"{device}, {versions}, copy {bandwidth / 1e6:.2f} TB/s")
    print("| case | tokens | SGLang us | torch eager us | ours us | bytes | floor us | ours / floor |")
    print("|---|---|---|---|---|---|---|---|")
    for n in arguments.tokens:
        for case, theirs, eager, moved, ours in cases(n, sglang):
            floor = moved / bandwidth
            cells = [f"{value:.1f}" if value is not None else "" for value in (theirs, eager, ours)]
            print(f"| {case} | {n:,} | {' | '.join(cells)} | {moved:,} | {floor:.2f} | {ours / floor:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
