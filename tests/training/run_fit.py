"""A small net and its data, and a run of `fit` on a pickled case, for tests that start processes:
`python run_fit.py CASE OUT [KILL_AT_STEP]`."""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Points(Dataset[Tensor]):
    """Random points, one of which may be no number."""

    def __init__(self, count: int = 22, bad: int | None = None) -> None:
        self.values = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
        if bad is not None:
            self.values[bad] = torch.nan

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, number: int) -> Tensor:
        return self.values[number]

    def told(self, number: int) -> str:
        return f"point {number}"

    @staticmethod
    def collate(items: list[Tensor]) -> dict[str, Tensor]:
        return {"points": torch.stack(items)}


class Net(nn.Module):
    """A small net with dropout, so that random numbers count."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 4))

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(points) - points.roll(1, 1)).square().mean()}


def main(case: str, out: str, kill_at: str = "0") -> None:
    """Trains the case's module, and writes what trained to OUT/trained.pt; killed, if so wanted, in the middle."""
    from anygen.training.loop import RunLog, is_main, leave
    from anygen.training.trainer import SafeTrainer, fit

    told: dict[str, Any] = pickle.loads(Path(case).read_bytes())
    step = SafeTrainer.training_step

    def die(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **options)

    SafeTrainer.training_step = die
    print(f"process-{os.environ.get('RANK', 0)}-of-{os.environ.get('WORLD_SIZE', 1)}\n", end="", flush=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        shard_on_cpu()
    for number, (module, data, options) in enumerate(told["runs"]):
        folder = Path(out) / str(options.pop("folder", number))
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr": 1e-2}]
        fit(module.train(), data, data.collate, groups, RunLog(folder, "run"), **options)
        if is_main():
            made = [p.detach().cpu() for p in module.parameters() if p.requires_grad]  # sharding replaced them
            torch.save(made, folder / "trained.pt")
    leave()


def shard_on_cpu() -> None:
    """accelerate shards on accelerators alone, although FSDP2 does it anywhere: lets it take the CPUs for some."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def pretend(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


if __name__ == "__main__":
    main(*sys.argv[1:])
