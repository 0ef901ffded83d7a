"""A checkpoint of another model is refused in one line that says in what they differ."""

from pathlib import Path

from tests.families.conversion import Layout, arguments
from tests.families.folders import write_named
from tests.ranks import run_ranks

DIFFER = {
    ("glm", "glm4"): "norm_after=True",
    ("mistral", "qwen3"): "qk_layernorm=True, window_size=None",
    ("mixtral", "olmoe"): "qk_norm_across_heads=True",
    ("deepseek_v3", "kimi_k2"): "moe_router_num_groups=None",
    ("gpt_oss", "mixtral"): "softmax_type=vanilla",
    ("ernie4_5", "qwen3"): "rotary_interleaved=False",
}
"""A model, the one in the checkpoint, and a part of what is said of the latter."""


def verdicts(root: str) -> dict[tuple[str, str], str]:
    """For each pair, and each model with itself, what is said of a checkpoint; nothing if right."""
    from megatron.training import global_vars

    from swiftmeg.errors import UserError
    from swiftmeg.export.model import check_same_model, conversion_namespace
    from swiftmeg.models.hf import read_model

    namespaces, models = {}, {}
    for name in {name for pair in DIFFER for name in pair}:
        global_vars.destroy_global_vars()
        global_vars.unset_num_microbatches_calculator()
        models[name] = read_model(str(Path(root, name)))
        namespaces[name] = conversion_namespace(arguments(Layout(1)), models[name])
    found = {}
    for one, other in [*DIFFER, *((name, name) for name in models)]:
        try:
            saved = namespaces[other]
            check_same_model(namespaces[one], saved, models[one], "--load", Path("run"))
            found[one, other] = ""
        except UserError as error:
            found[one, other] = str(error)
    return found


def test_only_the_same_model_is_taken(tmp_path: Path) -> None:
    for name in {name for pair in DIFFER for name in pair}:
        write_named(tmp_path / name, name)
    (found,) = run_ranks(1, verdicts, str(tmp_path))
    for pair, message in found.items():
        assert (message == "") == (pair not in DIFFER), message
        assert DIFFER.get(pair, "") in message
        assert "\n" not in message
