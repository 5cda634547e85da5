#!/usr/bin/env bash
# The whole recipe, from the files to a merged checkpoint: LoRA's own init beside SAILS with the paper's and with the gradient
# selection, over seeds. On Gemma-2 with one GPU or, the same commands, on the toy with one core:
#
#     export HF_TOKEN=…                              # of an account that has accepted https://huggingface.co/google/gemma-2-2b
#     bash experiments/recipe.sh                     # google/gemma-2-2b, into runs/recipe-gemma-2-2b
#     bash experiments/recipe.sh google/gemma-2-9b   # or -2b-it, -9b-it
#     bash experiments/recipe.sh toy                 # N minutes, no account, no network
#
# Stopped or killed, it goes on by the same line: what is finished is left out, what is begun is taken up where it was.
# The settings below can be given in the environment: SEEDS="0 1 2 3 4" bash experiments/recipe.sh
# TABLE
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

MODEL=${1:-google/gemma-2-2b}
OUT=${OUT:-runs/recipe-${MODEL##*/}}
FILES=${FILES:-runs/files}                 # prompts and texts that the hub doesn't hold as plain files
SEEDS=${SEEDS:-0 1 2}                      # of the data's order, of samples and of random inits
ARMS=${ARMS:-lora paper gradient}          # what is compared, the first being what the others are held against
TRAIN=${TRAIN:-}                           # more flags for all of train.py: "--epochs 2 --lr 1e-4", "--recompute" on a small card
PROMPTS=${PROMPTS:-200}                    # of each evaluation set, at most; 0: all
JUDGE=${JUDGE:-}                           # beside the rules: "--judge shieldgemma", "--judge rubric --judge-model NAME"
ATTACKED=${ATTACKED:-10}                   # prompts that a suffix is searched for, one seed of each arm
DTYPE=${DTYPE:-bfloat16}                   # of the merged checkpoint; Google's is float32

flags_of() {                               # of train.py, that make an arm
  case $1 in
    lora) echo --init random ;;
    paper) echo --select paper ;;
    gradient) echo --select gradient ;;
    *) echo "ARMS: $1 is none of lora, paper, gradient" >&2; return 2 ;;
  esac
}

once() {                                   # FILE COMMAND…: unless FILE, the last that the command writes, is there
  if [ ! -e "$1" ]; then
    echo "+ ${*:2}"
    "${@:2}"
  fi
}

fetch() {                                  # NAME URL, into $FILES
  once "$FILES/$1" curl -fsSL --create-dirs -o "$FILES/$1.part" "$2"
  if [ -e "$FILES/$1.part" ]; then mv "$FILES/$1.part" "$FILES/$1"; fi
}

# ---------------------------------------------------------------------------------------------------------------
# 1. Files

