#!/usr/bin/env bash
# The paper's main table, from the files to its last row: base, full fine-tuning, LoRA's own init,
# SAILS with the paper's and with the gradient selection, and the RLHF-tuned model, over seeds. On
# Gemma-2 with one GPU, or on the toy, which has no RLHF-tuned model:
#
#     export HF_TOKEN=…      # of an account that has accepted google/gemma-2-2b's licence
#     bash experiments/recipe.sh                     # google/gemma-2-2b
#     bash experiments/recipe.sh google/gemma-2-9b
#     bash experiments/recipe.sh toy                 # some minutes of a CPU, no network
#
# If it is stopped, the same line goes on: finished parts are left out, begun ones are taken up.
# Full fine-tuning of the 9b needs 183 GB: leave it out (ARMS="base lora sails gradient it"), or
# train it first on several cards, with the same --out:
#
#     torchrun --nproc-per-node 4 train.py --model google/gemma-2-9b --method full --shard …
#
# What it takes is ESTIMATED, NOT MEASURED: nothing here has run on a GPU. For one H100 with matrix
# products at 30 % of its 989 TF/s in bf16, 40 ms a token step of generation (9b: 65), and HH-RLHF's
# 42,537 pairs of 159 tokens, 38 of them trained on (means of its test part): 444 steps a pass over
# the data. An A100 takes twice as long, by the same count.
#
#                                                   2b            9b
#     1 files                         once          17 GB         40 GB, or 80 in float32
#     3 selection, both               once           2 minutes     4 minutes
#     4 a run: 200 prompts of 4 sets
#       before and after, one pass   12 times       15 minutes    33 minutes
#     5 1,663 prompts of six sets    14 times        5 minutes     8 minutes
#     6 gcg, 21 prompts, at most      6 times        1 hour        4 hours
#     8 50 steps more, three looks    6 times        8 minutes    15 minutes
#     in all                                        12 hours      34 hours
#     memory of the card, LoRA                      12 GB         32 GB
#     memory of the card, full                      57 GB         4 × 60 GB
#     disk: files, models of full                   33 GB         96 GB
#       and while full is training                  63 GB         222 GB
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Settings, each to be given in the environment: SEEDS="0 1 2 3 4" bash experiments/recipe.sh
MODEL=${1:-google/gemma-2-2b}
OUT=${OUT:-runs/recipe-${MODEL##*/}}
FILES=${FILES:-runs/files}               # prompts that the hub doesn't hold as plain files
SEEDS=${SEEDS:-0 1 2}                    # of the data's order, of samples and of random inits
ARMS=${ARMS:-base full lora sails gradient it}   # what is compared
CHOOSE=${CHOOSE:-}                       # more flags of select.py and train.py: "--top-k 32"
TRAIN=${TRAIN:-}                         # more of train.py: "--lr 1e-4 --recompute"
FULL=${FULL:-}                           # more of train.py for full: "--lr 5e-6 --recompute"
PROMPTS=${PROMPTS:-0}                    # of each evaluation set, at most; 0: all
JUDGE=${JUDGE:-}                         # the paper's 1 to 5: "--judge rubric --judge-model NAME"
ATTACKED=${ATTACKED:-21}                 # prompts that a suffix is searched for, first seed
TASKS=${TASKS:-mmlu,hellaswag}           # lm_eval's, for lost ability
IT=${IT-}                                # the RLHF-tuned model: by default, MODEL's -it
AFTER=${AFTER-"--lrs 2e-4 --looks 0 10 50"}      # of experiments.after; empty: it is left out

flags_of() {                             # ARM: the flags of train.py that make it
  case $1 in
    base | it) ;;                        # not trained here
    full) echo --method full $FULL ;;
    lora) echo --init random $TRAIN ;;
    sails) echo --select paper $CHOOSE $TRAIN ;;
    gradient) echo --select gradient $CHOOSE $TRAIN ;;
    *) echo "ARMS: $1 is none of base, full, lora, sails, gradient, it" >&2; return 2 ;;
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
  BENIGN=()
  SETS=(--sets toy-harmful toy-jailbreak toy-lookalike toy-benign)
  ATTACK=(--sets toy-harmful --target "here you {verb} the {noun}"
          --attack-steps 25 --attack-width 64 --attack-length 6)
  echo "the toy has no RLHF-tuned model: the arm \"it\" is left out"
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
  if [[ $MODEL != *-it ]]; then IT=${IT:-$MODEL-it}; fi
  if [[ $IT && " $ARMS " == *" it "* ]]; then hf download "$IT" --exclude "*.gguf"; fi
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
  # Not HH-RLHF's own test prompts, the default: many are harmless
  ROLES=(--set "harmful=$FILES/harmbench.csv" --set "lookalike=$FILES/xstest.csv"
         --set benign=hf://datasets/Anthropic/hh-rlhf/helpful-base/test.jsonl.gz)
  SETS=(--sets hh-rlhf jailbreakbench --set "harmbench=$FILES/harmbench.csv"
        --set "strongreject=$FILES/strongreject.csv" --set "xstest=$FILES/xstest.csv")
  # HEx-PHI, the paper's set: its owners let people in by hand
  if hf download LLM-Tuning-Safety/HEx-PHI --repo-type dataset > /dev/null 2>&1; then
    SETS+=(--sets hex-phi)
  else
    echo "HEx-PHI is left out: ask at https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI"
  fi
  # 15,011 instructions with answers by people, CC-BY-SA-3.0
  BENIGN=(--benign hf://datasets/databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl)
  # AdvBench's rows bring their targets; Zou et al. search 500 steps
  ATTACK=(--set "advbench=$FILES/advbench.csv" --attack-steps 250)
fi

# --------------------------------------------------------------------------------------------------
# 2. A look before anything is paid for: settings and their sources, parameters, steps, memory.
# CHOOSE, TRAIN, FULL, JUDGE, AFTER and what flags_of says are lists of words, without quotes

for arm in $ARMS; do
  case $arm in
    full | sails) python train.py --model "$MODEL" "${ROLES[@]}" $(flags_of $arm) --dry-run ;;
  esac
done

# --------------------------------------------------------------------------------------------------
# 3. Which features? To be looked at: train.py chooses the same ones again on its way

for arm in $ARMS; do
  case $arm in sails) select=paper ;; gradient) select=gradient ;; *) continue ;; esac
  here=$OUT/select-$arm
  # select.py doesn't go on in a folder: it takes minutes
  if [ ! -e "$here/subspace.safetensors" ]; then rm -rf "$here"; fi
  once "$here/subspace.safetensors" \
    python select.py --model "$MODEL" --select $select $CHOOSE --out "$here"
