"""What does SGLang 0.5.13.post1 do on a stage that begins on a layer without an indexer?

The engine's own model, attention layers and sparse-attention backend, patched with ours, run on the CPU: what one stage
hands to the next, what the first layer gets, and what attention then does when it prefills and when it decodes. Rotary
embedding and the KV pool are stood in for.
`python -m tests.kernels.engines.test_sglang_cuts` is the process that each check runs in.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.proof import pipeline
from tests.kernels.engines.test_sglang_engine import engine, in_the_engine, patched_engine
from tests.kernels.engines.test_sglang_prefill import backend

__all__ = ["engine"]


@pytest.mark.wheels
@pytest.mark.parametrize("engine", ["0.5.13.post1"], indirect=True)
@pytest.mark.parametrize("check", ["relay", "attention", "pattern"])
def test_real_engine(engine: Path, check: str):
    in_the_engine(engine, __name__, check)


# What follows runs in the process of a check.

LAYERS, CUT, TOKENS, SLOTS = 7, 3, 3, 128


class NoRotation:
    """In place of the rotary embedding, which is CUDA code."""

    is_neox_style = False

    def __call__(self, positions: Any, q: Any, k: Any) -> tuple[Any, Any]:
        return q, k


def stood_in_engine() -> None:
    """One rank without a GPU; settings as of a server with our attention and BF16 rows."""
    import dataclasses

    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.models import deepseek_v2

    arguments: Any = object.__new__(server_args.ServerArgs)
    for setting in dataclasses.fields(server_args.ServerArgs):
        made = setting.default_factory is not dataclasses.MISSING
        setattr(arguments, setting.name, setting.default_factory() if made else setting.default)
    chosen = {
        "device": "cuda", "kv_cache_dtype": "bfloat16", "attention_backend": "dsa", "dsa_prefill_backend": "tilelang",
        "dsa_decode_backend": "tilelang", "disable_piecewise_cuda_graph": False,
    }  # fmt: skip
    for name, value in chosen.items():
        setattr(arguments, name, value)
    server_args.set_global_server_args_for_scheduler(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    parallel_state.init_distributed_environment(1, 0, place, 0, backend="gloo")
    parallel_state.initialize_model_parallel(1, 1)
    for name in ("_ATTN_TP_SIZE", "_ATTN_DP_SIZE", "_ATTN_TP_RANK", "_ATTN_DP_RANK"):
        setattr(dp_attention, name, int(name.endswith("SIZE")))
    for module in (deepseek_v2, dsa_indexer):
        setattr(module, "get_rope_wrapper", lambda *_, **__: NoRotation())  # noqa: B010


@functools.cache
def config(pattern: str | None = None) -> Any:
    """The proof's checkpoint as the engine reads it, with the override of `--json-model-override-args`."""
    from sglang.srt.utils.hf_transformers.config import get_config

    from benchmarks.proof import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(make_checkpoint.config(LAYERS, set())))
        override = {"index_topk_pattern": pattern} if pattern else {}
        return get_config(folder, trust_remote_code=True, model_override_args=override)


def attention(layer: int, pattern: str | None = None) -> Any:
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    read = config(pattern)
    sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank")
    return DeepseekV2AttentionMLA(
        config=read, hidden_size=read.hidden_size, num_heads=read.num_attention_heads, layer_id=layer,
        **{name: getattr(read, name) for name in sizes},
    )  # fmt: skip


def check_pattern() -> None:
    """Layer 3 shares layer 2's top-k and has no weights of its own; the override makes it run its indexer all the same."""
    from benchmarks.proof import make_checkpoint

    own = "".join(kind[0].upper() for kind in make_checkpoint.indexer_types(LAYERS))
    override = json.loads(pipeline.RECOMPUTED[-1])["index_topk_pattern"]
    assert override == f"{own[:CUT]}F{own[CUT + 1 :]}" != own
    for pattern in (own, override):
        layers = [attention(number, None if pattern == own else pattern) for number in range(LAYERS)]
        assert "".join("S" if layer.skip_topk else "F" for layer in layers) == pattern
        assert [layer.next_skip_topk for layer in layers[:-1]] == [layer.skip_topk for layer in layers[1:]]
    maker = make_checkpoint.Maker(LAYERS, 0.25, 4.0, 0, 0.0)
    maker.attention("model.layers.3.self_attn", make_checkpoint.indexer_types(LAYERS)[CUT] == "full")
    assert not any("indexer" in name for name in maker.tensors)


