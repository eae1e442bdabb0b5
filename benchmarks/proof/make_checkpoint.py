"""A GLM-5.2 small enough to serve anywhere: the real heads, indexer and FP8 blocks, few and narrow layers, random weights.

`python -m benchmarks.proof.make_checkpoint OUT [--layers 7] [--mtp] [--chain 0.02] [--tokenizer] [--gain 0.25] [--sharp 4]`
gain       what each layer adds to the residual stream; at 1 a random mixture of experts is chaotic
sharp      how much larger queries are than random ones, so that attention picks few tokens and errors in it show
steady     a bias towards the first experts; above 1 they are always chosen, so that rounding does not change experts
chain      how strongly a token predicts one fixed successor, so that a draft of the MTP layer is often accepted
mtp        one MTP layer after the last, as in the released checkpoint
tokenizer  a byte-level tokenizer and a chat template, for canaries that speak
Sizes that are not listed in SMALL are those of zai-org/GLM-5.2-FP8's config.json, repeated in REAL.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

BLOCK, E4M3_MAX = 128, 448.0
VOCAB = 8192
PAD, EOS, USER, ASSISTANT, SYSTEM = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4, VOCAB - 5
SPECIAL = {PAD: "<|pad|>", EOS: "<|endoftext|>", USER: "<|user|>", ASSISTANT: "<|assistant|>", SYSTEM: "<|system|>"}

REAL: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16", "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "rms_norm_eps": 1e-05, "use_cache": True,
    "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 192, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "qk_head_dim": 256, "v_head_dim": 256, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}, "max_position_embeddings": 1048576,
    "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "index_topk_freq": 4, "index_skip_topk_offset": 3,
    "index_topk_pattern": None, "index_share_for_mtp_iteration": True, "indexer_rope_interleave": True,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "moe_router_dtype": "float32", "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "ep_size": 1, "pretraining_tp": 1,
    "tie_word_embeddings": False, "transformers_version": "5.12.0",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 1024, "q_lora_rank": 512, "intermediate_size": 2048, "moe_intermediate_size": 512, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None,
}  # fmt: skip


class Maker:
    """Names and random tensors, collected in `tensors`."""

    def __init__(self, layers: int, gain: float, sharp: float, seed: int, steady: float) -> None:
        self.layers, self.gain, self.sharp, self.steady = layers, gain, sharp, steady
        self.random = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self.plain: set[str] = set()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def keep(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value.contiguous()

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self.keep(f"{name}.weight", (1.0 + 0.1 * self.normal(size)).bfloat16())
        self.plain.add(name)
        if bias:
            self.keep(f"{name}.bias", (0.1 * self.normal(size)).bfloat16())

    def bf16(self, name: str, value: torch.Tensor) -> None:
        self.keep(f"{name}.weight", value.bfloat16())
        self.plain.add(name)

    def fp8(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        codes, scales = to_blocks(self.normal(rows, columns) * (gain * columns**-0.5))
        self.keep(f"{name}.weight", codes)
        self.keep(f"{name}.weight_scale_inv", scales)

    def attention(self, prefix: str, indexer: bool) -> None:
        hidden, lora, heads = SMALL["hidden_size"], SMALL["q_lora_rank"], REAL["num_attention_heads"]
        latent, rope, value = REAL["kv_lora_rank"], REAL["qk_rope_head_dim"], REAL["v_head_dim"]
        self.fp8(f"{prefix}.q_a_proj", lora, hidden)
        self.norm(f"{prefix}.q_a_layernorm", lora)
        self.fp8(f"{prefix}.q_b_proj", heads * REAL["qk_head_dim"], lora, self.sharp)
        self.fp8(f"{prefix}.kv_a_proj_with_mqa", latent + rope, hidden)
        self.norm(f"{prefix}.kv_a_layernorm", latent)
        self.fp8(f"{prefix}.kv_b_proj", heads * (REAL["qk_nope_head_dim"] + value), latent)
        self.fp8(f"{prefix}.o_proj", hidden, heads * value, self.gain)
        if indexer:
            size, count = REAL["index_head_dim"], REAL["index_n_heads"]
            self.fp8(f"{prefix}.indexer.wq_b", count * size, lora)
            self.fp8(f"{prefix}.indexer.wk", size, hidden)
            self.norm(f"{prefix}.indexer.k_norm", size, bias=True)
            self.bf16(f"{prefix}.indexer.weights_proj", self.normal(count, hidden) * hidden**-0.5)

    def mlp(self, prefix: str, width: int) -> None:
        hidden = SMALL["hidden_size"]
        self.fp8(f"{prefix}.gate_proj", width, hidden)
        self.fp8(f"{prefix}.up_proj", width, hidden)
        self.fp8(f"{prefix}.down_proj", hidden, width, self.gain)

    def experts(self, prefix: str) -> None:
        count, hidden = SMALL["n_routed_experts"], SMALL["hidden_size"]
        self.keep(f"{prefix}.gate.weight", self.normal(count, hidden) * hidden**-0.5)
        chosen = torch.arange(count) < SMALL["num_experts_per_tok"]
        self.keep(f"{prefix}.gate.e_score_correction_bias", chosen.float() * self.steady)
        self.plain |= {f"{prefix}.gate", f"{prefix}.gate.e_score_correction_bias"}
        for name in [*(f"experts.{number}" for number in range(count)), "shared_experts"]:
            self.mlp(f"{prefix}.{name}", SMALL["moe_intermediate_size"])

    def layer(self, number: int, indexer: bool, dense: bool) -> None:
        prefix = f"model.layers.{number}"
        self.norm(f"{prefix}.input_layernorm", SMALL["hidden_size"])
        self.norm(f"{prefix}.post_attention_layernorm", SMALL["hidden_size"])
        self.attention(f"{prefix}.self_attn", indexer)
        if dense:
            self.mlp(f"{prefix}.mlp", SMALL["intermediate_size"])
        else:
            self.experts(f"{prefix}.mlp")

    def head(self, chain: float) -> None:
        """Embedding and output; with `chain` the row of token p(t) also points along the embedding of t."""
        embedding = self.normal(VOCAB, SMALL["hidden_size"])
        successor = torch.randperm(VOCAB - 16, generator=self.random)
        output = 0.1 * self.normal(VOCAB, SMALL["hidden_size"])
        output[successor] += chain * embedding[: VOCAB - 16]
        self.bf16("model.embed_tokens", embedding)
        self.norm("model.norm", SMALL["hidden_size"])
        self.bf16("lm_head", output)

    def mtp(self) -> None:
        """Layer `layers`: hears the next token's embedding at full strength and the hidden state faintly."""
        hidden, prefix = SMALL["hidden_size"], f"model.layers.{self.layers}"
        faint = 0.2 * hidden**-0.5 * self.normal(hidden, hidden)
        self.bf16(f"{prefix}.eh_proj", torch.cat([torch.eye(hidden), faint], 1))
        for name in ("enorm", "hnorm", "shared_head.norm"):
            self.norm(f"{prefix}.{name}", hidden)
        self.layer(self.layers, indexer=True, dense=False)


