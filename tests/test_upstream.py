"""What swiftmeg replaces in other packages, or uses though private, against their sources.

A new version of one of them fails here in a second, with the list of what changed. The sources are
read without importing them, so the patches of this process do not show.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

VERSIONS = {"megatron-core": ">=0.19.2,<0.20", "torch": ">=2.9,<3", "datasets": ">=4,<=4.8.4"}
"""The versions that the tables below are true of."""

VARIABLE = None
"""In place of parameters: the name is no function."""

CORE = "megatron.core"
TRAINING = "megatron.training"
TRANSFORMER = f"{CORE}.transformer"
CHECKPOINTS = f"{CORE}.dist_checkpointing"
SHARED_OUT = f"{CHECKPOINTS}.strategies.fully_parallel.FullyParallelSaveStrategyWrapper"
OPTIMIZER = f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer"

NAMES: dict[str, str | None] = {
    f"{CORE}.datasets.utils.compile_helpers": "",
    f"{CHECKPOINTS}.strategies.filesystem_async._results_queue": VARIABLE,
    f"{SHARED_OUT}.apply_saving_parallelization": ("self sharded_state_dict"),
    f"{CHECKPOINTS}.strategies.torch.MCoreSavePlanner.__init__": (
        "self *args dedup_replicated_tensors can_run_decentralized_global_plan **kwargs"
    ),
    f"{CHECKPOINTS}.strategies.torch._replace_state_dict_keys_with_sharded_keys": (
        "sharded_state_dict keep_only_main_replica"
    ),
    f"{CHECKPOINTS}.strategies.torch.mcore_to_pyt_state_dict": (
        "state_dict is_loading init_device load_legacy_1d_flatten_tensors"
    ),
    f"{CHECKPOINTS}.utils._sharded_tensor_shard_id": "sharded_tensor",
    f"{CORE}.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd": (
        "t freqs rotary_interleaved mla_rotary_interleaved mscale multi_latent_attention"
    ),
    f"{CORE}.models.common.embeddings.rope_utils._apply_rotary_pos_emb_thd": (
        "t cu_seqlens freqs rotary_interleaved mla_rotary_interleaved mscale cp_group "
        "multi_latent_attention"
    ),
    f"{CORE}.models.gpt.gpt_model.GPTModel._preprocess": (
        "self input_ids position_ids decoder_input inference_context packed_seq_params padding_mask"
    ),
    f"{CORE}.models.gpt.gpt_model.GPTModel.sharded_state_dict": (
        "self prefix sharded_offsets metadata"
    ),
    f"{CORE}.models.gpt.gpt_model.process_mtp_loss": (
        "hidden_states labels loss_mask output_layer output_weight runtime_gather_output "
        "is_training compute_language_model_loss config cp_group tp_group packed_seq_params "
        "scale_logits_fn input_ids"
    ),
    f"{OPTIMIZER}._set_main_param_and_optimizer_states": ("self model_param tensors"),
    f"{OPTIMIZER}.load_state_dict": "self state_dict",
    f"{OPTIMIZER}.state_dict": "self",
    f"{CORE}.optimizer.distrib_optimizer.HAVE_APEX_OR_TE": VARIABLE,
    f"{CORE}.optimizer.optimizer.MegatronOptimizer.__init__": (
        "self optimizer config init_state_fn"
    ),
    f"{CORE}.optimizer.optimizer.MegatronOptimizer._filter_and_reorder_param_groups": (
        "current_groups state_dict_groups"
    ),
    f"{CORE}.optimizer.clip_grads.l2_norm_impl": VARIABLE,
    f"{CORE}.optimizer.clip_grads.multi_tensor_scale_impl": VARIABLE,
    f"{CORE}.parallel_state.create_group": (
        "ranks timeout backend pg_options use_local_synchronization group_desc"
    ),
    f"{CORE}.tensor_parallel.layers._grad_accum_fusion_available": VARIABLE,
    f"{CORE}.tensor_parallel.layers.linear_with_frozen_weight": (
        "input weight bias gradient_accumulation_fusion allreduce_dgrad sequence_parallel "
        "tp_group grad_output_buffer wgrad_deferral_limit gtp_remat_size"
    ),
    f"{CORE}.tensor_parallel.random._get_cuda_rng_state": "device clone graph_safe",
    f"{CORE}.tensor_parallel.random._set_cuda_rng_state": "new_state device graph_safe",
    f"{TRANSFORMER}.moe.moe_logging.MoEMetricsTracker._count_moe_layers": (
        "num_layers moe_layer_freq mtp_num_layers"
    ),
    f"{TRANSFORMER}.moe.moe_logging.MoEMetricsTracker.record": (
        "self name value layer_number num_layers reduce_group avg_group needs_dp_avg"
    ),
    f"{TRANSFORMER}.multi_latent_attention.MLASelfAttention._qkv_down_projection": (
        "self hidden_states"
    ),
    f"{TRANSFORMER}.multi_latent_attention.MultiLatentAttention.__init__": (
        "self config submodules layer_number attn_mask_type attention_type cp_comm_type "
        "pg_collection pp_layer_offset name"
    ),
    f"{TRANSFORMER}.multi_token_prediction.MTPLossLoggingHelper.tracker": VARIABLE,
    f"{TRANSFORMER}.multi_token_prediction.MultiTokenPredictionBlock.forward": (
        "self input_ids position_ids hidden_states attention_mask padding_mask context "
        "context_mask rotary_pos_emb rotary_pos_cos rotary_pos_sin attention_bias "
        "inference_params packed_seq_params sequence_len_offset extra_block_kwargs embedding"
    ),
    f"{TRANSFORMER}.multi_token_prediction._compute_mtp_acceptance_counts": (
        "mtp_logits mtp_labels loss_mask output_layer runtime_gather_output tp_group"
    ),
    f"{TRANSFORMER}.multi_token_prediction.roll_tensor": (
        "tensor shifts dims cp_group packed_seq_params"
    ),
    f"{TRAINING}.arguments._print_args": "title args",
    f"{TRAINING}.checkpointing._build_sharded_state_dict_metadata": "args dp_cp_group",
    f"{TRAINING}.checkpointing.maybe_msc": VARIABLE,
    f"{TRAINING}.checkpointing.read_metadata": "tracker_filename",
    f"{TRAINING}.global_vars._set_tensorboard_writer": "args",
    f"{TRAINING}.models.gpt.mtp_block_spec": "config transformer_layer_spec vp_stage",
    f"{TRAINING}.training.evaluate": (
        "forward_step_func data_iterator model process_non_loss_data_func config verbose "
        "non_loss_data_func eval_iters pg_collection p2p_communicator"
    ),
    f"{TRAINING}.training.evaluate_and_print_results": (
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func "
        "config verbose write_to_tensorboard non_loss_data_func pg_collection "
        "p2p_communicator"
    ),
    f"{TRAINING}.training.get_forward_backward_func": "pp_size vp_size schedule_pg_collection",
    f"{TRAINING}.training.get_megatron_optimizer": (
        "config model_chunks config_overrides use_gloo_process_groups pg_collection "
        "dump_param_to_param_group_map"
    ),
    f"{TRAINING}.training.get_megatron_optimizer_config": "args",
    f"{TRAINING}.training.initialize_megatron": (
        "allow_no_cuda skip_mpu_initialization get_embedding_ranks "
        "get_position_embedding_ranks store skip_model_parallel_init seed_pp_group "
        "seed_dp_group seed_tp_group seed_ep_group seed_etp_group skip_random_seed"
    ),
    f"{TRAINING}.training.print_rank_last": "message",
    f"{TRAINING}.training.report_memory": "name process_group",
    f"{TRAINING}.training.report_theoretical_memory": "args num_microbatches verbose",
    f"{TRAINING}.training.save_checkpoint": (
        "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far "
        "checkpointing_context pipeline_rank expert_rank tensor_rank pipeline_parallel "
        "expert_parallel non_persistent_ckpt train_data_iterator "
        "preprocess_common_state_dict_fn release tp_group pp_group dp_cp_group dp_group "
        "expt_dp_group rng_state_key_prefix"
    ),
    f"{TRAINING}.training.set_jit_fusion_options": "tp_size",
    f"{TRAINING}.training.setup_model_and_optimizer": (
        "model_type model_provider_func checkpointing_context cfg_container pg_collection"
    ),
    f"{TRAINING}.training.training_log": (
        "loss_dict total_loss_dict learning_rate iteration loss_scale report_memory_flag "
        "skipped_iter grad_norm params_norm num_zeros_in_grad max_attention_logit "
        "pg_collection is_first_iteration seqlen_squared_sum_in_batch "
        "total_real_tokens_in_batch"
    ),
    "peft.tuners.lora.LoraConfig._register_custom_module": "self mapping",
    "torch.distributed.checkpoint.filesystem._StorageInfo": VARIABLE,
    "torch.serialization._save": (
        "obj zip_file pickle_module pickle_protocol _disable_byteorder_record"
    ),
}
"""A name -> its parameters, in order."""

INSTANCES = {
    f"{CORE}.models.gpt.gpt_model.GPTModel": ("_preprocess", "sharded_state_dict"),
    f"{TRANSFORMER}.attention.Attention": ("_yarn_concentration_factor",),
    f"{TRANSFORMER}.multi_token_prediction.MTPLossLoggingHelper": (
        "loss_values",
        "correct_values",
        "total_values",
    ),
    "datasets.arrow_dataset.Dataset": ("_indices",),
}
"""A class -> attributes or keys that its source must name."""

COMPILED = ("_dynamo", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_grouped_mm")
"""Private names of torch that have no source in Python, or are modules."""

STOOD_IN_FOR = "fused_weight_gradient_mlp_cuda"
"""A module of apex that Megatron's linear layers import, for which ours stands in."""


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {each.name: each for each in map(Requirement, project["dependencies"])}


