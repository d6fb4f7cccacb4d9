#!/usr/bin/env bash
# Runs the tests marked `gpu`, the benchmarks of loss, its members, top-k and training step, and a few steps of the trainer on a CUDA
# machine, in nine minutes at most.
#
#     [OUT=DIR] [PYTHON=python3] [PROFUSER_COMMIT=HASH] benchmarks/gpu.sh [--dry] [WHEELS]
#
# It writes bench_gpu.json, bench_gpu.png, bench_gpu.md and the logs to OUT (default: benchmarks/results). Every step has a time
# limit, and together they have no more than the whole. What matters most comes first: whether the kernels are right, then the time of
# the loss at 4096 x 4096 x 128256 beside others, then every member of its family there. Whatever was measured within a limit is written.
#
# --dry takes the same steps without a GPU: tiny shapes, kernels in Triton's interpreter, tests only collected. It measures nothing. The
# limits are four times as long.
#
# It needs a checkout, from which nothing is installed, and no network. It also needs a Python >= 3.11 with CUDA builds of torch
# >= 2.11 and triton >= 3.6, transformers 5, matplotlib, jinja2, psutil, pytest and pytest-benchmark >= 5.1. Packages that this
# Python lacks can be given as WHEELS, a folder of wheels. They are installed into a temporary folder and not into that Python:
#     always       jsonargparse docstring-parser typeshed-client (and pytest, pytest-benchmark, py-cpuinfo)
#     the trainer  accelerate, datasets, filelock, tqdm, pyyaml and what they need: without them its steps fail, and the others run
#     to compare   liger-kernel cut-cross-entropy trl; quack-kernels with nvidia-cutlass-dsl and its libs, apache-tvm-ffi,
#                  torch-c-dlpack-ext, einops, which liger-cute needs, too: without them these implementations are skipped, and the
#                  result says so
# PROFUSER_COMMIT names the commit if the checkout came without its history.
set -uo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
LIMIT=540
SLOWER=1
tests=() steps=()
if [ "${1:-}" = --dry ]; then
  shift
  SLOWER=4
  tests=(--collect-only)
  steps=(--steps 2)
  export TRITON_INTERPRET=1 TORCH_COMPILE_DISABLE=1 CUDA_VISIBLE_DEVICES=''
fi
LIMIT=$((LIMIT * SLOWER))
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=.:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# step SECONDS NAME COMMAND... runs a command, and interrupts it after that time or at the limit of the whole script, whichever
# comes first. It shows the end of the output. Without --foreground, a second interrupt, sent to the process group, would meet
# pytest while it writes its results.
step() {
  local limit=$(($1 * SLOWER)) name=$2
  shift 2
  local left=$((LIMIT - SECONDS - 35))
  ((limit < left)) || limit=$left
  ((limit > 5)) || { echo "== $name: no time left"; return; }
  timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "== $name: exit $? at ${SECONDS} s"
  tail -n 12 "$OUT/$name.log"
}

# bench SECONDS NAME FILE... runs benchmarks, and starts no new one in the last quarter of its time.
bench() {
  local limit=$1 name=$2
  shift 2
  step "$limit" "$name" "$PYTHON" -m pytest "$@" --benchmark-only --seconds=$((limit * SLOWER * 3 / 4)) \
    --benchmark-json="$site/$name.json" --benchmark-columns=median,rounds -q
}

if [ $# -gt 0 ]; then
  step 30 wheels "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$1"/*.whl
fi
# Whether the kernels are right: the tests that otherwise run in Triton's interpreter, here with compiled kernels, with small shapes and
# every option; and those at sizes that need a GPU. Only files with such a test are given, because the others may import what this
# Python lacks.
# Compiling the kernels takes longer than running them, which several processes do at a time where pytest-xdist is there.
workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist worksteal)
step 50 native_tests "$PYTHON" -m pytest -q "${tests[@]}" "${workers[@]}" -k "triton" tests/test_fused_loss.py \
  tests/test_fused_loss_triton.py tests/test_source_topk_triton.py tests/test_source_topk_triton_merge.py
step 60 gpu_tests "$PYTHON" -m pytest -q "${tests[@]}" "${workers[@]}" -m gpu $(grep -l "mark\.gpu" tests/test_*.py)
# What compiles and tunes itself for long is a step of its own, so that it can use up only its own time.
headline="4k-128k"
tuned="compiled or quack"
bench 70 headline benchmarks/bench_fused_loss.py -k "$headline and not ($tuned)"
bench 70 members benchmarks/bench_members.py
bench 50 headline_tuned benchmarks/bench_fused_loss.py -k "$headline and ($tuned)"
# The trainer on the bundled demo: in bf16 with the Triton kernels, the same sharded (FSDP2) on one device, and in fp32 on the CPU, whose
# losses should be nearly the same.
trainer=(-m benchmarks.trainer_steps "${steps[@]}")
step 30 trainer "$PYTHON" "${trainer[@]}"
bench 30 topk benchmarks/bench_source_topk.py
bench 30 train_step benchmarks/bench_train_step.py
step 25 trainer_sharded "$PYTHON" -m torch.distributed.run --nproc-per-node 1 "${trainer[@]}" --shard
CUDA_VISIBLE_DEVICES='' step 20 trainer_cpu "$PYTHON" "${trainer[@]}"
bench 40 shapes benchmarks/bench_fused_loss.py -k "not $headline and not ($tuned)"
# With what time others left:
if [ $SLOWER = 1 ] && command -v compute-sanitizer >/dev/null; then
  step 60 sanitizer compute-sanitizer --target-processes all --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/test_fused_loss_gpu.py -k test_a_bad_row_is_nan
fi

"$PYTHON" - "$OUT/bench_gpu.json" "$site"/{headline,headline_tuned,members,topk,train_step,shapes}.json <<'END'
import json, sys
from pathlib import Path

parts = [json.loads(Path(path).read_text()) for path in sys.argv[2:] if Path(path).is_file() and Path(path).stat().st_size]
if not parts:
    sys.exit("error: no benchmark has finished")
whole = {**parts[0], **{key: sum((part.get(key, []) for part in parts), []) for key in ("benchmarks", "skipped")}}
Path(sys.argv[1]).write_text(json.dumps(whole, indent=1))
END
timeout 20 "$PYTHON" -m benchmarks.report "$OUT/bench_gpu.json" >"$OUT/bench_gpu.md"
echo "== $(ls "$OUT"/bench_gpu.*) at ${SECONDS} s"
