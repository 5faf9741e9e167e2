r"""The spectral position of the population, without the floor that a finite batch puts under the batch's own.

With N independent samples, G_n = J_n^T g_n and q_n = ||G_n||^2, the batch's rate measures the gradient noise too:
E ||grad L_batch||^2 = ||grad L||^2 + tr Cov / N. The mean over pairs of different samples does not:

    rate_population = N / (N - 1) * (||sum_n G_n||^2 - sum_n q_n)
    chi_pos_population = rate_population / (chi_loss chi_net)
    noise_scale = N sum_n q_n / rate_population - 1

The first is unbiased for a loss that is a mean over samples; where samples hold different numbers of labels (padding),
it is a ratio of means, unbiased to order 1/N. Standard errors are the jackknife's, over samples: where the record
offers a subset, over samples drawn at random. Where noise is all there is (a noise scale far above N), the jackknife
gives about twice the true variance, since a pair's noise is counted with each of its two samples (Efron and Stein, Ann.
Statist. 9 (1981), doi:10.1214/aos/1176345462).

Source: docs/theory.md, "Finite batches"; noise scale: McCandlish et al., arXiv 1812.06162.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lnp.contract.linearization import Array, GradientPass, Linearization, ratio, unit

LEAST = 12
"""Samples at least that the jackknife leaves out one by one."""


@dataclass(frozen=True)
class Population:
    """Rate, position and gradient noise scale of the population that the batch was drawn from.

    Attributes
    ----------
    rate:
        ||grad L||^2 of the population, unbiased; may come out negative within its error.
    chi_pos:
        rate / (chi_loss chi_net).
    noise_scale:
        tr Cov / ||grad L||^2, in samples: the batch size at which noise and gradient are equally large.
    rate_stderr, chi_pos_stderr, noise_scale_stderr:
        Standard errors over samples.
    """

    rate: Any
    chi_pos: Any
    noise_scale: Any
    rate_stderr: Any
    chi_pos_stderr: Any
    noise_scale_stderr: Any


def jackknife_size(samples: int) -> int:
    """Samples that the jackknife leaves out: their inner products with the gradient cost about as much as a pass.

    >>> [jackknife_size(samples) for samples in (8, 16, 64, 800)]
    [8, 12, 16, 200]
    """
    return min(samples, max(samples // 4, LEAST))


def possible(lin: Linearization) -> bool:
    """Whether the record can tell the samples' inner products with the gradient."""
    return lin.jvp is not None or (lin.gradient_pass is not None and lin.subset is not None)


def population(lin: Linearization, found: GradientPass, rate: Array, traces: Array, stderr: Array) -> Population:
    """The population's values from a batch of N >= 3 samples that do not interact. Pure, safe to trace and compile.

    Parameters
    ----------
    found:
        The backward pass of the loss, with the squared norms of single samples and their products with the gradient;
        of g divided by its magnitude, and so are the rates that come out.
    rate:
        ||J^T g||^2, shape (), of the same.
    traces:
        tr Theta_nn for each sample, shape (N,), with the standard error `stderr` of their sum.
    """
    assert found.sample_square_norms is not None, "decompose() asks for them"
    assert found.products is not None, "decompose() asks for them"
    xp, n, products = lin.xp, lin.outputs.shape[0], found.products
    norms = list(found.sample_square_norms.values())
    q = sum(norms[1:], start=norms[0])
    g, _ = unit(xp, lin.loss_gradient)  # as what was found
    g2 = xp.sum(g * g, axis=1)
    count, index = products.shape[0], found.index

    def some(values: Array) -> Array:
        """The values of the samples whose products are known."""
        return values if index is None else xp.take(values, index, axis=0)

    def values(count: int, square: Array, own: Array, g2: Array, trace: Array) -> tuple[Array, Array, Array]:
        """(rate, position, noise scale) from sums over `count` samples whose loss gradients are those of n samples."""
        scale = (n / count) ** 2
        rate = scale * count / (count - 1) * (square - own)
        return rate, ratio(xp, ratio(xp, rate, scale * g2), trace), ratio(xp, scale * count * own, rate) - 1

    own, norm, trace = xp.sum(q), xp.sum(g2), xp.sum(traces)
    whole = values(n, rate, own, norm, trace)
    without = values(n - 1, rate - 2 * products + some(q), own - some(q), norm - some(g2), trace - some(traces))
    spread = [xp.sum((part - xp.mean(part)) ** 2) / (count - 1) for part in without]
    errors = [xp.sqrt((n - 1) ** 2 / n * variance) for variance in spread]
    probing = whole[1] * ratio(xp, stderr, trace)
    return Population(*whole, errors[0], xp.sqrt(errors[1] ** 2 + probing**2), errors[2])
