#!/usr/bin/env bash
# DPO of all weights of Qwen3-4B on 4 GPUs, the pairs packed.
set -euo pipefail
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NPROC_PER_NODE=${NPROC_PER_NODE:-4}

megatron rlhf \
    --rlhf_type dpo \
    --model "${MODEL:-Qwen/Qwen3-4B-Instruct-2507}" \
    --dataset "${DATASET:-AI-ModelScope/orpo-dpo-mix-40k}" \
    --split_dataset_ratio 0.01 \
    --tensor_model_parallel_size 4 \
    --sequence_parallel true \
    --packing true \
    --micro_batch_size 1 \
    --global_batch_size 4 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --max_epochs 1 \
    --cross_entropy_loss_fusion true \
    --attention_backend flash \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --max_length 8192 \
    --beta 0.1 \
    --rpo_alpha 1 \
    --loss_type sigmoid \
    --save megatron_output/Qwen3-4B-Instruct-2507-dpo \
    --eval_interval 100 \
    --save_interval 100 \
    --num_workers 8 \
    --dataset_num_proc 8 \
    --no_save_optim true \
    --no_save_rng true