done

# --------------------------------------------------------------------------------------------------
# 4. Answers before, selection, training, answers after; then what each arm's first adapter learned

models=()                                # all that is compared, by name or folder
attacked=()                              # of each arm one
for arm in $ARMS; do
  case $arm in
    base) models+=("$MODEL"); attacked+=("$MODEL"); continue ;;
    it) if [ -n "$IT" ]; then models+=("$IT"); attacked+=("$IT"); fi; continue ;;
  esac
  for seed in $SEEDS; do
    run=$OUT/$arm-$seed
    models+=("$run")
    is_first=$([ "$seed" = "${SEEDS%% *}" ] && echo yes || true)
    if [ "$is_first" ]; then attacked+=("$run"); fi
    once "$run/scores.json" python train.py --model "$MODEL" $(flags_of "$arm") --seed "$seed" \
      "${ROLES[@]}" --out "$run"
    if [ "$arm" != full ] && [ "$is_first" ]; then
      once "$run/report.html" python -m report "$run"
    fi
  done
done

# --------------------------------------------------------------------------------------------------
# 5. The field's sets, each answered once by each model. For another JUDGE take sets/scores.json
# away: the answers stay

once "$OUT/sets/scores.json" \
  python eval.py "${models[@]}" "${SETS[@]}" --prompts "$PROMPTS" $JUDGE --out "$OUT/sets"

# --------------------------------------------------------------------------------------------------
# 6. Under attack: for each prompt that is refused, a suffix is searched that makes the model comply

once "$OUT/attacks/scores.json" python eval.py "${attacked[@]}" "${ATTACK[@]}" --attack gcg \
  --prompts "$ATTACKED" --out "$OUT/attacks"

# --------------------------------------------------------------------------------------------------
# 7. Lost ability by likelihood, where lm_eval is installed; of each arm one

if [ "$MODEL" != toy ] && command -v lm_eval > /dev/null; then
  for model in "${attacked[@]}"; do
    source="pretrained=$MODEL,peft=$model"
    if [ -e "$model/model" ]; then source="pretrained=$model/model"; fi
    if [ ! -d "$model" ]; then source="pretrained=$model"; fi
    here=$OUT/lm_eval/${model##*/}
    once "$here" lm_eval --model hf --model_args "$source,dtype=bfloat16" --tasks "$TASKS" \
      --output_path "$here"
  done
fi

# --------------------------------------------------------------------------------------------------
# 8. Does it last? Of each arm one, fine-tuned once more on harmless rows; a toy has rows of its own

if [ -n "$AFTER" ]; then
  python -m experiments.after "${attacked[@]}" "${BENIGN[@]}" $AFTER --out "$OUT/after.jsonl"
fi

# --------------------------------------------------------------------------------------------------
# 9. The table, beside the paper's figures

python -m experiments.paper_table "$OUT"
echo "pages: $OUT/*/report.html; table: $OUT/table.txt; answers: $OUT/sets/completions.jsonl"
