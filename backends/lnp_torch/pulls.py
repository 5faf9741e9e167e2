"""Pull-backs of one batch, and of samples drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lnp.linearization import Subset
from lnp.population import jackknife_size
from lnp_torch import directional
from lnp_torch.apart import Apart, Pullback, Verdict, tapped_groups
from lnp_torch.isolation import undisturbed
from lnp_torch.outputs import flatten
from lnp_torch.passes import Passes
from lnp_torch.scaling import at_scale_one

Vector = list[torch.Tensor]


@dataclass
class Pulls:
    """Pull-backs that remember the squared norms of the loss gradient's samples, where both will be asked for.

    Attributes
    ----------
    apart:
        The samples.
    verdict:
        How they are taken apart, or None.
    gradients:
        v -> J^T v.
    both:
        The cotangent of which J^T v and the squared norms are wanted, or None.
    keep:
        Whether parts of some samples' gradients are kept with them.
    seed:
        Of the samples that are drawn.
    """

    apart: Apart
    verdict: Verdict | None
    gradients: Callable[[torch.Tensor], Vector]
    both: torch.Tensor | None
    keep: bool
    seed: Any
    found: Pullback | None = None

    def vjp(self, v: torch.Tensor) -> Vector:
        if v is not self.both or self.verdict is None:
            return self.gradients(v)
        if self.found is None:
            self.found = self.apart.pulled(v, self.verdict, keep=self.kept())
        return self.found.gradient

    def sample_square_norms(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        if v is self.both and self.found is not None:
            return self.found.square_norms
        assert self.verdict is not None, "the record offers this only then"
        return self.apart.square_norms(v, self.verdict)

    def along(self, index: torch.Tensor) -> Callable[[Vector], torch.Tensor] | None:
        """u -> <J_m^T g_m, u> of these samples, if they are those that were kept."""
        found, parameters = self.found, self.apart.passes.program.parameters
        if found is None or not found.kept or len(index) != jackknife_size(self.apart.passes.samples):
            return None
        return lambda u: found.along(parameters, dict(zip(parameters, u, strict=True)))

    def kept(self) -> torch.Tensor | None:
        """Samples parts of whose gradients are kept: those of the jackknife."""
        return self.drawn(jackknife_size(self.apart.passes.samples)) if self.keep else None

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

    return Subset(index, square_norms, lambda u: jvp(some, u), pulls.along(index))


def jvp(passes: Passes, u: Vector) -> torch.Tensor:
    """J u, (N, K)."""
    program = passes.program
    with undisturbed(program.modules, [program.device]):
        run = lambda p: passes.whole(p).parts
        forward = lambda vector: [flatten(directional.jvp(run, program.parameters, vector)).detach()]
        return at_scale_one(forward, u, program.parameters.values())[0]
