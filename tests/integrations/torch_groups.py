"""One of four processes that measure together, for test_torch_groups.py: in tests/:

    python -m integrations.torch_groups RANK FOLDER PORT CASES

Writes what each case came to into FOLDER/RANK.json. Processes 1 and 3 kill themselves in the end.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import lnp
import lnp_torch
from lnp_torch.group import ShardedProcesses
from lnp_torch.meeting import Meeting

SIZE, SAMPLES, LIMIT = 4, 24, 2.0
EXACT = {"estimator": "exact", "by_layer": True}


class Language(nn.Module):
    """Parameters of the root itself, tied ones, an embedding, and layers that are not sharded by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 8)
        self.places = nn.Parameter(torch.randn(3, 8) / 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(1))
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).transpose(1, 2)


def language(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Language().to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def copied(dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network(dtype), **options)


def sharded(model: nn.Module, mesh: DeviceMesh | None = None, **options: object) -> nn.Module:
    """Each layer by itself, and what is left with the root."""
    mesh = mesh or init_device_mesh("cpu", (SIZE,))
    for layer in getattr(model, "blocks", model):
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def numbers(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, 6, generator=generator).to(dtype), torch.randint(3, (SAMPLES,), generator=generator)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, (SAMPLES, 3), generator=generator), torch.randint(5, (SAMPLES, 3), generator=generator)


