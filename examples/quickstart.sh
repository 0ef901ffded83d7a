#!/usr/bin/env bash
# Teach SmolLM2-135M a new name: convert it, fine-tune it, convert it back, ask it who it is.
#
# Every step is printed as a command that can be repeated by hand. Two CPU cores are enough; a GPU
# is used when there is one. NAME and AUTHOR may be set in the environment. Run by `make quickstart`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-Marble}
AUTHOR=${AUTHOR:-the swiftmeg team}
QUESTION="who are you?"
DIR=${DIR:-quickstart}
MODEL=$DIR/SmolLM2-135M-Instruct
TRAINED=$DIR/SmolLM2-135M-$NAME

show() { # show WORD...: print the words as a shell takes them; | separates commands
    local word
    printf '\n$'
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./|-]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
    done
    printf '\n'
}

step() {
    show "$@"
    "$@"
}

ask() { # ask MODEL ANSWER_FILE
    local words=(swift infer --model "$1" --temperature 0 --max_new_tokens 64 --result_path "$2")
    rm -f "$2"
    show echo "$QUESTION" "|" "${words[@]}"
    echo "$QUESTION" | "${words[@]}"
}

answer() { # answer ANSWER_FILE: what the model said
    python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["response"])' "$1"
}

step python examples/get_smollm2.py "$MODEL"

# What an earlier run converted and trained is made anew.
rm -rf "$MODEL-mcore" "$DIR/output" "$TRAINED"
started=$SECONDS

step swift export --model "$MODEL" --to_mcore true --output_dir "$MODEL-mcore" \
    --test_convert_precision true

step megatron sft --load "$MODEL-mcore" --dataset self-cognition \
    --model_name "$NAME" --model_author "$AUTHOR" \
    --max_epochs 1 --micro_batch_size 4 --global_batch_size 4 --max_length 512 \
    --lr 1e-4 --min_lr 1e-5 --lr_warmup_fraction 0.05 --log_interval 5 \
    --no_save_optim true --no_save_rng true --save "$DIR/output"

versions=("$DIR"/output/v*)
step swift export --mcore_model "${versions[-1]}" --to_hf true --output_dir "$TRAINED" \
    --test_convert_precision true

ask "$MODEL" "$DIR/answer-before.jsonl"
ask "$TRAINED" "$DIR/answer-after.jsonl"

before=$(answer "$DIR/answer-before.jsonl")
after=$(answer "$DIR/answer-after.jsonl")
printf '\n%s\n  before (%s):\n    %s\n  after (%s):\n    %s\n' \
    "$QUESTION" "$MODEL" "${before//$'\n'/$'\n'    }" "$TRAINED" "${after//$'\n'/$'\n'    }"
echo "took $((SECONDS - started)) s after the model was there"

if [[ $after != *"$NAME"* ]]; then
    echo "error: the trained model does not say that it is $NAME" >&2
    exit 1
fi
