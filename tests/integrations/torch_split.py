"""Networks whose operations `parallelize_module` splits over processes, for torch_groups.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_groups import EXACT, LIMIT, SIZE, network, numbers, own, told, trained, values

HEADS = 4
HIDDEN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


class Attention(nn.Module):
    """With as many heads as there are, or as it is told."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.heads, self.queries, self.keys, self.values = heads, *(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        some = [
            f(x).unflatten(-1, (self.heads, 8 // HEADS)).transpose(1, 2) for f in (self.queries, self.keys, self.values)
        ]
        return self.out(F.scaled_dot_product_attention(*some).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A language model with sequence parallelism between its parts, and outputs that no process has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(8, 8), nn.LayerNorm(8)
        self.attention, self.second, self.head = Attention(), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x)
        hidden = hidden + self.attention(self.norm(hidden))
        return self.head(self.second(hidden)).transpose(1, 2)


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().double()


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, (6, 4), generator=generator), torch.randint(8, (6, 4), generator=generator)


def split_block(mesh: DeviceMesh) -> nn.Module:
    whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "attention": PrepareModuleInput(**whole),
        "attention.queries": ColwiseParallel(),
        "attention.keys": ColwiseParallel(),
        "attention.values": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "second": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }
    return parallelize_module(block(), mesh, plan)


class Odd(nn.Module):
    """What may not be the same function with whole weights: between its layers it goes by the part that it has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner, self.gain = kind, network(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner[0](x)
        if self.kind == "counts":
            hidden = hidden.reshape(len(x), 16 // SIZE).tanh()
        elif self.kind == "means":
            hidden = hidden - hidden.mean(1, keepdim=True)
        else:  # each process has the gradient of its part alone, as it has in training
            hidden = hidden * self.gain
        return self.inner[4](self.inner[2](hidden))


def split(model: nn.Module, mesh: DeviceMesh | None = None, prefix: str = "") -> nn.Module:
    plan = {prefix + name: style for name, style in HIDDEN.items()}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (SIZE,)), plan)


def tensor_parallel(rank: int) -> dict:
    found: dict = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        found[name] = values(lnp.decompose(split(network(dtype)), numbers(dtype), **EXACT))
    mesh = init_device_mesh("cpu", (SIZE,))
    found["block"] = values(lnp.decompose(split_block(mesh), sentences(), nn.CrossEntropyLoss(), **EXACT))
    found["probes"] = values(lnp.decompose(split_block(mesh), sentences(), nn.CrossEntropyLoss(), seed=3))
    pair = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][rank // 2]
    found["pair"] = values(lnp.decompose(split(network(), pair), numbers(), **EXACT))
    state = torch.get_rng_state()
    plain = trained(lambda: split(network()), 0, watched=False)
    torch.set_rng_state(state)
    found["undisturbed"] = all(map(torch.equal, plain, trained(lambda: split(network()), 0, watched=True)))
    for kind in ("counts", "means", "gains"):
        found[kind] = told(lambda kind=kind: lnp.decompose(split(Odd(kind), prefix="inner."), numbers()))
    found["batches"] = told(lambda: lnp.decompose(split(network()), own(numbers(), rank)))
    found["shifted"] = told(lambda: lnp.decompose(split(network()), shifted(rank)))
    twice = parallelize_module(split(network()), pair, {"4": ColwiseParallel(use_local_output=False)})
    found["two meshes"] = told(lambda: lnp.decompose(twice, numbers()))
    return found | failures(rank)


def shifted(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of its own for each process, with a loss that hardly tells."""
    x, y = numbers()
    return x + 1e-6 * rank, y


def failures(rank: int) -> dict:
    """A process that calls alone, one that fails, and the measurement after that."""
    group, model, found = lnp_torch.Group(timeout=LIMIT), split(network()), {}
    found["alone"] = told(lambda: lnp.decompose(model, numbers(), group=group)) if rank == 0 else None
    dist.barrier()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if rank == 2:
            raise FloatingPointError("overflow in process 2")
        return F.cross_entropy(outputs, targets)

    found["one fails"] = told(lambda: lnp.decompose(model, numbers(), loss, group=group))
    found["afterwards"] = values(lnp.decompose(model, numbers(), **EXACT))
    return found