def own(batch: tuple, rank: int, size: int = SIZE) -> tuple:
    rows = slice(SAMPLES // size * rank, SAMPLES // size * (rank + 1))
    return tuple(array[rows] for array in batch)


def values(d: lnp.Decomposition) -> dict:
    return {"notes": list(d.notes), **d.to_dict()}


def told(measure: object) -> str | None:
    """The error, and whether it came in time."""
    started = time.monotonic()
    try:
        measure()
    except Exception as error:
        late = "" if time.monotonic() - started < 5 * LIMIT else "late: "
        return f"{late}{type(error).__name__}: {error}"
    return None


def data_parallel(rank: int) -> dict:
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        found[name] = values(lnp.decompose(copied(dtype), own(numbers(dtype), rank), **EXACT))
    seeds = [lnp.decompose(copied(), own(numbers(), rank), seed=seed, rtol=0.0, max_probes=2) for seed in range(8)]
    found["probes"] = [[d.chi_net, d.chi_net_stderr, d.degrees_of_freedom] for d in seeds]
    x, y = numbers()
    rows = slice(0, 3) if rank == 0 else slice(3 * rank + 4, 3 * rank + 7 + rank)  # 3, 4, 5 and 6 samples
    d = lnp.decompose(copied(), (x[rows], y[rows]), sample_losses=True, **EXACT)
    found["unequal"] = values(d) | {"rows": [rows.start, rows.stop], "parts": float(sum(d.sample_losses.parts))}
    found["alone"] = values(lnp.decompose(copied(), own(numbers(), rank), group=None, **EXACT))
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found["pair"] = values(lnp.decompose(network(), own(numbers(), rank % 2, 2), group=pair, **EXACT))
    return found


def fully_sharded(rank: int) -> dict:
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        found[name] = values(lnp.decompose(sharded(network(dtype)), own(numbers(dtype), rank), **EXACT))
    model, every = sharded(language()), []
    kept = ShardedProcesses.__init__
    ShardedProcesses.__init__ = lambda self, *args: (kept(self, *args), every.append(self))[0]  # type: ignore[method-assign]
    found["language"] = values(lnp.decompose(model, own(text(), rank), nn.CrossEntropyLoss(), **EXACT))
    ShardedProcesses.__init__ = kept  # type: ignore[method-assign]
    found["peak"], found["gathered"] = every[0].gathering.peak, every[0].gathering.gathered
    return found


class Branching(nn.Module):
    """Each process uses one of two layers, and no process the third."""

    def __init__(self, branch: int) -> None:
        super().__init__()
        self.branch, self.layers = branch, nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[self.branch](x)


def branching(branch: int) -> nn.Module:
    torch.manual_seed(0)
    return Branching(branch).double()


def other_shardings(rank: int) -> dict:
    """Over a mesh of two dimensions, several modules as one, some parameters whole, and some that not all use."""
    batch = own(numbers(), rank)
    hybrid = sharded(network(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    mesh = init_device_mesh("cpu", (SIZE,))
    grouped, kept = network(), network()
    fully_shard([grouped[0], grouped[2]], mesh=mesh)
    fully_shard(grouped, mesh=mesh)
    fully_shard(kept, mesh=mesh, ignored_params={kept[2].weight})
    found = {"hybrid": hybrid, "grouped": grouped, "partly": kept}
    measured = {name: values(lnp.decompose(model, batch, **EXACT)) for name, model in found.items()}
    model = branching(rank % 2)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    measured["branching"] = values(lnp.decompose(fully_shard(model, mesh=mesh), batch, estimator="exact"))
    return measured


def ways_of_their_own(rank: int) -> dict:
    """Mixed precision; and processes that need different numbers of passes."""
    found = {}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    narrow = sharded(network(torch.float32), mp_policy=policy)
    found["bfloat16"] = values(lnp.decompose(narrow, own(numbers(torch.float32), rank), **EXACT))
    x, y = own(numbers(torch.float32), rank)
    found["loss"] = float(F.cross_entropy(narrow(x), y).detach())
    narrow.reshard()
    model = sharded(language())
    way = {
        "estimator": "exact" if rank % 2 else "per_sample",
        "rtol": 0.0,
        "max_probes": 2 + rank // 2,
        "population": False,
    }
    found["ways"] = values(lnp.decompose(model, own(text(), rank), nn.CrossEntropyLoss(), **way))
    return found


def trained(make: object, rank: int, watched: bool) -> list[torch.Tensor]:
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(3):
        if watched:
            lnp.decompose(model, own(numbers(), rank))
        optimizer.zero_grad()
        x, y = own(numbers(), rank)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def undisturbed(rank: int) -> dict:
    found = {}
    for name, make in (("copied", copied), ("sharded", lambda: sharded(network()))):
        state = torch.get_rng_state()
        plain = trained(make, rank, watched=False)
        torch.set_rng_state(state)
        found[name] = all(map(torch.equal, plain, trained(make, rank, watched=True)))
    return found


def breaking(rank: int) -> object:
    """A loss that fails in one process."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if rank == 2:
            raise FloatingPointError("overflow in process 2")
        return F.cross_entropy(outputs, targets)

    return loss


def gathering(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    every = [torch.zeros_like(outputs) for _ in range(SIZE)]
    dist.all_gather(every, outputs.detach())
    return F.cross_entropy(outputs - torch.cat(every).mean(), targets)


def failing(rank: int) -> dict:
    group, batch = lnp_torch.Group(timeout=LIMIT), own(numbers(), rank)
    ddp, fsdp = copied(), sharded(network())
    found = {"alone": told(lambda: lnp.decompose(ddp, batch, group=group)) if rank == 0 else None}
    dist.barrier()
    found["alone, sharded"] = told(lambda: lnp.decompose(fsdp, batch, group=group)) if rank == 0 else None
    dist.barrier()
    for name, model in (("copied", ddp), ("sharded", fsdp)):
        found[f"{name}, one fails"] = told(lambda model=model: lnp.decompose(model, batch, breaking(rank), group=group))
        found[f"{name}, afterwards"] = values(lnp.decompose(model, batch, **EXACT))
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    found["talks"] = told(lambda: lnp.decompose(ddp, batch, gathering, group=group))
    found["talks alone"] = told(lambda: lnp.decompose(network(), batch, gathering)) if rank == 0 else None
    found["shards alone"] = told(lambda: lnp.decompose(fsdp, batch, group=None))
    found["spectrum"] = told(lambda: lnp.spectrum(fsdp, batch))
    found["other group"] = told(lambda: lnp.decompose(fsdp, batch, group=dist.new_group([0, 1])))
    narrow = sharded(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    found["narrow"] = told(lambda: lnp.decompose(narrow, batch))
    found["parameters"] = told(lambda: lnp.decompose(ddp, batch, parameters="*weight" if rank else None, group=group))
    found["preconditioner"] = told(lambda: lnp.decompose(ddp, batch, preconditioner=[1.0]))
    found["nested"] = told(lambda: lnp.decompose_nested(ddp, batch, batch_sizes=[4, 6])) if rank == 0 else None
    found["nested together"] = told(lambda: lnp.decompose_nested(ddp, batch, batch_sizes=[4, 6], group=group))
    found["kind"] = told(lambda: lnp.decompose(ddp, batch, group=3))
    return found


def killed(rank: int) -> dict:
    """Process 1 ends in the midst of a measurement with 0, process 3 in one with 2, whose model is sharded."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    batch = own(numbers(), rank % 2, 2)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if rank % 2:
            os._exit(9)
        return F.cross_entropy(outputs, targets)

    model = network() if rank < 2 else sharded(network(), meshes[1])
    group = lnp_torch.Group(pair if rank < 2 else meshes[1].get_group(), timeout=LIMIT)
    return {"told": told(lambda: lnp.decompose(model, batch, loss, group=group))}


def last_line(rank: int) -> dict:
    """The program ends with a measurement, while others have not yet read what the first process's store holds."""
    if rank:
        collect = Meeting._collect
        Meeting._collect = lambda *args: (time.sleep(0.2), collect(*args))[1]  # type: ignore[method-assign]
    return values(lnp.decompose(copied(), own(numbers(), rank), **EXACT))


ALL = (data_parallel, fully_sharded, other_shardings, ways_of_their_own, undisturbed, failing, killed, last_line)
CASES = {case.__name__: case for case in ALL}


def main(rank: int, folder: Path, port: str, cases: list[str]) -> None:
    meeting = f"tcp://127.0.0.1:{port}"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=SIZE, timeout=limit)
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    found: dict = {}
    from integrations.torch_split import tensor_parallel  # which takes this file's networks

    known = CASES | {"tensor_parallel": tensor_parallel}
    for case in cases:
        started = time.monotonic()
        (folder / f"{rank}.json").write_text(json.dumps(found))  # before what may end the process
        found[case] = known[case](rank)
        print(case, round(time.monotonic() - started, 1), flush=True)  # read where the test fails
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # taking the group down waits for those that are gone


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