@functools.cache
def source(module: str) -> tuple[ast.Module, bool] | None:
    """The parsed source of a module, and whether it is a package; None if there is no such one."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    folders = [] if spec is None else [*(spec.submodule_search_locations or [])]
    for folder in folders:
        base = Path(folder).joinpath(*rest)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return ast.parse(path.read_text()), path.name == "__init__.py"
    return None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under `if`, `try` and `with` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            blocks = [statement.body, getattr(statement, "orelse", [])]
            blocks += [handler.body for handler in getattr(statement, "handlers", [])]
            for block in blocks:
                yield from statements(block)


def find(name: str) -> ast.AST | None:
    """Where a dotted name is defined, through the modules that import it from others."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        if found := source(module):
            return _inside(found, module, parts[count:])
    return None


def _inside(found: tuple[ast.Module, bool], module: str, rest: list[str]) -> ast.AST | None:
    tree, package = found
    body = tree.body
    for depth, wanted in enumerate(rest):
        last = depth == len(rest) - 1
        for statement in statements(body):
            if isinstance(statement, ast.ClassDef) and statement.name == wanted:
                if last:
                    return statement
                body = statement.body
                break
            if isinstance(statement, ast.FunctionDef) and statement.name == wanted:
                return statement if last else None
            if isinstance(statement, ast.Assign | ast.AnnAssign) and last:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                if any(isinstance(each, ast.Name) and each.id == wanted for each in targets):
                    return statement
            if isinstance(statement, ast.ImportFrom) and depth == 0:
                for each in statement.names:
                    if (each.asname or each.name) == wanted:
                        home = _absolute(statement, module, package)
                        return find(".".join([home, each.name, *rest[1:]]))
        else:
            return None
    return None


