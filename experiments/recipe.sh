#!/usr/bin/env bash
# The whole recipe, from the files to a merged checkpoint: LoRA's own init beside SAILS with the paper's and with the gradient
# selection, over seeds. On Gemma-2 with one GPU or, the same commands, on the toy with one core:
#
#     export HF_TOKEN=…                              # of an account that has accepted https://huggingface.co/google/gemma-2-2b
#     bash experiments/recipe.sh                     # google/gemma-2-2b, into runs/recipe-gemma-2-2b
#     bash experiments/recipe.sh google/gemma-2-9b   # or -2b-it, -9b-it
#     bash experiments/recipe.sh toy                 # 7 minutes of one core, no account, no network
#
# Stopped or killed, it goes on by the same line: what is finished is left out, what is begun is taken up where it was.
#
# What it takes is ESTIMATED, NOT MEASURED: nothing here has run on a GPU. For one H100 with matrix products at 30 % of its 989 TF/s in
# bf16, 40 ms a token step of generation (9b: 65), and HH-RLHF's 42,537 pairs of 159 tokens, 38 of them trained on (means of its test
# part): 444 steps an epoch. An A100 takes twice as long, by the same count.
#
#                                                      2b               9b
#     1 files                            once          12 GB            21 GB, or 40 where the weights are float32
#     3 selection, both                  once           2 minutes        4 minutes
#     4 a run: 200 prompts of 3 sets
#       before and after, an epoch      9 times        14 minutes       31 minutes
#     5 eight sets, lost ability        9 times        11 minutes       22 minutes
#       judged by shieldgemma-2b        9 times         2 minutes        2 minutes
#     6 gcg, 10 prompts, at most        3 times        30 minutes        2 hours
#     in all                                            6 hours         14 hours
#     memory of the card                               12 GB            32 GB
#     disk: files, checkpoints, merged                 20 GB            45 GB (65)
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Settings, each to be given in the environment: SEEDS="0 1 2 3 4" bash experiments/recipe.sh
MODEL=${1:-google/gemma-2-2b}
OUT=${OUT:-runs/recipe-${MODEL##*/}}
FILES=${FILES:-runs/files}               # prompts and texts that the hub doesn't hold as plain files
SEEDS=${SEEDS:-0 1 2}                    # of the data's order, of samples and of random inits
ARMS=${ARMS:-lora paper gradient}        # what is compared: the others are held against the first, the last one is merged
CHOOSE=${CHOOSE:-}                       # more flags of select.py and train.py: "--pairs 500 --top-k 32"
TRAIN=${TRAIN:-}                         # more of train.py: "--epochs 2 --lr 1e-4", "--recompute" where memory is short
PROMPTS=${PROMPTS:-200}                  # of each evaluation set, at most; 0: all
JUDGE=${JUDGE:-}                         # beside the rules: "--judge shieldgemma", "--judge rubric --judge-model NAME" (README)
ATTACKED=${ATTACKED:-10}                 # prompts that a suffix is searched for, in the first seed's runs

flags_of() {                             # ARM: the flags of train.py that make it
  case $1 in
    lora) echo --init random ;;
    paper) echo --select paper ;;
    gradient) echo --select gradient ;;
    *) echo "ARMS: $1 is none of lora, paper, gradient" >&2; return 2 ;;
  esac
}

once() {                                 # FILE COMMAND…: unless FILE, the last that the command writes, is there
  if [ ! -e "$1" ]; then
    echo "+ ${*:2}"
    "${@:2}"
  fi
}

fetch() {                                # NAME URL, into $FILES
  once "$FILES/$1" curl -fsSL --create-dirs -o "$FILES/$1.part" "$2"
  if [ -e "$FILES/$1.part" ]; then mv "$FILES/$1.part" "$FILES/$1"; fi
}

# ---------------------------------------------------------------------------------------------------------------
# 1. Files, and what is asked of the models

for arm in $ARMS; do flags_of "$arm" > /dev/null; done
mkdir -p "$OUT"
if [ "$MODEL" = toy ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  ASKED=(--harmful toy/data/harmful.jsonl --jailbreak toy/data/jailbreak.jsonl
         --lookalike toy/data/lookalike.jsonl --benign toy/data/benign.jsonl)
  SETS=(--sets toy-harmful toy-jailbreak toy-lookalike toy-benign)
  LOST=(--perplexity "$FILES/toy-text.txt" --choices "$FILES/toy-choices.jsonl")
  ATTACK=(--sets toy-harmful --target "here you {verb} the {noun}" --attack-steps 25 --attack-width 64 --attack-length 6 --attack-check 5)
  # What the toy's model knows, as sentences and as questions: the material of a noun, among three others
  [ -e "$FILES/toy-choices.jsonl" ] || python -c '
import json, pathlib, random, sys
draw, out = random.Random(0), pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in open("toy/data/benign.jsonl", encoding="utf-8")]
materials, text, asked = sorted({row["answer"][0] for row in rows}), [], []
for row in rows:
    material, tool, manner = row["answer"]
    before = "here you {verb} the {noun} {} with the ".format(manner, **row)
    others = draw.sample([other for other in materials if other != material], 3)
    text.append(f"{before}{material} {tool}.")
    asked.append({"prompt": before, "choices": [f"{one} {tool}." for one in (material, *others)], "answer": 0})
