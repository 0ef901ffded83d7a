"""Load a dataset from ModelScope or Hugging Face."""

from collections.abc import Callable
from typing import Any

from swiftmeg.errors import UserError

DOWNLOAD_MODES = ("reuse_dataset_if_exists", "force_redownload")


def load_from_hub(
    dataset_id: str,
    subset: str | None,
    split: str,
    *,
    use_hf: bool,
    token: str | None,
    mode: str,
    streaming: bool = False,
) -> Any:
    """Return one subset and split as a `datasets.Dataset`, `streaming` as an `IterableDataset`.

    Raises UserError, with the hub's own reason, if that fails.
    """
    load: Callable[..., Any] = _from_huggingface if use_hf else _from_modelscope
    hub = "Hugging Face" if use_hf else "ModelScope"
    try:
        return load(dataset_id, subset, split, token, mode, streaming)
    except Exception as error:  # the hubs raise all kinds, from ImportError to OSError
        lines = str(error).strip().splitlines() or ["no message"]
        part = f"its subset {subset!r} and split" if subset else "its split"
        other = "leave out --use_hf" if use_hf else "pass --use_hf true"
        raise UserError(
            f"--dataset {dataset_id}: cannot be loaded from {hub} "
            f"({type(error).__name__}: {lines[0]}): check the id, {part} "
            f"{split!r}, the network and --hub_token, or {other} for the other hub; a local "
            "file or folder can be given instead"
        ) from error


def _from_huggingface(
    dataset_id: str, subset: str | None, split: str, token: str | None, mode: str, streaming: bool
) -> Any:
    from datasets import load_dataset

    return load_dataset(
        dataset_id,
        name=subset,
        split=split,
        token=token,
        download_mode=mode,
        streaming=streaming,
    )


def _from_modelscope(
    dataset_id: str, subset: str | None, split: str, token: str | None, mode: str, streaming: bool
) -> Any:
    from modelscope import MsDataset
    from modelscope.utils.constant import DownloadMode

    loaded = MsDataset.load(
        dataset_id,
        subset_name=subset,
        split=split,
        token=token,
        download_mode=DownloadMode(mode),
        use_streaming=streaming,
    )
    return loaded.to_hf_dataset() if isinstance(loaded, MsDataset) else loaded
