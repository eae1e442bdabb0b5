#!/usr/bin/env bash
# Every proof, side by side where they do not disturb each other:  bash benchmarks/proof/all.sh OUT [STEP ...]
# on a machine with four GPUs. Steps, in this order unless named:
#   together   agreement of three KV formats and drafts (SITE), a first look at vLLM (SITE_VLLM)
#   speed      stock against port, one server a GPU, nothing beside it (SITE)
#   cuts       the older engine's pipeline cuts through launch, which needs all GPUs empty (SITE_OLD)
#   apart      the older engine's agreement on GPUs 1 and 2 (SITE_OLD), tables on GPU 0 (SITE), vLLM on GPU 3 (SITE_VLLM)
#   pipeline   TP2 x PP2 through launch, which needs all GPUs empty (SITE)
# SITE, SITE_OLD, SITE_VLLM: folders of packages; what needs one that is not set is left out and said. SECONDS_EACH bounds each
# script (default 400, its preparations counted; a minute more to write). Each script's results and its output, NAME.log, are
# in OUT/STEP.tar.gz, made anew twice a minute: one file a step, for places that give few files back. launch needs glmplan's own
# dependencies in this Python. Nothing is left running; the exit code is 1 when a proof does not hold.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
each=${SECONDS_EACH:-400} python=${PYTHON:-python3} failed=0 running=()
results=$(mktemp -d)

start() { # NAME SITE GPUS PORT MODULE ARGUMENTS...: in the background
  local name=$1 site=$2 gpus=$3 port=$4 module=$5
  shift 5
  if [ -z "$site" ]; then echo "$name: left out, its site is not set"; return; fi
  local environment=(SITE="$site" PROOF_PORT="$port" PROOF_WORK="$HOME/proof-$name")
  [ -z "$gpus" ] || environment+=(PROOF_GPUS="$gpus")
  mkdir -p "$results/$step"
  {
    env "${environment[@]}" timeout -k 25 $((each + 60)) \
      "$python" -m "benchmarks.proof.$module" "$results/$step" "$@" > "$results/$step/$name.log" 2>&1
    local code=$?
    pack
    exit $code
  } &
  running+=("$name:$!")
}

pack() { # what the step has so far; tar's exit code tells of logs that grow meanwhile
  local made
  made=$(mktemp "$results/XXXXXX") && tar -czf "$made" -C "$results" "$step" 2> /dev/null
  chmod 644 "$made"
  mv "$made" "$out/$step.tar.gz"
}

finish() { # all that was started; a run that is cut leaves what there was half a minute before
  local entry looks=0
  for entry in "${running[@]}"; do
    local name=${entry%%:*}
    while kill -0 "${entry##*:}" 2> /dev/null; do
      sleep 1
      [ $((++looks % 30)) -ne 0 ] || pack
    done
    if wait "${entry##*:}"; then
      echo "$name: holds, after $SECONDS s"
      grep -E '^  ' "$results/$step/$name.log" | cut -c1-200
    else
      failed=1
      echo "$name: DOES NOT HOLD, after $SECONDS s"
      grep -v '^glmplan port:' "$results/$step/$name.log" | tail -n 30 | cut -c1-200
    fi
  done
  [ ${#running[@]} -eq 0 ] || pack
  running=()
}

[ $# -gt 0 ] || set -- together speed cuts apart pipeline
for step in "$@"; do
  case $step in
    together)
      start agreement "${SITE:-}" "" 10000 agreement --kv fp8 bf16 --per-gpu 4 --seconds "$each"
      start raw "${SITE:-}" "" 15000 agreement --kv raw --per-gpu 4 --seconds "$each"
      start eagle "${SITE:-}" "" 20000 eagle --per-gpu 4 --seconds "$each"
      start vllm-smoke "${SITE_VLLM:-}" 3 24000 vllm_agreement --smoke --seconds "$each" ;;
    speed) start speed "${SITE:-}" "" 26000 speed --seconds "$each" ;;
    cuts) start cuts "${SITE_OLD:-}" "" 10000 pipeline --part cuts --seconds "$each" ;;
    pipeline) start pipeline "${SITE:-}" "" 10000 pipeline --seconds "$each" ;;
    apart)
      start older "${SITE_OLD:-}" 1,2 10000 agreement --kv fp8 bf16 --per-gpu 7 --seconds "$each"
      start tune "${SITE:-}" 0 20000 tune --seconds "$each"
      start vllm "${SITE_VLLM:-}" 3 24000 vllm_agreement --per-gpu 7 --seconds "$each" ;;
    *) echo "$step is no step: together, speed, cuts, apart, pipeline"; exit 2 ;;
  esac
  finish
done
exit $failed
