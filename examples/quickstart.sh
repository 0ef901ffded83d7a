#!/usr/bin/env bash
# Teach SmolLM2-135M a new name: convert it, fine-tune it, convert it back, ask it who it is.
#
# Every step is printed as a command that can be repeated by hand. Two CPU cores are enough; a GPU
# is used when there is one. NAME and AUTHOR may be set in the environment. Run by `make quickstart`;
# with LORA=1 adapters are trained, asked beside the model, merged and asked again.
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

ask() { # ask --model|--adapters FOLDER ANSWER_FILE
    local words=(swift infer "$1" "$2" --temperature 0 --max_new_tokens 64 --result_path "$3")
    rm -f "$3"
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

TRAINING=(--dataset self-cognition --model_name "$NAME" --model_author "$AUTHOR"
    --max_epochs 1 --micro_batch_size 4 --global_batch_size 4 --max_length 512
    --lr_warmup_fraction 0.05 --log_interval 5
    --no_save_optim true --no_save_rng true --save "$DIR/output")

if [[ ${LORA:-0} == 1 ]]; then
    step megatron sft --model "$MODEL" --train_type lora --lora_rank 16 --lora_alpha 32 \
        --lora_dropout 0 --lr 2e-3 --min_lr 2e-4 --save_safetensors true "${TRAINING[@]}"
    versions=("$DIR"/output/v*)
    adapters=("${versions[-1]}"/iter_*-hf)
    step swift export --mcore_adapters "${versions[-1]}" --to_hf true --output_dir "$TRAINED" \
        --test_convert_precision true
    ask --adapters "${adapters[-1]}" "$DIR/answer-beside.jsonl"
    beside=$(answer "$DIR/answer-beside.jsonl")
else
    step swift export --model "$MODEL" --to_mcore true --output_dir "$MODEL-mcore" \
        --test_convert_precision true
    step megatron sft --load "$MODEL-mcore" --lr 1e-4 --min_lr 1e-5 "${TRAINING[@]}"
    versions=("$DIR"/output/v*)
    step swift export --mcore_model "${versions[-1]}" --to_hf true --output_dir "$TRAINED" \
        --test_convert_precision true
fi

ask --model "$MODEL" "$DIR/answer-before.jsonl"
ask --model "$TRAINED" "$DIR/answer-after.jsonl"

before=$(answer "$DIR/answer-before.jsonl")
after=$(answer "$DIR/answer-after.jsonl")
printf '\n%s\n  before (%s):\n    %s\n  after (%s):\n    %s\n' \
    "$QUESTION" "$MODEL" "${before//$'\n'/$'\n'    }" "$TRAINED" "${after//$'\n'/$'\n'    }"
[[ -z ${beside:-} ]] || printf '  with its adapters beside (%s):\n    %s\n' \
    "${adapters[-1]}" "${beside//$'\n'/$'\n'    }"
echo "took $((SECONDS - started)) s after the model was there"

if [[ $after != *"$NAME"* || ${beside-$NAME} != *"$NAME"* ]]; then
    echo "error: the trained model does not say that it is $NAME" >&2
    exit 1
fi
