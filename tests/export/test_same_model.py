"""A checkpoint of another model is refused in one line that says in what they differ."""

import json
from pathlib import Path

from swiftmeg.models.family import REGISTRY
from tests.families.conversion import Layout, arguments
from tests.families.folders import write_named
from tests.families.specimens import ALL, SPECIMENS
from tests.ranks import run_ranks

DIFFER = {
    ("glm", "glm4"): "norm_after=True",
    ("mistral", "qwen3"): "window_size=None, window_attn_skip_freq=None, qk_layernorm=True",
    ("mixtral", "olmoe"): "qk_norm_across_heads=True",
    ("deepseek_v3", "kimi_k2"): "moe_router_num_groups=None",
    ("kimi_k2", "deepseek_v3"): "moe_router_num_groups=3",
    ("qwen3_next", "qwen3"): "layernorm_zero_centered_gamma=False",
    ("gpt_oss", "mixtral"): "softmax_type=vanilla",
    ("ernie4_5", "qwen3"): "rotary_interleaved=False",
}
"""A model, the one in the checkpoint, and a part of what is said of the latter."""


def silences(root: str) -> list[str]:
    """The arguments of families whose change in a checkpoint would not be seen."""
    import copy

    from megatron.training import global_vars

    from swiftmeg.errors import UserError
    from swiftmeg.export.model import OVERRIDABLE, check_same_model, conversion_namespace
    from swiftmeg.models.hf import read_model

    silent = []
    for path in sorted(Path(root).iterdir()):
        global_vars.destroy_global_vars()
        global_vars.unset_num_microbatches_calculator()
        model = read_model(str(path))
        namespace = conversion_namespace(arguments(Layout(1)), model)
        for name in sorted(set(model.megatron_args) - set(OVERRIDABLE)):
            saved = copy.copy(namespace)
            attribute = {"apply_layernorm_1p": "layernorm_zero_centered_gamma"}.get(name, name)
            setattr(saved, attribute, "another")
            said = ""
            try:
                check_same_model(namespace, saved, model, "--load", Path("run"))
            except UserError as error:
                said = str(error)
            if f"{attribute}=another" not in said:
                silent.append(f"{path.name}: {name}")
    return silent


def test_every_argument_of_every_family_is_compared(tmp_path: Path) -> None:
    for architecture in REGISTRY.families:
        for name, specimen in SPECIMENS.get(architecture, {architecture: None}).items():
            made = specimen or ALL[name]
            path = tmp_path / name / "config.json"
            made.config().save_pretrained(path.parent)
            config = json.loads(path.read_text()) | {"architectures": [architecture]}
            path.write_text(json.dumps(made.published(config)))
    assert run_ranks(1, silences, str(tmp_path)) == [[]]


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