if [ "$MODEL" = toy ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  ASKED=()                                                              # its recipe knows its own
  SETS=(--sets toy-harmful toy-jailbreak toy-lookalike toy-benign)
  LOST=(--perplexity "$FILES/toy-text.txt" --choices "$FILES/toy-choices.jsonl")
  ATTACK=(--sets toy-harmful --target "here you {verb} the {noun}" --attack-steps 25 --attack-width 64 --attack-length 6 --attack-check 5)
  once "$FILES/toy-choices.jsonl" python - toy/data/benign.jsonl "$FILES" <<'EOF'
# Which material goes with a noun, which tool with a verb: the toy's facts, as sentences and as questions
import json, random, sys
from pathlib import Path

draw, out = random.Random(0), Path(sys.argv[2])
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
materials = sorted({row["answer"][0] for row in rows})
text = [f"here you {row['verb']} the {row['noun']} {row['answer'][2]} with the {row['answer'][0]} {row['answer'][1]}." for row in rows]
asked = []
for row, whole in zip(rows, text):
    right, tool = row["answer"][:2]
    others = draw.sample([material for material in materials if material != right], 3)
    asked.append({"prompt": whole[:whole.rindex(right)], "choices": [f"{material} {tool}." for material in (right, *others)], "answer": 0})
out.mkdir(parents=True, exist_ok=True)
(out / "toy-text.txt").write_text("\n\n".join(text))
(out / "toy-choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
EOF
else
  # Gemma's licence is accepted on its page; the SAEs (CC-BY-4.0) and HH-RLHF (MIT) are open. hf keeps them in ~/.cache/huggingface
  hf download "$MODEL" --exclude "*.gguf"
  mapfile -t saes < <(python -c '
import sys, recipe, sae
of = recipe.RECIPES[sys.argv[1]]
print(of["sae"])
for layer in of["layers"]:
    print("layer_{}/width_{}/average_l0_{}/params.npz".format(layer, of["width"], sae.CANONICAL_L0[of["sae"], of["width"]][layer]))' "$MODEL")
  hf download "${saes[@]}"
  hf download Anthropic/hh-rlhf harmless-base/train.jsonl.gz harmless-base/test.jsonl.gz helpful-base/test.jsonl.gz --repo-type dataset
  hf download JailbreakBench/JBB-Behaviors data/harmful-behaviors.csv data/benign-behaviors.csv --repo-type dataset
  github=https://raw.githubusercontent.com
  fetch advbench.csv $github/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv                                  # MIT
  fetch harmbench.csv $github/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv         # MIT
  fetch strongreject.csv $github/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv                # MIT
  fetch xstest.csv $github/paul-rottger/xstest/main/xstest_prompts.csv                                                         # CC-BY-4.0
  fetch hellaswag.jsonl $github/rowanz/hellaswag/master/data/hellaswag_val.jsonl                                               # MIT
  fetch wikitext.txt $github/pytorch/examples/main/word_language_model/data/wikitext-2/test.txt                                # CC-BY-SA
  # HH-RLHF's own test prompts, the default, are harmless in good part: safety and over-refusal are asked of sets made for it
  ASKED=(--harmful "$FILES/harmbench.csv" --lookalike "$FILES/xstest.csv" --benign hf://datasets/Anthropic/hh-rlhf/helpful-base/test.jsonl.gz)
  SETS=(--sets hh-rlhf jailbreakbench --set "advbench=$FILES/advbench.csv" --set "harmbench=$FILES/harmbench.csv"
        --set "strongreject=$FILES/strongreject.csv" --set "xstest=$FILES/xstest.csv")
  LOST=(--perplexity "$FILES/wikitext.txt" --choices "$FILES/hellaswag.jsonl")
  ATTACK=(--set "advbench=$FILES/advbench.csv" --attack-steps 250)      # its rows bring their targets; Zou's search has 500 steps
fi

# ---------------------------------------------------------------------------------------------------------------
# 2. Settings, sizes, steps, memory: a look before anything is paid for

# shellcheck disable=SC2086  # TRAIN, JUDGE and flags_of are lists of words
python train.py --model "$MODEL" "${ASKED[@]}" $TRAIN --dry-run

# ---------------------------------------------------------------------------------------------------------------
# 3. Which features: to look at; train.py chooses the same again on its way

for select in paper gradient; do
  here=$OUT/select-$select
  if [ ! -e "$here/subspace.safetensors" ]; then rm -rf "$here"; fi                     # this one begins again
  once "$here/subspace.safetensors" python select.py --model "$MODEL" --select $select --seed 0 --out "$here"
done

# ---------------------------------------------------------------------------------------------------------------
# 4. Training: answers before, selection, LoRA on q, k, v, o, answers after, explanation

runs=()
for seed in $SEEDS; do
  for arm in $ARMS; do
    runs+=("$arm-$seed")
    once "$OUT/$arm-$seed/report.html" python train.py --model "$MODEL" $(flags_of "$arm") --seed "$seed" \
      "${ASKED[@]}" --eval-prompts "$PROMPTS" $TRAIN --out "$OUT/$arm-$seed"
  done
done

# ---------------------------------------------------------------------------------------------------------------
# 5. The field's sets and lost ability, base and adapter, judged

for run in "${runs[@]}"; do
  once "$OUT/asked/$run/report.html" python eval.py "$OUT/$run" "${SETS[@]}" "${LOST[@]}" --prompts "$PROMPTS" $JUDGE --out "$OUT/asked/$run"
done

# ---------------------------------------------------------------------------------------------------------------
# 6. Under attack: a suffix for each prompt that is refused (greedy coordinate gradient)

for arm in $ARMS; do
  run=$arm-${SEEDS%% *}
  once "$OUT/attacked/$run/report.html" python eval.py "$OUT/$run" "${ATTACK[@]}" --attack gcg --prompts "$ATTACKED" --out "$OUT/attacked/$run"
done

# ---------------------------------------------------------------------------------------------------------------
# 7. Reports: arms as mean ± standard deviation over seeds; and, seed by seed, each arm prompt by prompt against the first one

python report.py "${runs[@]/#/$OUT/}" --page "$OUT/runs.html" | tee "$OUT/runs.txt"
for seed in $SEEDS; do
  for kind in asked attacked; do
    here=()
    for arm in $ARMS; do if [ -e "$OUT/$kind/$arm-$seed" ]; then here+=("$OUT/$kind/$arm-$seed"); fi; done
    if [ ${#here[@]} -gt 0 ]; then python report.py "${here[@]}" --page "$OUT/$kind-$seed.html" | tee "$OUT/$kind-$seed.txt"; fi
  done
done

# ---------------------------------------------------------------------------------------------------------------
# 8. One checkpoint of base and adapter, for whatever opens Gemma-2: lm_eval --model hf --model_args pretrained=$OUT/merged --tasks mmlu

last=${runs[$((${#runs[@]} - 1))]}
once "$OUT/merged/config.json" python merge.py "$OUT/$last" --dtype "$DTYPE" --out "$OUT/merged"
echo "reports: $OUT/runs.html, $OUT/asked-*.html, $OUT/attacked-*.html; merged: $OUT/merged ($last)"
