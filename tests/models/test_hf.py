"""Reading config.json in the forms in which models are published."""

import json
from pathlib import Path
from typing import Any

from swiftmeg.models.hf import read_model
from tests.tiny import save_model


def rewrite(folder: Path, drop: tuple[str, ...], **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in drop:
        del config[name]
    path.write_text(json.dumps(config | values))


def test_rope_of_older_configs_is_read_alike(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, **scaling}
    folder = save_model(tmp_path, "llama", rope_parameters=rope)
    new = read_model(str(folder))
    rewrite(
        folder,
        ("rope_parameters",),
        rope_theta=5000.0,
        rope_scaling={"rope_type": "llama3", **scaling},
    )
    old = read_model(str(folder))
    assert new.megatron_args["rotary_base"] == 5000.0
    assert old.megatron_args == new.megatron_args
    assert old.hf_config.rope_parameters == new.hf_config.rope_parameters


def test_what_config_json_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama", head_dim=8)
    rewrite(folder, ("num_key_value_heads", "rms_norm_eps", "head_dim", "tie_word_embeddings"))
    args = read_model(str(folder)).megatron_args
    assert args["num_query_groups"] == args["num_attention_heads"] == 6
    assert args["kv_channels"] == 48 // 6
    assert args["norm_epsilon"] == 1e-6
    assert args["untie_embeddings_and_output_weights"] is True