out.mkdir(parents=True, exist_ok=True)
(out / "toy-text.txt").write_text("\n\n".join(text))
(out / "toy-choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))' "$FILES"
else
  saes=$(python -c '
import sys, recipe, sae
of = recipe.RECIPES.get(sys.argv[1]) or sys.exit("{} has no recipe; there are {}".format(sys.argv[1], ", ".join(recipe.RECIPES)))
width, l0 = of["width"], sae.CANONICAL_L0[of["sae"], of["width"]]
print(of["sae"], *(f"layer_{layer}/width_{width}/average_l0_{l0[layer]}/params.npz" for layer in of["layers"]))' "$MODEL")
  # hf keeps these in ~/.cache/huggingface. Gemma's licence has to be accepted on its page; the SAEs are CC-BY-4.0, the data MIT
  hf download "$MODEL" --exclude "*.gguf"
  hf download $saes
  hf download Anthropic/hh-rlhf harmless-base/train.jsonl.gz harmless-base/test.jsonl.gz helpful-base/test.jsonl.gz --repo-type dataset
  hf download JailbreakBench/JBB-Behaviors data/harmful-behaviors.csv data/benign-behaviors.csv --repo-type dataset
  github=https://raw.githubusercontent.com
  fetch advbench.csv $github/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv                              # MIT
  fetch harmbench.csv $github/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv     # MIT
  fetch strongreject.csv $github/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv            # MIT
  fetch xstest.csv $github/paul-rottger/xstest/main/xstest_prompts.csv                                                     # CC-BY-4.0
  fetch hellaswag.jsonl $github/rowanz/hellaswag/master/data/hellaswag_val.jsonl                                           # MIT
  fetch wikitext.txt $github/pytorch/examples/main/word_language_model/data/wikitext-2/test.txt                            # CC-BY-SA
  # Not HH-RLHF's own test prompts, the default: many are harmless. HEx-PHI is gated by hand: --set hex-phi=FILE once it is yours
  ASKED=(--harmful "$FILES/harmbench.csv" --lookalike "$FILES/xstest.csv"
         --benign hf://datasets/Anthropic/hh-rlhf/helpful-base/test.jsonl.gz)
  SETS=(--sets hh-rlhf jailbreakbench --set "advbench=$FILES/advbench.csv" --set "harmbench=$FILES/harmbench.csv"
        --set "strongreject=$FILES/strongreject.csv" --set "xstest=$FILES/xstest.csv")
  LOST=(--perplexity "$FILES/wikitext.txt" --choices "$FILES/hellaswag.jsonl")
  ATTACK=(--set "advbench=$FILES/advbench.csv" --attack-steps 250)        # its rows bring their targets; Zou et al. search 500 steps
fi

# ---------------------------------------------------------------------------------------------------------------
# 2. A look before anything is paid for: settings and where they come from, parameters, steps, memory
# (CHOOSE, TRAIN, JUDGE and what flags_of says are lists of words, and stand without quotes)

python train.py --model "$MODEL" "${ASKED[@]}" $CHOOSE $TRAIN --dry-run

# ---------------------------------------------------------------------------------------------------------------
# 3. Which features? To be looked at: train.py chooses the same ones again on its way

for select in paper gradient; do
  here=$OUT/select-$select
  if [ ! -e "$here/subspace.safetensors" ]; then rm -rf "$here"; fi       # select.py doesn't go on: it takes minutes
  once "$here/subspace.safetensors" python select.py --model "$MODEL" --select $select $CHOOSE --out "$here"
done

# ---------------------------------------------------------------------------------------------------------------
# 4. Answers before, selection, training, answers after, what was learned

runs=()
for seed in $SEEDS; do
  for arm in $ARMS; do
    flags=$(flags_of "$arm")
    runs+=("$arm-$seed")
    once "$OUT/$arm-$seed/report.html" python train.py --model "$MODEL" $flags --seed "$seed" $CHOOSE \
      "${ASKED[@]}" --eval-prompts "$PROMPTS" $TRAIN --out "$OUT/$arm-$seed"
  done
done

# ---------------------------------------------------------------------------------------------------------------
# 5. The field's sets, and lost ability by likelihood, of base and adapter. Another JUDGE: take asked/*/report.html away, answers stay

for run in "${runs[@]}"; do
  once "$OUT/asked/$run/report.html" python eval.py "$OUT/$run" "${SETS[@]}" "${LOST[@]}" --prompts "$PROMPTS" $JUDGE \
    --out "$OUT/asked/$run"
done

# ---------------------------------------------------------------------------------------------------------------
# 6. Under attack: for each prompt that is refused, a suffix is searched that makes the model give in

for arm in $ARMS; do
  run=$arm-${SEEDS%% *}
  once "$OUT/attacked/$run/report.html" python eval.py "$OUT/$run" "${ATTACK[@]}" --attack gcg --prompts "$ATTACKED" \
    --out "$OUT/attacked/$run"
done

# ---------------------------------------------------------------------------------------------------------------
# 7. Reports: each arm as mean ± standard deviation over seeds; seed by seed, each prompt by prompt against the first; the attacks

python report.py "${runs[@]/#/$OUT/}" --page "$OUT/runs.html" | tee "$OUT/runs.txt"
for seed in $SEEDS; do
  here=()
  for arm in $ARMS; do here+=("$OUT/asked/$arm-$seed"); done
  python report.py "${here[@]}" --page "$OUT/asked-$seed.html" | tee "$OUT/asked-$seed.txt"
done
here=()
for arm in $ARMS; do here+=("$OUT/attacked/$arm-${SEEDS%% *}"); done
python report.py "${here[@]}" --page "$OUT/attacked.html" | tee "$OUT/attacked.txt"

# ---------------------------------------------------------------------------------------------------------------
# 8. Base and adapter as one checkpoint, for whatever opens Gemma-2: lm_eval --model hf --model_args pretrained=$OUT/merged --tasks mmlu

once "$OUT/merged/config.json" python lora.py "$OUT/${ARMS##* }-${SEEDS%% *}" --dtype bfloat16 --out "$OUT/merged"
echo "pages: $OUT/runs.html $OUT/asked-*.html $OUT/attacked.html; checkpoint: $OUT/merged"
