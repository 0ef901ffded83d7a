"""A picture of every TensorBoard scalar of a run."""

from pathlib import Path
from typing import Any

from swiftmeg.observer import Observer


class Curves(Observer):
    """Closes TensorBoard's files when the loop has ended and draws them; on the last rank."""

    def __init__(self, folder: Path, megatron: Any) -> None:
        self.folder = folder
        self.megatron = megatron

    def ended(self) -> None:
        import torch

        if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
            return
        from megatron.training.global_vars import get_tensorboard_writer

        if writer := get_tensorboard_writer():
            writer.flush()
            writer.close()
        draw_curves(Path(self.megatron.tensorboard_dir), self.folder / "images")
        print(f"checkpoints, logs and curves are in {self.folder}", flush=True)


def draw_curves(events: Path, target: Path) -> None:
    """Draw every scalar under `events` (a TensorBoard folder) as target/NAME.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events))
    reader.Reload()
    target.mkdir(parents=True, exist_ok=True)
    for tag in reader.Tags()["scalars"]:
        points = reader.Scalars(tag)
        figure, axes = pyplot.subplots(figsize=(8, 5))
        axes.plot(
            [p.step for p in points],
            [p.value for p in points],
            marker="." if len(points) < 50 else "",
        )
        axes.set_title(tag)
        axes.set_xlabel("samples" if tag.endswith("vs samples") else "iteration")
        axes.grid(alpha=0.3)
        name = tag.replace("/", "_").replace(".", "_").replace(" ", "_")
        figure.savefig(target / f"{name}.png", dpi=100, bbox_inches="tight")
        pyplot.close(figure)
