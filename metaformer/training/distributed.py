"""The processes of a run: one per device, started by torchrun, or a single one. They use NCCL on GPUs, gloo on CPUs."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metaformer.errors import InputError
from metaformer.provenance import cores

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals of schedulers, of Ctrl-C, and of Slurm before the end of a job's time."""


@dataclass
class Processes:
    """This process among all of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_world: int = 1
    control: dist.ProcessGroup | None = None
    """A gloo group for decisions, so that they do not wait for the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, wrapped if there are several processes so that its gradients are averaged over them."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, on the CPU in float64."""
        return torch.stack(self.gather(values.detach().to("cpu", torch.float64))).sum(0)

    def gather(self, value: object) -> list:
        """The values of all processes."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns in the main process; the others do not call it."""
        values = [make() if self.is_main else None]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise an ``InputError`` if the processes were started with different settings or data."""
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            for key in first:
                if first[key] != other[key]:
                    raise InputError(
                        f"process 0 has {key}={first[key]} and process {rank} has {key}={other[key]}: start the same "
                        "command with the same data on all machines"
                    )

    def leave(self) -> None:
        """Close the connections at the end of a successful run."""
        if self.world > 1:
            dist.destroy_process_group()

    def default_workers(self) -> int:
        """One loader process for each core that this device's share of the machine has."""
        return max(1, cores() // self.local_world)


def join() -> Processes:
    """Join the other processes named by torchrun's environment; without it there is a single process."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{local_world} processes need {local_world} GPUs and this machine shows {torch.cuda.device_count()}: "
                f"use GPUS={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # sizes do not change while training
    if world == 1:
        return Processes(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    return Processes(device, rank, world, local_world, control)


class StopSignal:
    """A context that records the first stop signal, so that the run can save and exit; a second Ctrl-C interrupts
    it."""

    received = 0

    def __enter__(self) -> "StopSignal":
        self._earlier = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.default_int_handler)
