"""The parameters that the original's guide documents, by section, as spelled there."""

SECTIONS = {
    "Training": """
        micro_batch_size global_batch_size recompute_granularity recompute_method
        recompute_num_layers recompute_modules deterministic_mode train_iters log_interval
        tensorboard_dir no_masked_softmax_fusion no_bias_dropout_fusion no_bias_swiglu_fusion
        no_rope_fusion no_gradient_accumulation_fusion cross_entropy_loss_fusion
        cross_entropy_fusion_impl calculate_per_token_loss attention_backend optimizer
        optimizer_cpu_offload optimizer_offload_fraction use_precision_aware_optimizer
        main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype dataloader_type
        manual_gc manual_gc_interval seed num_workers seq_length use_cpu_initialization
        extra_megatron_kwargs
    """,
    "Learning rate": """
        lr lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_fraction min_lr
    """,
    "Regularisation": """
        weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum
    """,
    "Checkpoint": """
        save save_interval no_save_optim no_save_rng load no_load_optim no_load_rng finetune
        ckpt_format no_initialization auto_detect_ckpt_format exit_on_missing_checkpoint
    """,
    "Distributed": """
        distributed_backend use_distributed_optimizer tensor_model_parallel_size
        pipeline_model_parallel_size decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers sequence_parallel context_parallel_size
        tp_comm_overlap overlap_grad_reduce overlap_param_gather distributed_timeout_minutes
    """,
    "Logging": """
        log_params_norm log_throughput tensorboard_log_interval tensorboard_queue_size
        log_timers_to_tensorboard no_log_learning_rate_to_tensorboard
        log_validation_ppl_to_tensorboard log_memory_to_tensorboard logging_level
        wandb_project wandb_exp_name wandb_save_dir
    """,
    "Evaluation": """
        eval_iters eval_interval
    """,
    "FP8": """
        fp8_format fp8_recipe fp8_amax_history_len fp8_amax_compute_algo fp8_param_gather
    """,
    "Mixed precision": """
        fp16 bf16 apply_query_key_layer_scaling attention_softmax_in_fp32
    """,
    "Model": """
        num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
        num_query_groups max_position_embeddings position_embedding_type rotary_base
        rotary_percent normalization norm_epsilon swiglu untie_embeddings_and_output_weights
        disable_bias_linear add_qkv_bias attention_dropout hidden_dropout kv_channels
        qk_layernorm transformer_impl padded_vocab_size rope_scaling
    """,
    "MoE": """
        num_experts moe_layer_freq moe_ffn_hidden_siz moe_shared_expert_intermediate_size
        moe_router_topk moe_router_pre_softmax moe_router_dtype moe_router_score_function
        moe_router_bias_update_rate moe_router_enable_expert_bias
        moe_router_topk_scaling_factor moe_router_load_balancing_type
        expert_model_parallel_size moe_token_dispatcher_type moe_enable_deepep
        moe_grouped_gemm moe_permute_fusion moe_aux_loss_coeff moe_z_loss_coeff
        moe_expert_capacity_factor moe_shared_expert_overlap moe_token_drop_policy
    """,
    "MLA": """
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim
    """,
    "Tuner": """
        train_type freeze_parameters freeze_parameters_regex freeze_parameters_ratio
        trainable_parameters trainable_parameters_regex adapter_load target_modules
        target_regex modules_to_save lora_rank lora_alpha lora_dropout lora_bias use_rslora
    """,
    "DPO": """
        ref_load beta rpo_alpha reference_free label_smoothing f_divergence_type loss_type
    """,
    "Training, wrapper": """
        add_version padding_free mlp_padding_free packing packing_cache streaming
        lazy_tokenize max_epochs
    """,
    "RLHF overrides": """
        rlhf_type loss_scale calculate_per_token_loss
    """,
}

NAMES = sorted({name for names in SECTIONS.values() for name in names.split()})
