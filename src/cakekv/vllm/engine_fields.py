"""Every field of vLLM's configuration, once: whether a chunk's key depends on it, and if not, why.

A field that vLLM adds and that is not here fails a test: somebody has to think about it. Those that are `KEYED` enter
keys only where they are not as vLLM has them by default, so that the keys of ordinary engines stay what they are.
"""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

KEYED = "in the key where it is set"
IDENTITY = "in the identity: weights, configuration files, overrides, dtypes, length"
LAYOUT = "in the layout that workers report, or in the names of their shards"
REQUEST = "in vLLM's hash of every request that it concerns"
SEED = "seeds sampling; random weights (load_format dummy) do not depend on it"
REFUSED = "engines that set it are refused, or have no cache that could be restored"
DRAFT = "a draft model's keys and values decide which drafts are accepted, not what is generated"
OUTSIDE = "works on what the model puts out, or on texts and images before it sees them as tokens and hashes"
DERIVED = "only holds other configurations, or follows from them"
ROUNDING = "chooses between kernels and ways to compute the same: only rounding differs"
PLACE = "where and when things run, are kept, fetched or reported"

FIELDS: dict[str, dict[str, str]] = {
    "VllmConfig": {
        KEYED: "diffusion_config additional_config",
        REFUSED: "aux_output_config",
        OUTSIDE: "watermark_config structured_outputs_config reasoning_config",
        DERIVED: (
            "model_config cache_config parallel_config scheduler_config device_config load_config offload_config "
            "attention_config engram_config mamba_config kernel_config lora_config speculative_config "
            "quant_config compilation_config"
        ),
        ROUNDING: "optimization_level performance_mode",
        PLACE: (
            "observability_config logging_config profiler_config kv_transfer_config kv_events_config "
            "ec_transfer_config ec_manager_config instance_id weight_transfer_config shutdown_timeout "
            "watchdog_config"
        ),
    },
    "ModelConfig": {
        KEYED: "code_revision quantization_config disable_sliding_window config_format model_class_overrides",
        IDENTITY: (
            "model model_weights dtype hf_config hf_text_config hf_config_path revision max_model_len "
            "quantization hf_overrides"
        ),
        REQUEST: "enable_prompt_embeds",
        SEED: "seed",
        OUTSIDE: (
            "runner convert tokenizer tokenizer_mode allowed_local_media_path allowed_media_domains "
            "tokenizer_revision return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel "
            "skip_tokenizer_init generation_config override_generation_config logits_processors "
            "io_processor_plugin renderer_num_workers pooler_config"
        ),
        DERIVED: "multimodal_config",
        ROUNDING: "enforce_eager disable_cascade_attn model_impl",
        PLACE: (
            "trust_remote_code is_submodel_config word_embeddings_untied_by_checkpoint spec_target_max_model_len "
            "allow_deprecated_quantization enable_trace_replay served_model_name hf_token enable_sleep_mode "
            "sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph "
            "enable_nccl_comm_suspend enable_cumem_allocator"
        ),
    },
    "QuantizationConfigArgs": {
        DERIVED: "linear moe ignore targets",
    },
    "QuantSpec": {
        DERIVED: "weight activation",
    },
    "QuantKey": {
        DERIVED: "dtype scale scale2 symmetric",
    },
    "ScalarType": {
        DERIVED: "exponent mantissa signed bias _finite_values_only nan_repr",
    },
    "ScaleDesc": {
        DERIVED: "dtype static group_shape",
    },
    "PoolerConfig": {
        OUTSIDE: (
            "task pooling_type seq_pooling_type tok_pooling_type use_activation enable_flash_late_interaction "
            "dimensions enable_chunked_processing max_embed_len logit_mean logit_sigma step_tag_id "
            "returned_token_ids"
        ),
    },
    "MultiModalConfig": {
        KEYED: (
            "media_io_kwargs mm_processor_kwargs mm_device_do_normalize mm_encoder_attn_dtype "
            "mm_encoder_fp8_scale_path video_pruning_rate video_pruning_method"
        ),
        REQUEST: "enable_mm_embeds mm_hasher_algorithm",
        OUTSIDE: (
            "language_model_only limit_per_prompt mm_encoder_only interleave_mm_strings allow_missing_mm_embeddings"
        ),
        ROUNDING: "mm_encoder_tp_mode mm_encoder_attn_backend",
        PLACE: (
            "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb "
            "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin skip_mm_profiling mm_tensor_ipc "
            "mm_ipc_gpu_memory_gb"
        ),
    },
    "CacheConfig": {
        KEYED: "kv_cache_dtype_skip_layers",
        IDENTITY: "cache_dtype prefix_caching_hash_algo hash_block_size",
        LAYOUT: "block_size user_specified_block_size kv_cache_layout _block_size_resolved",
        REFUSED: (
            "is_attention_free mamba_page_size_padded skip_page_size_padded mamba_block_size mamba_cache_dtype "
            "mamba_ssm_cache_dtype mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len "
            "use_replayssm use_kda_recoverssm kv_offloading_size kv_offloading_backend "
            "simple_cpu_offload_num_blocks"
        ),
        DERIVED: "sliding_window effective_attention_block_size",
        ROUNDING: "kv_sharing_fast_prefill swa_bounded_replay",
        PLACE: (
            "prefix_match_unit gpu_memory_utilization num_gpu_blocks_override enable_prefix_caching "
            "prefix_cache_retention_interval num_gpu_blocks num_cpu_blocks kv_cache_size_tokens "
            "kv_cache_max_concurrency cache_hit_alignment_tokens kv_cache_memory_bytes"
        ),
    },
    "ParallelConfig": {
        LAYOUT: "tensor_parallel_size",
        REFUSED: (
            "pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size "
            "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size _allow_auto_resolve_cp_interleave_size"
        ),
        ROUNDING: (
            "is_moe_model enable_hc_sp enable_expert_parallel enable_ep_weight_filter enable_eplb eplb_config "
            "expert_placement_strategy all2all_backend disable_custom_all_reduce enable_dbo ubatch_size "
            "dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend dcp_q_replicate"
        ),
        PLACE: (
            "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local "
            "data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port "
            "data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb "
            "enable_batch_sharded_sampling max_parallel_loading_workers enable_shm_tensor_arena enable_elastic_ep "
            "elastic_ep_max_dp_size disable_nccl_for_dp_synchronization ray_workers_use_nsight ray_runtime_env "
            "placement_group distributed_executor_backend worker_cls worker_extension_cls master_addr master_port "
            "node_rank nnodes numa_bind numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids "
            "distributed_timeout_seconds cpu_distributed_timeout_seconds world_size rank "
            "_data_parallel_master_port_list _coord_store_port data_parallel_index _api_process_count "
            "_api_process_rank enable_fault_tolerance fault_tolerance_config"
        ),
    },
    "EPLBConfig": {
        ROUNDING: (
            "window_size step_interval num_redundant_experts log_balancedness log_balancedness_interval use_async "
            "policy communicator enable_migration_batching"
        ),
    },
    "FaultToleranceConfig": {
        PLACE: "engine_recovery_timeout_sec",
    },
    "SchedulerConfig": {
        PLACE: (
            "runner_type max_num_batched_tokens max_num_scheduled_tokens max_num_seqs max_num_active_seqs "
            "long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_queued_reqs "
            "max_num_queued_tokens enable_chunked_prefill is_multimodal_model max_num_encoder_input_tokens "
            "encoder_cache_size policy disable_chunked_mm_input scheduler_cls disable_hybrid_kv_cache_manager "
            "scheduler_reserve_full_isl watermark prefill_schedule_interval async_scheduling stream_interval"
        ),
    },
    "DeviceConfig": {
        PLACE: "device device_type",
    },
    "LoadConfig": {
        KEYED: "model_loader_extra_config",
        IDENTITY: "load_format",
        PLACE: (
            "download_dir safetensors_load_strategy safetensors_prefetch_num_threads "
            "safetensors_prefetch_block_size device ignore_patterns use_tqdm_on_load pt_load_map_location"
        ),
    },
    "OffloadConfig": {
        ROUNDING: "offload_backend uva prefetch",
    },
    "UVAOffloadConfig": {
        ROUNDING: "cpu_offload_gb cpu_offload_params",
    },
    "PrefetchOffloadConfig": {
        ROUNDING: "offload_group_size offload_num_in_group offload_prefetch_step offload_params",
    },
    "AttentionConfig": {
        KEYED: "disable_flashinfer_q_quantization use_prefill_query_quantization indexer_kv_dtype use_non_causal",
        LAYOUT: "backend backend_per_kind",
        ROUNDING: (
            "minimax_m3_msa_decode_backend flash_attn_version flash_attn_max_num_splits_for_cuda_graph "
            "tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph use_trtllm_attention mla_prefill_backend "
            "indexer_sparse_logits hisparse_config sparse_mla_force_mqa sparse_mla_prefill_workspace_factor "
            "flex_attn_block_m flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size "
            "trtllm_ragged_backend indexer_tp_shard_min_rows minimax_m3_indexer_cp"
        ),
    },
    "HiSparseConfig": {
        REFUSED: "device_buffer_size eager_host_mirror",
    },
    "AuxOutputConfig": {
        REFUSED: "enable_return_routed_experts max_bytes",
    },
    "EngramConfig": {
        ROUNDING: "cpu_offload embedding_across_dp dp_shared_memory use_thp",
    },
    "MambaConfig": {
        ROUNDING: "backend enable_stochastic_rounding stochastic_rounding_philox_rounds ssu_algorithm",
    },
    "KernelConfig": {
        ROUNDING: (
            "ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune enable_cutedsl_warmup "
            "enable_jit_warmup moe_backend sparse_indexer_topk_backend linear_backend linear_backend_per_quant "
            "monokernel"
        ),
    },
    "IrOpPriorityConfig": {
        ROUNDING: "rms_norm fused_add_rms_norm gelu_and_mul_sparse",
    },
    "LoRAConfig": {
        KEYED: "enable_tower_connector_lora",
        REQUEST: "default_mm_loras",
        OUTSIDE: "max_lora_cls_labels",
        ROUNDING: (
            "fully_sharded_loras lora_dtype specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras"
        ),
        PLACE: "max_lora_rank max_loras max_cpu_loras target_modules",
    },
    "SpeculativeConfig": {
        DRAFT: (
            "enforce_eager num_speculative_tokens model method draft_tensor_parallel_size tensor_parallel_size "
            "quantization moe_backend attention_backend kv_cache_dtype max_model_len revision code_revision "
            "index_share_for_mtp_iteration disable_padded_drafter_batch disable_eagle_block_drop "
            "use_local_argmax_reduction use_heterogeneous_vocab prompt_lookup_max prompt_lookup_min "
            "parallel_drafting target_model_config target_parallel_config num_speculative_tokens_per_batch_size "
            "draft_model_config draft_parallel_config suffix_decoding_max_tree_depth "
            "suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor suffix_decoding_min_token_prob "
            "draft_load_config rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length "
            "enable_adaptive_verification draft_sample_method dspark_draft_topk disable_lookahead_block_hashes "
            "draft_lm_head_quantization xpress_topc fly_window_size fly_entropy_threshold fly_entropy_top_k"
        ),
    },
    "WatermarkConfig": {
        OUTSIDE: (
            "key algorithm alpha context_width deduplicate_contexts deduplicate_contexts_max_history prf "
            "allow_target_only_watermarking"
        ),
    },
    "DiffusionConfig": {
        DERIVED: "canvas_length max_denoising_steps",
    },
    "StructuredOutputsConfig": {
        OUTSIDE: (
            "backend disable_any_whitespace disable_additional_properties reasoning_parser "
            "reasoning_parser_plugin enable_in_reasoning"
        ),
    },
    "ObservabilityConfig": {
        PLACE: (
            "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
            "per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets "
            "cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_mm_processor_stats "
            "enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose"
        ),
    },
    "LoggingConfig": {
        PLACE: "log_level formatter configure_logging pylogging_config_file",
    },
    "CompilationConfig": {
        ROUNDING: (
            "mode debug_dump_path cache_dir compile_cache_save_format backend custom_ops ir_enable_torch_wrap "
            "splitting_ops compile_mm_encoder cudagraph_mm_encoder encoder_cudagraph_token_budgets "
            "encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_max_frames_per_batch "
            "cudagraph_decoder_replay decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold "
            "compile_sizes compile_ranges_endpoints inductor_compile_config inductor_passes cudagraph_mode "
            "cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs cudagraph_specialize_lora "
            "use_inductor_graph_partition pass_config max_cudagraph_capture_size dynamic_shapes_config "
            "local_cache_dir fast_moe_cold_start enabled_custom_ops disabled_custom_ops traced_files "
            "compilation_time encoder_compilation_time static_forward_context static_all_moe_layers"
        ),
    },
    "PassConfig": {
        ROUNDING: (
            "fuse_norm_quant fuse_act_quant fuse_attn_quant eliminate_noops fuse_allreduce_rms "
            "enable_qk_norm_rope_fusion fuse_rope_kvcache_cat_mla fuse_act_padding fuse_mla_dual_rms_norm "
            "fuse_rope_kvcache fuse_qk_norm_rope_kvcache rope_kvcache_fusion_max_token_num "
            "fi_allreduce_fusion_max_size_mb"
        ),
    },
    "DynamicShapesConfig": {
        ROUNDING: "type evaluate_guards assume_32_bit_indexing",
    },
    "ProfilerConfig": {
        PLACE: (
            "profiler torch_profiler_dir torch_profiler_activities proton_profiler_dir proton_context proton_data "
            "proton_backend proton_mode proton_hook proton_output_format proton_graph_attribution "
            "torch_profiler_with_stack torch_profiler_with_flops torch_profiler_use_gzip "
            "torch_profiler_dump_cuda_time_total torch_profiler_record_shapes torch_profiler_with_memory "
            "capture_torch_profiler detailed_trace_annotation ignore_frontend delay_iterations max_iterations "
            "warmup_iterations active_iterations wait_iterations"
        ),
    },
    "KVTransferConfig": {
        PLACE: (
            "kv_connector engine_id kv_buffer_device kv_role kv_port kv_connector_extra_config "
            "kv_connector_module_path enable_permute_local_kv kv_load_failure_policy"
        ),
    },
    "KVEventsConfig": {
        PLACE: "enable_kv_cache_events publisher endpoint replay_endpoint buffer_steps hwm max_queue_size topic",
    },
    "ECTransferConfig": {
        REFUSED: (
            "ec_connector engine_id ec_buffer_device ec_buffer_size ec_role ec_ip ec_port "
            "ec_connector_extra_config ec_connector_module_path mm_encoder_output_widths"
        ),
    },
    "EncoderCacheManagerConfig": {
        PLACE: "encoder_cache_manager_cls manager_config",
    },
    "ReasoningConfig": {
        OUTSIDE: (
            "reasoning_parser reasoning_start_str reasoning_end_str _reasoning_start_token_ids "
            "_reasoning_end_token_ids _natural_reasoning_end_token_ids _enabled"
        ),
    },
    "WeightTransferConfig": {
        PLACE: "backend",
    },
    "WatchdogConfig": {
        PLACE: "timeout check_interval dump_dir",
    },
}
"""By configuration class: why, and which fields, of all versions of vLLM that are supported."""

_FROM_ENGINE = {
    "VllmConfig": "",
    "ModelConfig": "model_config",
    "MultiModalConfig": "model_config.multimodal_config",
    "CacheConfig": "cache_config",
    "LoadConfig": "load_config",
    "AttentionConfig": "attention_config",
    "LoRAConfig": "lora_config",
}
"""Where the classes with `KEYED` fields are in a `VllmConfig`."""


def keyed_fields(vllm_config: object) -> dict[str, Any]:
    """The `KEYED` fields that are not as vLLM has them by default, by class and name."""
    found: dict[str, Any] = {}
    for class_name, path in _FROM_ENGINE.items():
        config: Any = vllm_config
        for name in filter(None, path.split(".")):
            config = getattr(config, name, None)
        if config is None:
            continue
        known = getattr(type(config), "__dataclass_fields__", {}).values()
        defaults = {field.name: _default(field) for field in known}
        for name in FIELDS[class_name][KEYED].split():
            value = getattr(config, name, None)
            if value and value != defaults.get(name):
                found[f"{class_name}.{name}"] = value
    return found


def _default(field: Any) -> object:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None
