#!/usr/bin/env bash
# Plan once, keep the plan, and print what each node would run.
set -euo pipefail
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
glmplan size --inventory mixed-inventory.toml --context 128k --save "$folder/plan.json"
glmplan launch --dry-run --plan "$folder/plan.json"
