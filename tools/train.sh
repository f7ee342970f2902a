#!/usr/bin/env bash
# `make train`: the quickstart experiment, stopped on purpose near its end and resumed on another layout, then what came out.
# Arguments are further overrides. Exits with the run's own code.
set -euo pipefail
run="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
say() { if [ -t 1 ]; then printf '\n\033[1m== %s\033[0m\n' "$*"; else printf '\n== %s\n' "$*"; fi; }

num_gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
if [ "$num_gpus" -gt 0 ] || grep -qw -e amx_bf16 -e avx512_bf16 /proc/cpuinfo; then
  set -- precision=bf16 "$@" # this hardware multiplies bf16 faster than fp32, the experiment's own choice
fi

if [ "$num_gpus" -eq 1 ]; then
  set -- launch.procs_per_node=1 "$@" # a rank for each GPU
fi

say "1/4  train with ZeRO 1, and stop early on purpose: $run"
echo "\$ anyshard train experiment=cpu_quickstart run.dir=$run stop.at_step=240 $*"
code=0
anyshard train experiment=cpu_quickstart run.dir="$run" stop.at_step=240 "$@" || code=$?
if [ "$code" -ne 75 ]; then # 75: stopped early with its state saved
  exit "$code"
fi

say "2/4  resume on another layout: 1 rank, ZeRO 3; the loss goes on where it was"
echo "\$ anyshard resume $run zero=z3 launch.procs_per_node=1"
code=0
anyshard resume "$run" zero=z3 launch.procs_per_node=1 || code=$?
if [ "$code" -ne 0 ]; then
  exit "$code"
fi

say "3/4  the checkpoints"
echo "\$ anyshard ckpt ls $run"
anyshard ckpt ls "$run"
echo "\$ anyshard ckpt verify $run"
anyshard ckpt verify "$run"

say "4/4  what came out"
python - "$run" <<'END'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
last = [record for record in records if "eval/perplexity" in record][-1]
print(f"validation perplexity  {last['eval/perplexity']:.1f}   (a unigram model has {last['eval/unigram_perplexity']:.1f})")
print(f"plot                   {run}/curves.png")
print(f"run directory          {run}")
print()
print("try next:")
print(f"  .venv/bin/anyshard resume {run} train.max_steps=1000 launch.procs_per_node=2 zero=z2")
print("  .venv/bin/anyshard plan experiment=llama3_8b_8xh100")
print("  .venv/bin/anyshard train model=llama_15m data=text 'data.path=~/my/*.md' data.tokenizer=bpe launch.procs_per_node=2")
END
