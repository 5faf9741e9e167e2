"""Pull-backs of one batch, and of samples drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lnp.contract.linearization import Subset
from lnp.estimators.population import jackknife_size
from lnp_torch import forward_mode
from lnp_torch.float16 import at_scale_one
from lnp_torch.outputs import flatten
from lnp_torch.replay import Passes
from lnp_torch.state_guard import undisturbed
from lnp_torch.taps.backward_pass import Apart, Pullback, Verdict, tapped_groups
from lnp_torch.taps.reader import Reading

Vector = list[torch.Tensor]


@dataclass
class Pulls:
    """Pull-backs that remember what the one of the loss gradient g has shown.

    Attributes
    ----------
    apart:
        The samples.
    verdict:
        How they are taken apart, or None.
    gradients:
        v -> J^T v.
    loss_gradient:
        g, (N, K).
    both:
        Whether the squared norms of its samples will be asked for beside J^T g.
    cheap:
        Whether these come from taps.
    seed:
        Of the samples that are drawn.
    """

    apart: Apart
    verdict: Verdict | None
    gradients: Callable[[torch.Tensor], Vector]
    loss_gradient: torch.Tensor
    both: bool
    cheap: bool
    seed: Any
    found: Pullback | None = None

    def vjp(self, v: torch.Tensor) -> Vector:
        if v is self.loss_gradient and self.found is None and self.both and self.verdict is not None:
            self.found = self.apart.pulled(v, self.verdict, self.verdict.reading(), gradient=True)
        known = self.found.gradient if v is self.loss_gradient and self.found is not None else []
        return known or self.gradients(v)

    def gradient_square_norms(self) -> dict[str, torch.Tensor]:
        """{name: ||J_l^T g||^2}, with one parameter's gradient in memory at a time; of a whole batch."""
        if self.found is None or not self.found.gradient_norms:
            v, reading = self.loss_gradient, self.reading()
            if self.both and self.verdict is not None:
                self.found = self.apart.pulled(v, self.verdict, reading, gradient=False)
            else:
                self.found = self.apart.tapped(v, reading, gradient=False)
        return self.found.gradient_norms

    def reading(self) -> Reading:
        """How the taps are read while the loss gradient is pulled back."""
        if self.both and self.verdict is not None:
            some = self.drawn(jackknife_size(self.apart.passes.samples)) if self.cheap else None
            return self.verdict.reading(gradient=True, along=some)
        return Reading(frozenset(self.apart.passes.program.parameters), gradient=True)

    def sample_square_norms(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        if v is self.loss_gradient and self.both and self.found is not None:
            return self.found.square_norms
        assert self.verdict is not None, "the record offers this only then"
        return self.apart.square_norms(v, self.verdict)

    def along(self, index: torch.Tensor) -> Callable[[Vector], torch.Tensor] | None:
        """J^T g -> <J_m^T g_m, J^T g> of these samples, if its backward pass has told it."""
        known = None if self.found is None else self.found.along
        if known is None or len(index) != jackknife_size(self.apart.passes.samples):
            return None
        return lambda gradient: known

    def drawn(self, size: int) -> torch.Tensor:
        """Samples drawn at random, in the batch's order; the same ones at each call."""
        samples = self.apart.passes.samples
        order = np.random.default_rng(np.random.SeedSequence((self.seed, samples))).permutation(samples)
        return torch.as_tensor(np.sort(order[:size]), device=self.apart.passes.program.device)


def subset(pulls: Pulls, microbatch: int | None, size: int) -> Subset:
    """Samples drawn at random, with a forward pass of their own once squared norms are asked for."""
    index, verdict = pulls.drawn(size), pulls.verdict
    some = pulls.apart.passes.some(index)
    assert verdict is not None, "the record offers this only then"

    def square_norms(v: torch.Tensor) -> dict[str, torch.Tensor]:
        size = min(microbatch or some.samples, some.samples)
        return Apart(some, lambda: tapped_groups(some, size), v).square_norms(v, verdict)

    def forward(u: Vector) -> torch.Tensor:
        size = min(microbatch or some.samples, some.samples)
        return torch.cat([jvp(some.some(slice(start, start + size)), u) for start in range(0, some.samples, size)])

    return Subset(index, square_norms, forward, pulls.along(index))


def jvp(passes: Passes, u: Vector) -> torch.Tensor:
    """J u, (N, K)."""
    program = passes.program
    with undisturbed([program.device]):
        run = lambda p: passes.whole(p).parts
        forward = lambda vector: [flatten(forward_mode.jvp(run, program.parameters, vector)).detach()]
        return at_scale_one(forward, u, program.parameters.values())[0]