def check_relay() -> None:
    """Stage 1 hands over hidden states and residuals alone; the first layer of stage 2 is given no top-k."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.models.deepseek_v2 import DeepseekV2Model

    given: dict[int, Any] = {}

    def layer(number: int, positions: Any, hidden: Any, batch: Any, residual: Any, *_: Any, prev_topk_indices: Any) -> Any:
        given[number] = prev_topk_indices
        return hidden, hidden, number

    def stage(first: int, stop: int) -> Any:
        ranks = SimpleNamespace(is_first_rank=first == 0, is_last_rank=stop == LAYERS)
        layers = {number: functools.partial(layer, number) for number in range(first, stop)}
        return SimpleNamespace(
            start_layer=first, end_layer=stop, pp_group=ranks, layers=layers,
            embed_tokens=lambda ids: torch.ones(len(ids), 8), norm=lambda *both: both,
            dsa_enable_prefill_cp=False, mla_enable_prefill_cp=False,
            llama_4_scaling_config=None, layers_to_capture=[], first_k_dense_replace=3,
        )  # fmt: skip

    batch = SimpleNamespace(can_run_tbo=False, forward_mode=ForwardMode.DECODE, attn_cp_metadata=None)
    ids = torch.arange(TOKENS)
    handed = DeepseekV2Model.forward(stage(0, CUT), ids, ids, batch)
    assert set(handed.tensors) == {"hidden_states", "residual"}
    DeepseekV2Model.forward(stage(CUT, LAYERS), ids, ids, batch, pp_proxy_tensors=handed)
    assert given == {0: None, 1: 0, 2: 1, CUT: None, 4: 3, 5: 4, 6: 5}


def check_attention() -> None:
    """Layer 3 attends with the top-k of layer 2 and raises without, in both modes."""
    import torch
    from sglang.srt.layers.communicator import get_attn_tp_context
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from glmplan.errors import GlmplanError
    from glmplan.kernels.engines.sglang_selftest import HALF

    torch.manual_seed(0)
    layer = attention(CUT)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.02)
    layer = layer.to(HALF)
    layer.w_kc, layer.w_vc = (0.02 * torch.randn(64, *shape).to(HALF) for shape in ((192, 512), (512, 256)))
    layer.current_attention_backend = "dsa"
    rows, hidden = torch.randn(SLOTS, 1, 576).to(HALF), torch.randn(TOKENS, 1024).to(HALF)
    serving = backend(torch.arange(SLOTS, dtype=torch.int32)[None])
    serving.forward_metadata, serving.dsa_kv_cache_store_fp8 = None, False
    written: list[int] = []
    serving.token_to_kv_pool = SimpleNamespace(
        set_mla_kv_buffer=lambda layer, *_: written.append(layer.layer_id), get_key_buffer=lambda _: rows
    )
    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE):
        call = serving.forward_decode if mode.is_decode() else serving.forward_extend
        layer.attn_mqa.forward = lambda q, k, v, batch, call=call, **more: call(q, k, v, layer.attn_mqa, batch, **more)
        batch = SimpleNamespace(forward_mode=mode, out_cache_loc=torch.arange(TOKENS), attn_cp_metadata=None)
        get_attn_tp_context().fetch_qkv_latent = lambda batch=batch: layer.prepare_qkv_latent(hidden, batch)
        topk = torch.arange(64, dtype=torch.int32).expand(TOKENS, 64).contiguous()
        prepared = layer.forward_absorb_prepare(None, hidden, batch, None, None, topk)
        output, passed_on = layer.forward_absorb_core(*prepared)
        assert output.shape == (TOKENS, 1024)
        assert passed_on is topk
        prepared = layer.forward_absorb_prepare(None, hidden, batch, None, None, None)
        with pytest.raises((AttributeError, GlmplanError)) as raised:
            layer.forward_absorb_core(*prepared)
        print(mode.name, raised.type.__name__, raised.value, raised.traceback[-1], file=sys.stderr)
    assert written == [CUT] * 4


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patched_engine()
    stood_in_engine()
    globals()[f"check_{sys.argv[1]}"]()
