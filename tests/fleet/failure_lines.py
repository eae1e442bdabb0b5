"""One line per known failure, in the words the program really prints it with: id -> (phase it comes in, line)."""

# ruff: noqa: E501 - log lines are as long as they are

from __future__ import annotations

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 47.53 GiB of which "
    "1.20 GiB is free. Including non-PyTorch memory, this process has 46.30 GiB memory in use."
)

COMMON = {
    "kernel-port-failed": (
        "joining",
        "glmplan port failed: Pipeline stage 1 begins on layer 3, which shares the top-k of an earlier layer, and SGLang 0.5.13.post1 "
        "does not send it between stages. Begin it on layer 2 or 6 (SGLANG_PP_LAYER_PARTITION counts layers per stage).",
    ),
    "oom-loading": ("loading", OOM),
    "oom-pool": ("capturing", OOM),
    "oom-run": ("ready", OOM),
    "cuda-oom-library": ("captured", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "illegal-address": ("ready", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    "no-kernel-image": ("captured", "CUDA error: no kernel image is available for execution on the device"),
    "driver-too-old": (
        "starting",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
    ),
    "no-gpu": ("starting", "RuntimeError: No CUDA GPUs are available"),
    "fp8-on-old-gpu": (
        "captured",
        "ValueError: type fp8e4nv not supported in this architecture. The supported fp8 dtypes are ('fp8e4b15', 'fp8e5')",
    ),
    "kernel-too-big": (
        "captured",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 131072, Hardware limit: 101376. "
        "Reducing block sizes or `num_stages` may help.",
    ),
    "deep-gemm-architecture": (
        "captured", "RuntimeError: Assertion error (/deepgemm/csrc/apis/attention.hpp:219): Unsupported architecture",
    ),
    "store-clients": (
        "joining", "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 8/24 clients joined.",
    ),
    "rendezvous-unreachable": (
        "joining",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect to "
        "(10.0.0.1, 20000).",
    ),
    "gloo-connect": ("joining", "RuntimeError: Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/pair.cc:144] no error"),
    "nccl-connect": (
        "joining", "node1:812:812 [0] misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to 172.17.0.1<40931> failed",
    ),
    "nccl-ib": ("ready", "n1:1:2 [0] NCCL WARN NET/IB : Got completion from peer 10.0.0.2 with status=12 opcode=0 len=0"),
    "nccl-shared-memory": (
        "joining", "n1:1:2 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-a1B2c3 to 33030532 bytes",
    ),
    "nccl-timeout": (
        "ready",
        "[rank3]:[E1121 10:00:00.1 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600011 milliseconds before "
        "timing out.",
    ),
    "nccl-error": ("ready", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system error"),
    "peer-closed": ("loading", "RuntimeError: [/pytorch/third_party/gloo/gloo/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"),
    "port-taken": (
        "joining",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 20000, "
        "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    "disk-full": ("captured", "OSError: [Errno 28] No space left on device: '/root/.cache/tvm-ffi/x.so'"),
    "file-limit": ("joining", "OSError: [Errno 24] Too many open files"),
    "thread-limit": ("starting", "RuntimeError: can't start new thread"),
    "checkpoint-missing": ("loading", "RuntimeError: Cannot find any model weights with `/models/GLM-5.2-FP8`"),
    "checkpoint-damaged": ("loading", "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
    "checkpoint-mismatch": ("loading", "KeyError: 'model.layers.3.self_attn.indexer.wk_weights_proj.qweight'"),
    "hub-refused": ("starting", "huggingface_hub.errors.GatedRepoError: 403 Client Error."),
    "hub-unreachable": ("starting", "OSError: We couldn't connect to 'https://huggingface.co' to load the files"),
    "wrong-flags": ("starting", "launch_server.py: error: unrecognized arguments: --nsa-prefill-backend tilelang"),
    "import-failed": ("starting", "ModuleNotFoundError: No module named 'deep_gemm'"),
    "nvcc-missing": ("captured", "OSError: CUDA_HOME environment variable is not set. Please set it to your CUDA install root."),
}  # fmt: skip

KERNEL = {
    "host-memory": "[Fri Nov 21 10:00:00 2026] Out of memory: Killed process 4711 (sglang::schedul) total-vm:1kB",
    "xid-fallen-off": "[Fri Nov 21 10:00:00 2026] NVRM: Xid (PCI:0000:41:00): 79, pid=4711, GPU has fallen off the bus.",
    "xid-ecc": "[Fri Nov 21 10:00:00 2026] NVRM: Xid (PCI:0000:41:00): 48, pid=4711, DBE (double bit error)",
    "xid-nvlink": "[Fri Nov 21 10:00:00 2026] NVRM: Xid (PCI:0000:41:00): 74, pid=4711, NVLink: fatal error",
    "xid-gsp": "[Fri Nov 21 10:00:00 2026] NVRM: Xid (PCI:0000:41:00): 119, pid=4711, Timeout after 6s of waiting for RPC",
    "xid-fault": "[Fri Nov 21 10:00:00 2026] NVRM: Xid (PCI:0000:41:00): 31, pid=4711, MMU Fault",
}

SGLANG = {
    "kv-budget-empty": (
        "loaded",
        "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.7. Raise "
        "--mem-fraction-static above 0.812 (minimum viable = 1 - available/pre = 0.8118). If using speculative decoding, draft "
        "weights are now counted.",
    ),
    "pool-empty": (
        "loaded",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: mem_fraction_static=0.55",
    ),
    "capture-failed": ("capturing", "Exception: Capture cuda graph failed: CUDA error: invalid argument"),
    "kv-exhausted": ("ready", "RuntimeError: Decode out of memory. Try to lower your batch size."),
    "memory-unbalanced": (
        "joining",
        "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes. "
        "pre_model_load_memory=20.1, local_gpu_memory=46.5, local_gpu_memory * 0.9=41.85",
    ),
    "load-unbalanced": (
        "loaded",
        "ValueError: TP rank 3 could finish the model loading, but there are other ranks that didn't finish loading. It is likely "
        "due to unexpected failures (e.g., OOM) or a slow node.",
    ),
    "engine-port-taken": ("starting", "ValueError: http_port at 30000 is not available in 30 seconds."),
    "fa3-on-other-gpu": ("captured", "ImportError: flash_attn at sgl-kernel is only supported on sm90 and above"),
    "quantization-unsupported": (
        "loading",
        "ValueError: The quantization method modelopt_fp4 is not supported for the current GPU. Minimum capability: 100. Current "
        "capability: 89.",
    ),
    "tp-too-large": (
        "loading", "ValueError: Weight output_partition_size = 64 is not divisible by weight quantization block_n = 128.",
    ),
    "stage-cut": (
        "captured", "AssertionError: PP stage starting at layer 39 requires DSA topk_indices from the previous stage.",
    ),
    "nodes-do-not-divide": ("starting", "AssertionError: tp_size must be divisible by number of nodes"),
    "mtp-with-pipeline": (
        "starting",
        "AssertionError: PP + speculative decoding (MTP) is only supported on prefill nodes (disaggregation-mode=prefill)",
    ),
    "rocm-only-backend": ("starting", "ValueError: The triton DSA backend is only supported on ROCm/HIP"),
    "stuck-forward": ("ready", "Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)"),
    "warmup-failed": ("captured", "[2026-11-21 10:00:00] Initialization failed. warmup error: Traceback (most recent call last):"),
    "rank-killed": (
        "loading",
        "RuntimeError: Rank 3 scheduler died during initialization (exit code: -9). If exit code is -9 (SIGKILL), a common cause "
        "is the OS OOM killer. Run `dmesg -T | grep -i oom` to check.",
    ),
    "scheduler-died": ("loading", "Rank 3 scheduler died during initialization (exit code: 1). If exit code is -9 (SIGKILL), a"),
    "subprocess-crashed": (
        "ready", "Subprocess scheduler_3 (pid=4711) crashed with exit code -11. Triggering SIGQUIT for cleanup...",
    ),
    "scheduler-exception": ("captured", "[2026-11-21 10:00:00 TP3] Scheduler hit an exception: Traceback (most recent call last):"),
    "topk-missing": ("ready", "    indices = page_table_1.unsqueeze(1)"),
}  # fmt: skip

VLLM = {
    "kv-budget-empty": ("loaded", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    "context-too-long": (
        "loaded",
        "ValueError: To serve at least one request with the model's max seq len (1048576), (92.00 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (8.25 GiB). Based on the available memory, the estimated maximum model length "
        "is 94016. Try increasing",
    ),
    "gpu-occupied": (
        "starting",
        "ValueError: Free memory on device cuda:3 (12.10/79.25 GiB) on startup is less than desired GPU memory utilization (0.92, "
        "72.91 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    ),
    "no-sparse-backend": (
        "starting", "ValueError: No valid attention backend found for cuda with AttentionSelectorConfig(head_size=576, use_sparse=True",
    ),
    "backend-refused": ("starting", "ValueError: Unknown attention backend: 'TRITON_MLA_SPARSE'. Valid options are: FLASH_ATTN"),
    "deep-gemm-missing": ("captured", "RuntimeError: DeepGEMM backend is unavailable in the current vLLM environment, "),
    "dcp-refused": (
        "loading",
        "AssertionError: Decode Context Parallelism (DCP) requires attention implementations to return the softmax LSE",
    ),
    "nodes-and-backend": (
        "starting", "ValueError: World size (16) is larger than the number of available GPUs (8) in this node. If this is",
    ),
    "quantization-unsupported": (
        "starting",
        "ValueError: The quantization method modelopt_fp4 is not supported for the current GPU. Minimum capability: 75. Current "
        "capability: 70.",
    ),
    "stage-cut": ("starting", "ValueError: len(partitions)=3 does not match pp_size=4."),
    "ready-timeout": (
        "loading",
        "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight loading for large "
        "models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
    ),
    "engine-dead": ("ready", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)"),
    "rank-killed": ("loading", "Worker proc VllmWorker-3 died unexpectedly (exit code: -9), shutting down executor."),
    "worker-died": ("ready", "Worker proc VllmWorker-3 died unexpectedly (exit code: 1), shutting down executor."),
    "worker-exception": ("captured", "(Worker_TP3 pid=4) ERROR 11-21 10:00:00 [multiproc_executor.py:1189] WorkerProc hit an exception."),
    "core-failed": ("captured", "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
}  # fmt: skip
