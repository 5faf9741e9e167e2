"""Ctrl-C at random moments of measurements in PyTorch: what is left of them? Prints how many left a trace.

    python benchmarks/interruptions.py 500

Not part of the tests, which interrupt 40 measurements (tests/integrations/test_torch_copies.py).
"""

from __future__ import annotations

import collections
import copy
import random
import signal
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import checkpoint

import lnp


class Net(nn.Module):
    """Has what others have swapped, patched or counted: a checkpoint, statistics, a mask, one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.second, self.head = parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4)
        self.again, self.calls = self.second, 0

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.norm(torch.tanh(self.first(x))))
        x = checkpoint.checkpoint(lambda h: torch.tanh(self.second(h)), x, use_reentrant=False)
        return self.head(self.again(x))


def state(model):
    """Everything that a measurement must not change, bit by bit, and by identity."""
    tensors = [
        t.detach().clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
    ]
    objects = [id(o) for o in (*model.parameters(), *model.buffers(), *model.modules())]
    patched = [id(value) for value in vars(checkpoint).values()]
    modes = (
        torch.is_grad_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
        model.training,
        model.calls,
    )
    return [*tensors, torch.get_rng_state()], objects, patched, modes


def differs(before, after):
    """What is not as it was."""
    found = [name for name, a, b in zip(("objects", "patches", "modes"), before[1:], after[1:], strict=True) if a != b]
    same = len(before[0]) == len(after[0]) and all(map(torch.equal, before[0], after[0]))
    return found if same else ["values", *found]


def main(rounds):
    """Interrupt so many measurements."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = Net(), (torch.randn(40, 6), torch.randint(4, (40,)))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    expected = lnp.decompose(model, batch, by_layer=True).rate
    started = time.perf_counter()
    lnp.decompose(model, batch, by_layer=True)
    longest, drawn, tally = time.perf_counter() - started, random.Random(0), collections.Counter()

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(rounds):
        before = copy.copy(state(model))
        try:
            signal.setitimer(signal.ITIMER_REAL, drawn.uniform(0.01, 1.0) * longest)
            lnp.decompose(model, batch, by_layer=True)
        except KeyboardInterrupt:
            tally["interrupted"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        left = differs(before, state(model))
        tally["left a trace"] += bool(left)
        tally.update(left)
    torch.manual_seed(0)
    right = abs(lnp.decompose(model.eval(), batch).rate) > 0 and expected > 0
    print(f"{rounds} measurements: {dict(tally)}; measuring still works: {right}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
