"""Direct preference optimisation (DPO, arXiv:2305.18290): its flags, its data, its table entry."""

from typing import Any

from swiftmeg.args.commands import RlhfArguments
from swiftmeg.checkpoint import check_checkpoint
from swiftmeg.data.encoded.packing import PackedDataset
from swiftmeg.errors import UserError
from swiftmeg.models.hf import HFModel
from swiftmeg.trainers.method import Method, Run, Training
from swiftmeg.trainers.pairs import PAIRS, prepare_pairs
from swiftmeg.trainers.reference_model import reference_model
from swiftmeg.trainers.training_data import TrainingData


class Dpo(Method):
    """The objective is the mean loss of the pairs of a global batch; see dpo_training.py."""

    arguments = RlhfArguments
    sides = PAIRS.sides

    def prepare_data(self, args: Any, model: HFModel) -> TrainingData:
        if model.config.get("mtp_num_layers"):
            raise UserError(
                f"--mtp_num_layers {model.config['mtp_num_layers']}: prediction modules learn from "
                "single answers, not from pairs: set 0, which leaves them out"
            )
        if args.ref_model:
            reference_model(args, model)
        if args.ref_load:
            args.ref_load = str(check_checkpoint("--ref_load", args.ref_load))
        return prepare_pairs(args, model)

    def sequences(self, data: Any) -> Any:
        return (data.dataset if isinstance(data, PackedDataset) else data).sides

    def megatron_flags(self, args: Any) -> dict[str, Any]:
        # Sums are divided once, by the pairs of the global batch: a mean of means is none of pairs.
        return {"calculate_per_token_loss": True}

    def frozen_copies(self, args: Any) -> int:
        named = args.ref_load or args.ref_model or args.ref_adapters
        without = args.reference_free or (args.is_lora and not named)
        return 0 if without or args.precompute_ref_log_probs else 1

    def training(self, run: Run, megatron: Any) -> Training:
        from swiftmeg.trainers.dpo_training import DpoTraining

        return DpoTraining(run, megatron)
