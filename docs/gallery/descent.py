"""What the studies of the teacher's students share: a run that is measured at averaged weights, and its net position.

The rate that a position is made of is that of an infinitesimal step at the weights of the moment, which the noise of
the descent has moved off the way: most of it is undone by the next steps. What remains is the net rate, at which the
loss on the same held-out samples really falls. A tracker with a batch of its own tells it, and the net position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from teacher import Teacher, loss_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lnp

SHARE = 8
"""Weights are averaged over about the last eighth of the steps so far."""
BATCH = 256


def averaged(model: nn.Module) -> AveragedModel:
    """A copy whose `module` holds the average of the weights: the mean of w_s with weights in proportion to s^7."""
    return AveragedModel(model, avg_fn=lambda mean, now, count: mean + (now - mean) * (SHARE / (count + SHARE)))


@dataclass
class Run:
    """What was measured along a run.

    `net` is the history, at averaged weights, of a tracker with held-out samples. `moment` and `averaged` are
    decompositions at the same steps, at the weights of the moment and at averaged ones, on new samples each time.
    """

    steps: list[int]
    net: lnp.History
    moment: list[lnp.Decomposition]
    averaged: list[lnp.Decomposition]


def watched(model: nn.Module, seed: int, rate: float, points: list[int], measured: int = 16384) -> Run:
    """Descend with new samples at every step, and measure at the points."""
    teacher, generator = Teacher(), torch.Generator().manual_seed(seed)
    held_out = teacher.draw(measured, torch.Generator().manual_seed(10_000 + seed))
    tracker = lnp.Tracker(schedule=points, batch=held_out, population=False, rtol=0.05)
    mean, way, moment, smooth = averaged(model), 0.0, [], []
    mean.update_parameters(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(points[-1] + 1):
        if step in points:
            few, many = teacher.draw(measured // 4, generator), teacher.draw(measured, generator)
            moment.append(lnp.decompose(model, few, population=True, seed=step))
            smooth.append(lnp.decompose(mean.module, many, population=True, seed=step))
        # Averaged weights lag behind: their learning rates sum up to the average of the sums, not to the last one.
        before, way = way, way + ((step + 1) * rate - way) * SHARE / (step + 1 + SHARE)
        tracker.observe(step, mean.module, learning_rate=way - before)
        optimizer.zero_grad()
        loss_of(model, teacher.draw(BATCH, generator)).backward()
        optimizer.step()
        mean.update_parameters(model)
    return Run(points, tracker.history, moment, smooth)
