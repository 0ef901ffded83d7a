"""Megatron-SWIFT's names of model types: --model_type must name one of the model's family."""

from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel

TYPES = {
    "LlamaForCausalLM": "llama llama3 llama3_1 llama3_2 longwriter_llama3_1 codefuse_codellama "
    "deepseek yi yi_coder sus skywork_o1 openbuddy_llama openbuddy_llama3 megrez reflection numina "
    "ziya mengzi3 deepseek_r1_distill",
    "Qwen2ForCausalLM": "qwen2 qwen2_5 qwen2_5_math qwq qwq_preview marco_o1 deepseek_r1_distill",
    "Qwen3ForCausalLM": "qwen3 qwen3_thinking qwen3_nothinking deepseek_r1_distill",
    "Qwen2MoeForCausalLM": "qwen2_moe qwen2_5_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe qwen3_moe_thinking qwen3_coder",
    "Qwen3NextForCausalLM": "qwen3_next qwen3_next_thinking",
    "InternLM3ForCausalLM": "internlm3",
    "MiMoForCausalLM": "mimo mimo_rl",
    "DeepseekForCausalLM": "deepseek_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2 deepseek_v2_5",
    "DeepseekV3ForCausalLM": "deepseek_v2_5 deepseek_v3 deepseek_r1 moonlight kimi_k2",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5ForCausalLM": "ernie ernie4_5",
    "Ernie4_5_ForCausalLM": "ernie ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie ernie4_5_moe",
    "Glm4MoeForCausalLM": "glm4_5 glm4_moe",
}
"""The names of each architecture; transformers' own model_type is one, too."""


def check_model_type(model: HFModel, named: str | None) -> None:
    """UserError unless `named`, the value of --model_type, is a type of the model's family."""
    known = TYPES.get(model.family.architecture, "").split()
    known += [str(model.config.get("model_type") or ""), model.family.config_class or ""]
    if named is None or named in known:
        return
    accepted = ", ".join(dict.fromkeys(filter(None, known)))
    raise UserError(
        f"--model_type {named} contradicts --model {model.folder}, which is a "
        f"{model.family.architecture} by its config.json ({accepted}): drop it"
    )
