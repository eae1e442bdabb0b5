"""Measure what a rank loses before any weight is loaded: CUDA context, NCCL buffers, and CUDA-graph private pools.

Run on a machine with GPUs and PyTorch:  python benchmarks/measure_reserve.py [world sizes ...]
Prints one JSON object; its figures are the sources of the [reserve] tables in profiles/engines/.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MIB = 1024 * 1024


def used(device: int) -> int:
    """Bytes in use on the device by everybody."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def rank_main(rank: int, world: int, port: int, queue: mp.Queue) -> None:
    """One rank: context, first all-reduce, a second group, point-to-point, and a small captured graph."""
    steps: dict[str, int] = {}
    torch.cuda.set_device(rank)
    x = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    steps["after_context"] = used(rank)
    a = torch.randn(4096, 6144, device="cuda", dtype=torch.bfloat16)
    (a @ a.T).sum().item()
    torch.cuda.empty_cache()
    steps["after_first_gemm_and_kernels"] = used(rank) - torch.cuda.memory_reserved(rank)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("nccl", rank=rank, world_size=world)
        dist.all_reduce(x)
        big = torch.ones(64 * MIB // 2, device="cuda", dtype=torch.bfloat16)
        dist.all_reduce(big)
        torch.cuda.synchronize()
        steps["after_all_reduce"] = used(rank) - torch.cuda.memory_reserved(rank)
        group = dist.new_group(list(range(world)))
        dist.all_gather_into_tensor(torch.empty(8 * world, device="cuda"), x, group=group)
        torch.cuda.synchronize()
        steps["after_second_group"] = used(rank) - torch.cuda.memory_reserved(rank)
        peer_group = dist.new_group(list(range(world)))
        if rank % 2 == 0:
            dist.send(x, rank + 1, group=peer_group)
        else:
            dist.recv(x, rank - 1, group=peer_group)
        torch.cuda.synchronize()
        steps["after_point_to_point"] = used(rank) - torch.cuda.memory_reserved(rank)
    queue.put((rank, steps))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Measure each world size asked for."""
    worlds = [int(text) for text in sys.argv[1:]] or [1]
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, object] = {
        "gpu": properties.name,
        "total_memory": properties.total_memory,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "idle_used": used(0),
    }
    context = mp.get_context("spawn")
    for world in worlds:
        queue = context.Queue()
        ranks = [context.Process(target=rank_main, args=(r, world, 29571 + world, queue)) for r in range(world)]
        for process in ranks:
            process.start()
        found = dict(queue.get(timeout=180) for _ in ranks)
        for process in ranks:
            process.join(60)
        result[f"world_{world}"] = {str(rank): found[rank] for rank in sorted(found)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
