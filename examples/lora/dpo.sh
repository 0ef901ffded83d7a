#!/usr/bin/env bash
# DPO of LoRA adapters of Qwen3-30B-A3B, and of its whole embedding and head, on 2 GPUs of 80 GB.
set -euo pipefail
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NPROC_PER_NODE=${NPROC_PER_NODE:-2}

megatron rlhf \
    --rlhf_type dpo \
    --model "${MODEL:-Qwen/Qwen3-30B-A3B-Base}" \
    --dataset "${DATASET:-hjh0119/shareAI-Llama3-DPO-zh-en-emoji#20000}" \
    --split_dataset_ratio 0.01 \
    --train_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --modules_to_save word_embeddings output_layer \
    --expert_model_parallel_size 2 \
    --moe_permute_fusion true \
    --moe_grouped_gemm true \
    --moe_aux_loss_coeff 1e-3 \
    --micro_batch_size 8 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --max_epochs 1 \
    --cross_entropy_loss_fusion true \
    --attention_backend flash \
    --lr 1e-4 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-5 \
    --max_length 2048 \
    --beta 0.1 \
    --rpo_alpha 1 \
    --loss_type sigmoid \
    --save megatron_output/Qwen3-30B-A3B-dpo \
    --eval_interval 100 \
    --save_interval 100 \
    --num_workers 8 \
    --dataset_num_proc 8 \
    --no_save_optim true \
    --no_save_rng true
