#!/usr/bin/env bash
# DPO of all weights of Qwen1.5-MoE-A2.7B on 8 GPUs of 80 GB: two stages of four ranks that share the experts.
set -euo pipefail
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}

megatron rlhf \
    --rlhf_type dpo \
    --model "${MODEL:-Qwen/Qwen1.5-MoE-A2.7B}" \
    --dataset "${DATASET:-hjh0119/shareAI-Llama3-DPO-zh-en-emoji#20000}" \
    --split_dataset_ratio 0.01 \
    --pipeline_model_parallel_size 2 \
    --decoder_last_pipeline_num_layers 11 \
    --expert_model_parallel_size 4 \
    --moe_permute_fusion true \
    --moe_grouped_gemm true \
    --moe_aux_loss_coeff 1e-3 \
    --micro_batch_size 4 \
    --global_batch_size 16 \
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
    --save megatron_output/Qwen1.5-MoE-A2.7B-dpo \
    --eval_interval 100 \
    --save_interval 100 \
    --num_workers 8 \
    --dataset_num_proc 8 \
    --no_save_optim true \
    --no_save_rng true
