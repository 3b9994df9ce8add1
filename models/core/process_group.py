"""Several processes, one training: `torchrun --nproc-per-node N -m models train …`.

Every process makes the same global batches and takes its share of their rows; gradients are summed
over all labels, so that uneven shares change nothing. Evaluation shares targets out and puts the
places together: exact, not a mean of means. nccl where each process has a GPU of its own; else gloo,
which exchanges on the host. The processes share a file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Team:
    """This process among `size`; alone unless torchrun started it."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # where what is exchanged must lie

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            there = values.to(self.device)
            distributed.all_reduce(there)
            values.copy_(there)
        return values

    def total_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over all processes; a process without labels adds nothing."""
        if self.size == 1:
            return
        all_of = [p for p in parameters if p.requires_grad]
        for one in all_of:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        flat = torch.cat([one.grad.reshape(-1) for one in all_of if one.grad is not None])
        flat = self.total(flat)
        low = 0
        for one in all_of:
            assert one.grad is not None
            one.grad.copy_(flat[low : low + one.numel()].view_as(one))
            low += one.numel()

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """[size, ...]: what each process has."""
        if self.size == 1:
            return values.unsqueeze(0)
        there = values.to(self.device)
        found = [torch.empty_like(there) for _ in range(self.size)]
        distributed.all_gather(found, there)
        return torch.stack(found).to(values.device)

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


ALONE = Team()


def start(device: str) -> tuple[Team, str]:
    """Join the processes that torchrun started: this one, and the device it works on."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    exchange, backend = "cpu", "gloo"
    if device == "cuda":
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        device = f"cuda:{local % cards}"
        torch.cuda.set_device(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= cards:
            exchange, backend = device, "nccl"  # which refuses two processes on one GPU
    distributed.init_process_group(backend)
    return Team(distributed.get_rank(), distributed.get_world_size(), exchange), device


def stop() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