def to_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of the weight's size and f32 scales, one per block of 128 x 128 (partial blocks at the edges)."""
    rows, columns = weight.shape
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.nn.functional.pad(weight, (0, wide * BLOCK - columns, 0, tall * BLOCK - rows))
    blocks = padded.reshape(tall, BLOCK, wide, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / E4M3_MAX
    codes = (blocks / scales[:, None, :, None]).reshape(tall * BLOCK, wide * BLOCK)
    return codes[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales


def indexer_types(layers: int) -> list[str]:
    """The released pattern: the first three layers and then every fourth have an indexer of their own."""
    return ["full" if number < 3 or number % 4 == 2 else "shared" for number in range(layers)]


def config(layers: int, plain: set[str]) -> dict[str, Any]:
    kinds = ["dense" if number < REAL["first_k_dense_replace"] else "sparse" for number in range(layers)]
    sizes = {"num_hidden_layers": layers, "indexer_types": indexer_types(layers), "mlp_layer_types": kinds}
    quantised = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(plain),
    }  # fmt: skip
    return {**REAL, **SMALL, **sizes, "quantization_config": quantised}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """Bytes are tokens 0 to 255; the other ids print as words and are never read."""
    words = byte_characters() + [f"w{number}" for number in range(256, VOCAB - len(SPECIAL))]
    exact = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": number, "content": text, **exact} for number, text in sorted(SPECIAL.items())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": [],
        "vocab": {word: number for number, word in enumerate(words)},
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(out: Path) -> None:
    (out / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD],
        "model_max_length": REAL["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "pad_token_id": PAD}))


def make(out: Path, maker: Maker, chain: float, mtp: bool, with_tokenizer: bool) -> int:
    """Writes the folder; the bytes of its tensors."""
    from safetensors.torch import save_file  # the sizes above are of use without it

    out.mkdir(parents=True, exist_ok=True)
    layers = maker.layers
    maker.head(chain)
    for number, kind in enumerate(indexer_types(layers)):
        maker.layer(number, kind == "full", number < REAL["first_k_dense_replace"])
    if mtp:
        maker.mtp()
    (out / "config.json").write_text(json.dumps(config(layers, maker.plain), indent=1))
    save_file(maker.tensors, out / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        write_tokenizer(out)
    return sum(tensor.nbytes for tensor in maker.tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--gain", type=float, default=0.25)
    parser.add_argument("--sharp", type=float, default=4.0)
    parser.add_argument("--steady", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=float, default=0.0)
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--tokenizer", action="store_true")
    asked = parser.parse_args()
    maker = Maker(asked.layers, asked.gain, asked.sharp, asked.seed, asked.steady)
    size = make(asked.out, maker, asked.chain, asked.mtp, asked.tokenizer)
    print(f"{asked.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
