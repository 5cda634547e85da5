#!/usr/bin/env bash
# The whole comparison, from the files to a merged checkpoint: LoRA's own init beside SAILS with the
# paper's and with the gradient selection, over seeds. On Gemma-2 with one GPU, or on the toy:
#
#     export HF_TOKEN=…      # of an account that has accepted google/gemma-2-2b's licence
#     bash experiments/recipe.sh                     # google/gemma-2-2b
#     bash experiments/recipe.sh google/gemma-2-9b   # or -2b-it, -9b-it
#     bash experiments/recipe.sh toy                 # about 6 minutes of one core, no network
#
# If it is stopped, the same line goes on: finished parts are left out, begun ones are taken up.
#
# What it takes is ESTIMATED, NOT MEASURED: nothing here has run on a GPU. For one H100 with matrix
# products at 30 % of its 989 TF/s in bf16, 40 ms a token step of generation (9b: 65), and HH-RLHF's
# 42,537 pairs of 159 tokens, 38 of them trained on (means of its test part): 444 steps a pass over
# the data. An A100 takes twice as long, by the same count.
#
#                                                   2b            9b
#     1 files                         once          12 GB         21 GB, or 40 in float32
#     3 selection, both               once           2 minutes     4 minutes
#     4 a run: 200 prompts of 3 sets
#       before and after, one pass   9 times        14 minutes    31 minutes
#     5 eight sets                   9 times        10 minutes    20 minutes
#       judged by shieldgemma-2b     9 times         2 minutes     2 minutes
#     6 gcg, 10 prompts, at most     3 times        30 minutes     2 hours
#     in all                                         6 hours      14 hours
#     memory of the card                            12 GB         32 GB
#     disk: files, checkpoints, merged              20 GB         45 GB (65)
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Settings, each to be given in the environment: SEEDS="0 1 2 3 4" bash experiments/recipe.sh
MODEL=${1:-google/gemma-2-2b}
OUT=${OUT:-runs/recipe-${MODEL##*/}}
FILES=${FILES:-runs/files}               # prompts that the hub doesn't hold as plain files
SEEDS=${SEEDS:-0 1 2}                    # of the data's order, of samples and of random inits
ARMS=${ARMS:-lora paper gradient}        # what is compared; the last one is merged
CHOOSE=${CHOOSE:-}                       # more flags of select.py and train.py: "--top-k 32"
TRAIN=${TRAIN:-}                         # more of train.py: "--lr 1e-4 --recompute"
PROMPTS=${PROMPTS:-200}                  # of each evaluation set, at most; 0: all
JUDGE=${JUDGE:-}                         # beside the rules: "--judge shieldgemma"
ATTACKED=${ATTACKED:-10}                 # prompts that a suffix is searched for, first seed
TASKS=${TASKS:-mmlu,hellaswag}           # lm_eval's, for lost ability

flags_of() {                             # ARM: the flags of train.py that make it
  case $1 in
    lora) echo --init random ;;
    paper) echo --select paper ;;
    gradient) echo --select gradient ;;
    *) echo "ARMS: $1 is none of lora, paper, gradient" >&2; return 2 ;;
  esac
}

once() {                                 # FILE COMMAND…: unless FILE, its last output, is there
  if [ ! -e "$1" ]; then
    echo "+ ${*:2}"
    "${@:2}"
  fi
}

fetch() {                                # NAME URL, into $FILES
  once "$FILES/$1" curl -fsSL --create-dirs -o "$FILES/$1.part" "$2"
  if [ -e "$FILES/$1.part" ]; then mv "$FILES/$1.part" "$FILES/$1"; fi
}

# --------------------------------------------------------------------------------------------------
# 1. Files, and the sets that the models answer

