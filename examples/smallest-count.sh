#!/usr/bin/env bash
# The fewest GPUs of each kind that serve one request of 131,072 tokens, with the checkpoint that suits them.
set -euo pipefail
for pair in "rtx-4090-24g fp8" "rtx-4090-48g fp8" "rtx-5090 nvfp4" "rtx-pro-6000 nvfp4" "a100-80g awq-int4" "h200 w4afp8"; do
  read -r gpu checkpoint <<<"$pair"
  glmplan size --gpu "$gpu" --checkpoint "$checkpoint" --context 131072 --json |
    python3 -c 'import json, sys; p = json.load(sys.stdin); print(p["smallest_count"], "x", p["nodes"][0]["gpu"], p["checkpoint"])'
done
