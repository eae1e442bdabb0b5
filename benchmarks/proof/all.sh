#!/usr/bin/env bash
# Every proof, side by side where they do not disturb each other:  bash benchmarks/proof/all.sh OUT [STEP ...]
# on a machine with four GPUs, or with fewer, where less runs side by side; cuts, pipeline and shared need two.
# Steps, in this order unless named:
#   together   agreement and drafts (SITE); with four GPUs raw rows (SITE) and a first look at vLLM (SITE_VLLM), too
#   apart      the older engine's agreement (SITE_OLD); with four GPUs what `tables` has, too, with fewer the raw rows (SITE)
#   tables     tables on GPU 0 (SITE), vLLM's agreement on the last GPU (SITE_VLLM); with four GPUs a part of `apart`
#   cuts       the older engine's pipeline cuts through launch, which needs all GPUs empty (SITE_OLD)
#   speed      stock against port, one server a GPU, nothing beside it (SITE)
#   pipeline   layouts through launch, TP2 x PP2 with four GPUs, TP1 x PP2 and TP2 with two, which needs all of them empty (SITE)
#   shared     TP2 x PP2 through launch on two GPUs, two ranks on each; with four GPUs `pipeline` does without that (SITE)
# SITE, SITE_OLD, SITE_VLLM: folders of packages; what needs one that is not set is left out and said. SECONDS_EACH bounds each
# script (default 400, its preparations counted; 90 s more to stop and write; pipeline on two GPUs was not done after 470 s where
# no kernel was compiled yet: give it 600). Each script's results and its output, NAME.log, are in OUT/STEP.tar.gz, made anew
# twice a minute: one file a step, for places that give few files back. launch needs glmplan's own dependencies in this Python.
# Nothing is left running; the exit code is 1 when a proof does not hold.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
each=${SECONDS_EACH:-400} python=${PYTHON:-python3} failed=0 running=()
results=$(mktemp -d)
gpus=$(nvidia-smi -L | grep -c '^GPU ')
if [ "$gpus" = 0 ]; then echo "nvidia-smi lists no GPU; the proofs need one, cuts, pipeline and shared two."; exit 2; fi
last=$((gpus - 1)) wide=$((gpus >= 4)) per=$((gpus >= 4 ? 4 : 7))

start() { # NAME SITE GPUS PORT MODULE ARGUMENTS...: in the background
  local name=$1 site=$2 gpus=$3 port=$4 module=$5
  shift 5
  if [ -z "$site" ]; then echo "$name: left out, its site is not set"; return; fi
  local environment=(SITE="$site" PROOF_PORT="$port" PROOF_WORK="$HOME/proof-$name")
  [ -z "$gpus" ] || environment+=(PROOF_GPUS="$gpus")
  mkdir -p "$results/$step"
  {
    env "${environment[@]}" timeout -k 25 $((each + 90)) \
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

tables() {
  start tune "${SITE:-}" 0 20000 tune --seconds "$each"
  [ "$gpus" != 1 ] || finish # tiles are timed, with nothing beside them
  start vllm "${SITE_VLLM:-}" $last 24000 vllm_agreement --per-gpu 7 --seconds "$each"
}

raw() { start raw "${SITE:-}" "" 15000 agreement --kv raw --per-gpu 4 --seconds "$each"; }

if [ $# -eq 0 ]; then
  set -- together apart cuts speed pipeline
  [ $wide = 1 ] || set -- together apart tables cuts speed pipeline shared
fi
for step in "$@"; do
  case $step in cuts | pipeline | shared)
    if [ "$gpus" = 1 ]; then
      echo "$step: left out, it needs two GPUs"
      continue
    fi ;;
  esac
  case $step in
    together)
      start agreement "${SITE:-}" "" 10000 agreement --kv fp8 bf16 --per-gpu $per --seconds "$each"
      start eagle "${SITE:-}" "" 20000 eagle --per-gpu $per --seconds "$each"
      if [ $wide = 1 ]; then
        raw
        start vllm-smoke "${SITE_VLLM:-}" $last 24000 vllm_agreement --smoke --seconds "$each"
      fi ;;
    apart)
      if [ $wide = 1 ]; then older=1,2; else older=; fi
      start older "${SITE_OLD:-}" "$older" 10000 agreement --kv fp8 bf16 --per-gpu 7 --seconds "$each"
      if [ $wide = 1 ]; then tables; else raw; fi ;;
    tables) tables ;;
    cuts) start cuts "${SITE_OLD:-}" "" 10000 pipeline --part cuts --seconds "$each" ;;
    speed) start speed "${SITE:-}" "" 26000 speed --seconds "$each" ;;
    pipeline) start pipeline "${SITE:-}" "" 10000 pipeline --seconds "$each" ;;
    shared) start shared "${SITE:-}" 0,1 10000 pipeline --part shared --seconds "$each" ;;
    *) echo "$step is no step: together, apart, tables, cuts, speed, pipeline, shared"; exit 2 ;;
  esac
  finish
done
exit $failed