for arm in $ARMS; do flags_of "$arm" > /dev/null; done
mkdir -p "$OUT"
if [ "$MODEL" = toy ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  ROLES=()                               # the recipe's own four
  SETS=(--sets toy-harmful toy-jailbreak toy-lookalike toy-benign)
  ATTACK=(--sets toy-harmful --target "here you {verb} the {noun}"
          --attack-steps 25 --attack-width 64 --attack-length 6)
else
  saes=$(python -c '
import sys
from run.settings import RECIPES
from sae import CANONICAL_L0
recipe = RECIPES.get(sys.argv[1])
if not recipe:
    sys.exit("{} has no recipe; there are {}".format(sys.argv[1], ", ".join(RECIPES)))
l0 = CANONICAL_L0[recipe["sae"], recipe["width"]]
print(recipe["sae"])
for layer in recipe["layers"]:
    print("layer_{}/width_{}/average_l0_{}/params.npz".format(layer, recipe["width"], l0[layer]))
' "$MODEL")
  # hf keeps these in ~/.cache/huggingface. Gemma's licence has to be accepted on its page; the SAEs
  # are CC-BY-4.0, the data MIT
  hf download "$MODEL" --exclude "*.gguf"
  hf download $saes
  hf download Anthropic/hh-rlhf harmless-base/train.jsonl.gz harmless-base/test.jsonl.gz \
    helpful-base/test.jsonl.gz --repo-type dataset
  hf download JailbreakBench/JBB-Behaviors data/harmful-behaviors.csv data/benign-behaviors.csv \
    --repo-type dataset
  raw=https://raw.githubusercontent.com  # MIT, but xstest: CC-BY-4.0
  fetch advbench.csv $raw/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv
  fetch harmbench.csv \
    $raw/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv
  fetch strongreject.csv \
    $raw/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv
  fetch xstest.csv $raw/paul-rottger/xstest/main/xstest_prompts.csv
  # Not HH-RLHF's own test prompts, the default: many are harmless. HEx-PHI is gated by hand: add
  # --set hex-phi=FOLDER once it is yours
  ROLES=(--set "harmful=$FILES/harmbench.csv" --set "lookalike=$FILES/xstest.csv"
         --set benign=hf://datasets/Anthropic/hh-rlhf/helpful-base/test.jsonl.gz)
  SETS=(--sets hh-rlhf jailbreakbench --set "advbench=$FILES/advbench.csv"
        --set "harmbench=$FILES/harmbench.csv" --set "strongreject=$FILES/strongreject.csv"
        --set "xstest=$FILES/xstest.csv")
  # AdvBench's rows bring their targets; Zou et al. search 500 steps
  ATTACK=(--set "advbench=$FILES/advbench.csv" --attack-steps 250)
fi

# --------------------------------------------------------------------------------------------------
# 2. A look before anything is paid for: settings and their sources, parameters, steps, memory.
# CHOOSE, TRAIN, JUDGE and what flags_of says are lists of words, and stand without quotes

python train.py --model "$MODEL" "${ROLES[@]}" $CHOOSE $TRAIN --dry-run

# --------------------------------------------------------------------------------------------------
# 3. Which features? To be looked at: train.py chooses the same ones again on its way

for select in $ARMS; do
  if [ "$select" = lora ]; then continue; fi
  here=$OUT/select-$select
  # select.py doesn't go on in a folder: it takes minutes
  if [ ! -e "$here/subspace.safetensors" ]; then rm -rf "$here"; fi
  once "$here/subspace.safetensors" \
    python select.py --model "$MODEL" --select $select $CHOOSE --out "$here"
done

# --------------------------------------------------------------------------------------------------
# 4. Answers before, selection, training, answers after; then what was learned

runs=()
for seed in $SEEDS; do
  for arm in $ARMS; do
    run=$OUT/$arm-$seed
    runs+=("$run")
    once "$run/scores.json" python train.py --model "$MODEL" $(flags_of "$arm") --seed "$seed" \
      $CHOOSE "${ROLES[@]}" --eval-prompts "$PROMPTS" $TRAIN --out "$run"
    once "$run/report.html" python -m report "$run"
  done
done

# --------------------------------------------------------------------------------------------------
# 5. The field's sets, of base and adapter. For another JUDGE take sets/*/scores.json away: the
# answers stay

for run in "${runs[@]}"; do
  here=$OUT/sets/${run##*/}
  once "$here/scores.json" \
    python eval.py "$run" "${SETS[@]}" --prompts "$PROMPTS" $JUDGE --out "$here"
done

# --------------------------------------------------------------------------------------------------
# 6. Under attack: for each prompt that is refused, a suffix is searched that makes the model comply

for arm in $ARMS; do
  run=$arm-${SEEDS%% *}
  once "$OUT/attacks/$run/scores.json" python eval.py "$OUT/$run" "${ATTACK[@]}" --attack gcg \
    --prompts "$ATTACKED" --out "$OUT/attacks/$run"
done

# --------------------------------------------------------------------------------------------------
# 7. Each arm as mean ± standard deviation over seeds

if [ ${#runs[@]} -gt 1 ]; then python -m report "${runs[@]}" | tee "$OUT/runs.txt"; fi

# --------------------------------------------------------------------------------------------------
# 8. Base and adapter as one checkpoint, and lost ability by likelihood where lm_eval is installed

once "$OUT/merged/config.json" \
  python lora.py "$OUT/${ARMS##* }-${SEEDS%% *}" --dtype bfloat16 --out "$OUT/merged"
if [ "$MODEL" != toy ] && command -v lm_eval > /dev/null; then
  for checkpoint in "$MODEL" "$OUT/merged"; do
    here=$OUT/lm_eval/${checkpoint##*/}
    once "$here" lm_eval --model hf --model_args "pretrained=$checkpoint,dtype=bfloat16" \
      --tasks "$TASKS" --output_path "$here"
  done
fi
echo "pages: $OUT/*/report.html; runs: $OUT/runs.txt; checkpoint: $OUT/merged"