def _absolute(statement: ast.ImportFrom, module: str, package: bool) -> str:
    if not statement.level:
        return str(statement.module)
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + package]
    return ".".join([*parts, statement.module] if statement.module else parts)


def parameters(definition: ast.AST) -> str | None:
    """The parameters of a function, in order; None for anything else."""
    if not isinstance(definition, ast.FunctionDef):
        return VARIABLE
    given = definition.args
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [each.arg for each in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return " ".join(names)


@pytest.mark.parametrize("package", VERSIONS)
def test_the_tables_are_about_the_versions_that_are_allowed(package: str) -> None:
    allowed = requirements()[package].specifier
    assert set(str(allowed).split(",")) == set(VERSIONS[package].split(","))
    assert importlib.metadata.version(package) in allowed


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_where_and_what_it_was(name: str) -> None:
    definition = find(name)
    assert definition is not None, f"{name} is gone"
    assert parameters(definition) == NAMES[name]


@pytest.mark.parametrize("name", COMPILED)
def test_torch_still_has_what_is_private(name: str) -> None:
    assert hasattr(torch, name)


@pytest.mark.parametrize("name", INSTANCES)
def test_a_class_still_has_what_is_set_on_its_instances(name: str) -> None:
    definition = find(name)
    assert definition is not None, f"{name} is gone"
    words = {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute)}
    words |= {n.value for n in ast.walk(definition) if isinstance(n, ast.Constant)}
    words |= {n.name for n in ast.walk(definition) if isinstance(n, ast.FunctionDef)}
    missing = set(INSTANCES[name]) - words
    assert not missing


