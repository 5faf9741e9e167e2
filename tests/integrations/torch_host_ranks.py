"""One of two processes that a host trains together, for test_torch_host_groups.py: python torch_host_ranks.py FOLDER

As torchrun starts it, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Writes what was measured into
FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}

import accelerate
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lnp
import lnp_torch
from lnp_torch.lightning import LNPCallback
from lnp_torch.transformers import attach

RANK, STEPS = int(os.environ["RANK"]), 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (32,), generator=generator))


@contextlib.contextmanager
def sharding(accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Has Accelerate shard parameters (FSDP in version 2), which it does on accelerators alone, on a processor."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
    )
    states = (accelerate.state.PartialState._shared_state, accelerator.state._shared_state)
    before = [dict(state) for state in states]
    for state in states:
        state |= {"distributed_type": accelerate.DistributedType.FSDP, "fsdp_plugin": plugin}
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state.clear()
            state |= known


def values(parameters: Iterable) -> list[torch.Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in parameters]


def by_accelerate(tracker: lnp.Tracker | None, shard: bool = False) -> list[torch.Tensor]:
    accelerator = accelerate.Accelerator(cpu=True)
    with sharding(accelerator) if shard else contextlib.nullcontext():
        return accelerated(accelerator, tracker)


def accelerated(accelerator: accelerate.Accelerator, tracker: lnp.Tracker | None) -> list[torch.Tensor]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(samples(), batch_size=8))
    for step, (x, y) in enumerate(loader):
        if tracker is not None:
            tracker.observe(step, model, (x, y))
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    return values(accelerator.unwrap_model(model).parameters())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list, index: int) -> torch.Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Sharded(Module):
    def configure_model(self) -> None:
        for layer in (self.network[0], self.network[2], self.network):
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def by_lightning(folder: Path, callbacks: list, shard: bool = False) -> list[torch.Tensor]:
    module = Sharded() if shard else Module()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if shard else "ddp"
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=strategy, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=str(folder), use_distributed_sampler=True,
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples(), batch_size=8))
    return values(module.parameters())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict:
        outputs = self.network(x)
        return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}


def by_transformers(
    folder: Path, options: dict | None, shard: bool = False
) -> tuple[list[torch.Tensor], lnp.Tracker | None]:
    model = Classifier()
    data = [{"x": x, "labels": y} for x, y in samples()]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, per_device_train_batch_size=8, max_steps=STEPS,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", learning_rate=0.1, optim="sgd", seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    with sharding(trainer.accelerator) if shard else contextlib.nullcontext():
        trainer.is_fsdp_enabled = shard
        tracker = None if options is None else attach(trainer, schedule=1, **options)
        trainer.train()
        return values(model.parameters()), tracker


def rows(tracker: lnp.Tracker) -> list[dict]:
    return [{name: row[name] for name in ("rate", "chi_net", "loss", "samples")} for row in tracker.history.rows()]


def main(folder: Path) -> None:
    together = {"group": lnp_torch.Group(), "estimator": "exact"}
    found, told = {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = lnp.Tracker(schedule=1, **together)
        watched = by_accelerate(tracker)
        found["accelerate"] = {"rows": rows(tracker), "equal": all(map(torch.equal, watched, by_accelerate(None)))}
        callback = LNPCallback(schedule=1, **together)
        watched = by_lightning(folder, [callback])
        plain = by_lightning(folder, [])
        found["lightning"] = {"rows": rows(callback.tracker), "equal": all(map(torch.equal, watched, plain))}
        watched, hugging = by_transformers(folder, together)
        plain, _ = by_transformers(folder, None)
        found["transformers"] = {"rows": rows(hugging), "equal": all(map(torch.equal, watched, plain))}
        alone = {"estimator": "exact"}  # whose processes all have to measure
        tracker = lnp.Tracker(schedule=1, **alone)
        ends = [by_accelerate(one, shard=True) for one in (tracker, None)]
        found["accelerate, FSDP2"] = {"rows": rows(tracker), "equal": all(map(torch.equal, *ends))}
        callback = LNPCallback(schedule=1, **alone)
        ends = [by_lightning(folder, callbacks, shard=True) for callbacks in ([callback], [])]
        found["lightning, FSDP2"] = {"rows": rows(callback.tracker), "equal": all(map(torch.equal, *ends))}
        (watched, hugging), (plain, _) = (by_transformers(folder, way, shard=True) for way in (alone, None))
        found["transformers, FSDP2"] = {"rows": rows(hugging), "equal": all(map(torch.equal, watched, plain))}
        told = [text for w in caught if (text := str(w.message)).startswith("lnp")]
    found["told"] = told
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
