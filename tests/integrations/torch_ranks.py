"""One of two processes that train together, for test_torch_distributed.py: python torch_ranks.py RANK FOLDER

Writes what each case came to into FOLDER/RANK.json.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import lnp
import lnp_torch

STEPS = 3


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    draw = lambda: (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
    return [draw() for _ in range(STEPS)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def sharded() -> nn.Module:
    return fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))


def split() -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(network(), init_device_mesh("cpu", (2,)), plan)


def copied() -> nn.Module:
    return nn.parallel.DistributedDataParallel(network())


class Talks(nn.Module):
    """Subtracts the mean over all processes, as synchronised normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        return hidden - all_reduce(hidden.mean(0)) / 2


MODELS = {"FSDP2": sharded, "tensor parallel": split, "data parallel": copied, "talking": Talks}


def whole(model: nn.Module) -> list[torch.Tensor]:
    """The parameters as they are over all processes."""
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [value.detach().clone() for value in values]


def train(kind: str, way: str, tracker: lnp.Tracker | None, rank: int) -> list[torch.Tensor]:
    """Weights after some steps, watched in one of a tracker's ways."""
    model = MODELS[kind]()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for index, (x, y) in enumerate(batches(0 if kind == "tensor parallel" else rank)):
        optimizer.zero_grad()
        if tracker is None:
            F.cross_entropy(model(x), y).backward()
        elif way == "observe":
            tracker.observe(index, model, (x, y))
            F.cross_entropy(model(x), y).backward()
        elif way == "step":
            with tracker.step(index, model, (x, y)):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            continue
        else:
            with tracker.shared(index, model) as shared:
                loss = F.cross_entropy(model(x), y)
            shared.backward(loss, y, F.cross_entropy)
        optimizer.step()
    return whole(model)


def out_of_memory(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no room")


def warned(kind: str, way: str, rank: int, **options: object) -> dict:
    """A run whose measurements fail, beside the one without a tracker."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = lnp.Tracker(schedule=options.pop("schedule", 1), **options)
        plain, watched = train(kind, way, None, rank), train(kind, way, tracker, rank)
    start = [value.detach() for value in network().parameters()]
    return {
        "equal": all(map(torch.equal, plain, watched)),
        "moved": all(not torch.equal(a, b) for a, b in zip(start, watched, strict=True)),
        "told": [text for w in caught if (text := str(w.message)).startswith("lnp")],
        "rows": len(tracker.history),
        "samples": [float(n) for n in tracker.history["samples"]] if len(tracker.history) else [],
    }


def one_out_of_memory(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("no room")
    return F.cross_entropy(outputs, targets)


def raised(kind: str, way: str, rank: int) -> dict:
    """A run that is to end at step 1, the first that is due, and whether the model can be trained afterwards."""
    try:
        train(kind, way, lnp.Tracker(schedule=[1], on_error="raise"), rank)
        error = None
    except ValueError as found:
        error = str(found)
    dist.barrier()  # both are here
    return {"error": error}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    found = {}
    for kind in ("FSDP2", "tensor parallel"):
        for way in ("observe", "step", "shared"):
            if way == "observe":
                found[f"{kind}, observe, measured"] = warned(kind, way, rank)
                found[f"{kind}, observe, one fails"] = warned(kind, way, rank, loss=one_out_of_memory)
                continue
            found[f"{kind}, {way}, warned"] = warned(kind, way, rank)
            found[f"{kind}, {way}, raised"] = raised(kind, way, rank)
    for way in ("observe", "step"):
        found[f"data parallel, {way}, warned"] = warned("data parallel", way, rank, loss=out_of_memory)
    for way in ("observe", "step", "shared"):
        found[f"talking, {way}, warned"] = warned("talking", way, rank)
    together = lnp_torch.Group()
    found["data parallel, group, measured"] = warned("data parallel", "observe", rank, group=together)
    budget = lnp.schedule.budget(0.5)
    found["data parallel, budget"] = warned("data parallel", "observe", rank, group=together, schedule=budget)
    found["data parallel, observe, measured"] = warned("data parallel", "observe", rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking the group down aborts the process now and then: a thread of gloo is still there


if __name__ == "__main__":
    rank = int(sys.argv[1])
    os.environ["RANK"] = str(rank)
    main(rank, Path(sys.argv[2]))