def test_the_marks_are_the_sixth_result_of_preprocess() -> None:
    definition = find(f"{CORE}.models.gpt.gpt_model.GPTModel._preprocess")
    assert definition is not None
    results = [n.value for n in ast.walk(definition) if isinstance(n, ast.Assign | ast.Return)]
    tuples = [value for value in results if isinstance(value, ast.Tuple)]
    assert any(ast.unparse(each.elts[5]) == "padding_mask" for each in tuples if each.elts[5:])


def test_the_log_gets_its_first_arguments_by_position() -> None:
    definition = find(f"{TRAINING}.training.train")
    assert definition is not None
    calls = [n for n in ast.walk(definition) if isinstance(n, ast.Call)]
    logs = [call for call in calls if ast.unparse(call.func) == "training_log"]
    assert logs
    assert {ast.unparse(call.args[3]) for call in logs} == {"iteration"}
    assert {ast.unparse(call.args[8]) for call in logs} == {"params_norm"}


def used_names(path: Path) -> Iterator[str]:
    """Names of Megatron that a file of swiftmeg sets, and private ones of anyone that it uses."""
    homes: dict[str, str] = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for each in node.names:
                homes[each.asname or each.name] = f"{node.module}.{each.name}"
                if each.name.startswith("_") and not str(node.module).startswith("swiftmeg"):
                    yield f"{node.module}.{each.name}"
        elif isinstance(node, ast.Import):
            homes |= {each.asname or each.name: each.name for each in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        home = homes.get(node.value.id, "swiftmeg")
        stored = isinstance(node.ctx, ast.Store) and home.startswith("megatron")
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        outside = not home.startswith(("swiftmeg", "os", "ctypes"))
        if outside and (stored or private):
            yield f"{home}.{node.attr}"


def test_the_table_names_whatever_the_sources_use() -> None:
    used = {name for path in (ROOT / "swiftmeg").rglob("*.py") for name in used_names(path)}
    assert len(used) > 20
    known = {f"torch.{name}" for name in COMPILED}
    known.add(f"{CORE}.tensor_parallel.layers.{STOOD_IN_FOR}")
    assert not used - NAMES.keys() - known


def test_linear_layers_still_look_for_apex() -> None:
    found = source(f"{CORE}.tensor_parallel.layers")
    assert found is not None
    imports = [node for node in ast.walk(found[0]) if isinstance(node, ast.Import)]
    assert any(each.name == STOOD_IN_FOR for node in imports for each in node.names)
