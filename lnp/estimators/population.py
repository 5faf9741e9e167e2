r"""The spectral position of the population, without the floor that a finite batch puts under the batch's own.

With N independent samples, G_n = J_n^T g_n and q_n = ||G_n||^2, the batch's rate measures the gradient noise too:
E ||grad L_batch||^2 = ||grad L||^2 + tr Cov / N. The mean over pairs of different samples does not:

    rate_population = N / (N - 1) * (||sum_n G_n||^2 - sum_n q_n)
    chi_pos_population = rate_population / (chi_loss chi_net)
    noise_scale = N sum_n q_n / rate_population - 1

The rate is unbiased for a loss that is a mean over samples; the other two are ratios of it. Samples may weigh
differently, w_n: they hold different numbers of labels, or their classes have weights. Then the loss is sum_n l_n /
sum_n w_n, and with W = sum_n w_n pairs are weighed by what they would add to W^2:

    rate_population = W^2 / (W^2 - sum_n w_n^2) * (||sum_n G_n||^2 - sum_n q_n)
    noise_scale = N sum_n q_n / rate_population - N sum_n w_n^2 / W^2

which is a ratio of means, unbiased to order 1/N, with a bias of 2.6% at N = 4 and 0.4% at 16 where the first formula
has -5.7% and -1.5% (docs/theory.md, "Unequal samples"). Where the weights are not known, the first formula is used.

Standard errors are the jackknife's, over samples: where the record offers a subset, over samples drawn at random. Where
noise is all there is (a noise scale far above N), the jackknife gives about twice the true variance, since a pair's
noise is counted with each of its two samples (Efron and Stein, Ann. Statist. 9 (1981), doi:10.1214/aos/1176345462).

The noise scale has the rate below it, which may vanish: its own error says little. The share of the squared gradients
that is not noise, u = rate_population / (N sum_n q_n), has a denominator that is known well, and noise_scale = 1/u - 1
falls with u: so its interval is that of u, and is open above where u is within two standard errors of zero.

Source: docs/theory.md, "Finite batches"; noise scale: McCandlish et al., arXiv 1812.06162.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lnp.contract.linearization import Array, GradientPass, Linearization, ratio, unit

LEAST_SAMPLES = 3
"""Samples that a batch has at least; a part of a larger batch may have fewer."""
TOO_FEW = "fewer than three samples tell nothing about their spread"
LEAST = 12
"""Samples at least that the jackknife leaves out one by one."""
INTERVAL = 2.0
"""Standard errors to each side in the interval of the noise scale."""


class Sums(NamedTuple):
    """Sums over N samples, whose weights w_n add up to N: w_n^2; ||sum_n G_n||^2; q_n; ||g_n||^2; tr Theta_nn."""

    spread: Any
    square: Any
    own: Any
    norm: Any
    trace: Any


class Samples(NamedTuple):
    """Of M samples, (M,) each: w_m; <G_m, sum_n G_n>; q_m; ||g_m||^2; tr Theta_mm."""

    weights: Any
    products: Any
    own: Any
    norm: Any
    trace: Any


class Contributions(NamedTuple):
    """What the N samples of a part contribute to the population's values of the whole, of g divided by its magnitude.

    The weights add up to N, and the products are those with the part's own gradient. The errors are the jackknife's of
    the part by itself: of rate, position (without that of the trace) and share of the rate.
    """

    spread: Any
    own: Any
    samples: Samples
    errors: tuple


@dataclass(frozen=True)
class Population:
    """Rate, position and gradient noise scale of the population that the batch was drawn from.

    Attributes
    ----------
    rate:
        ||grad L||^2 of the population, unbiased; may come out negative within its error.
    chi_pos:
        rate / (chi_loss chi_net), a ratio, and so not quite unbiased; may come out negative as well.
    noise_scale:
        tr Cov / ||grad L||^2, in samples: the batch size at which noise and gradient are equally large. Never negative;
        inf where the rate is not above zero.
    rate_stderr, chi_pos_stderr:
        Standard errors over samples.
    noise_scale_low, noise_scale_high:
        Two standard errors to each side, about 95%. The upper end is inf where the rate is within two standard errors
        of zero: then all that is known is that the noise scale is above the lower end.
    gradient_noise:
        tr Cov, the variance of single samples' gradients, rate * noise_scale: what to average over batches, together
        with the rate, for a noise scale of all of them.
    """

    rate: float
    chi_pos: float
    noise_scale: float
    rate_stderr: float
    chi_pos_stderr: float
    noise_scale_low: float
    noise_scale_high: float
    gradient_noise: float

    @property
    def noise_scale_stderr(self) -> Any:
        """A quarter of the interval, as if it had equal sides; inf where it is open. Prefer the interval."""
        return (self.noise_scale_high - self.noise_scale_low) / 4


def jackknife_size(samples: int) -> int:
    """Samples that the jackknife leaves out: their inner products with the gradient cost about as much as a pass.

    >>> [jackknife_size(samples) for samples in (8, 16, 64, 800)]
    [8, 12, 16, 200]
    """
    return min(samples, max(samples // 4, LEAST))


def possible(lin: Linearization) -> bool:
    """Whether the record can tell the samples' inner products with the gradient."""
    return lin.jvp is not None or (lin.gradient_pass is not None and lin.subset is not None)


def why_none(lin: Linearization, asked: bool | None, apart: bool, least: int = LEAST_SAMPLES) -> str:
    """Why the population's values cannot be had, or are not worth their cost; "" if they are, or are not asked for.

    `apart` says whether the estimator of the trace takes samples one at a time.
    """
    if asked is False:
        return ""
    if not (apart and lin.sample_square_norms is not None):
        return "the samples were not taken one at a time"
    if not lin.separable:
        return "it is not known whether the loss is a mean over samples; if it is, set loss.separable = True"
    if lin.outputs.shape[0] < least:
        return TOO_FEW
    if not (lin.cheap or asked):
        return "single samples are not cheap in this network; ask for population=True"
    return "" if possible(lin) else "the backend has no Jacobian-vector products"


def population(
    lin: Linearization, found: GradientPass, rate: Array, traces: Array, stderr: Array
) -> tuple[Population, Contributions]:
    """The population's values from a batch of N >= 3 samples that do not interact, and what these contribute where the
    batch is a part of a larger one. Pure, safe to trace and compile.

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
    xp, n, index = lin.xp, lin.outputs.shape[0], found.index
    norms = list(found.sample_square_norms.values())
    q = sum(norms[1:], start=norms[0])
    g, _ = unit(xp, lin.loss_gradient)  # as what was found
    g2 = xp.sum(g * g, axis=1)
    weights = _weights(lin, g2)
    sums = Sums(xp.sum(weights * weights), rate, xp.sum(q), xp.sum(g2), xp.sum(traces))
    # of the samples whose products are known
    some = [v if index is None else xp.take(v, index, axis=0) for v in (weights, q, g2, traces)]
    samples = Samples(some[0], found.products, *some[1:])
    errors = _jackknife(xp, n, left_out(xp, n, sums, samples)) if n > 1 else [sums.own * float("nan")] * 3
    values = assembled(xp, n, sums, errors, ratio(xp, stderr, sums.trace))
    return values, Contributions(sums.spread, sums.own, samples, tuple(errors))


def _jackknife(xp: Any, n: int, without: tuple) -> list[Array]:
    """Errors of values from those without single samples, (M,) each."""
    variances = [xp.sum((v - xp.mean(v)) ** 2) / (v.shape[0] - 1) for v in without]
    return [xp.sqrt((n - 1) ** 2 / n * variance) for variance in variances]


def whole(xp: Any, n: int, sums: Sums) -> tuple:
    """(rate, position, share of the rate in the mean squared gradient) of n samples."""
    return values_of(xp, n, n, n, sums)


def left_out(xp: Any, n: int, sums: Sums, samples: Samples) -> tuple:
    """The same three values without each of the samples, (M,) each."""
    w, products, q, g2, traces = samples
    rest = Sums(
        sums.spread - w * w,
        sums.square - 2 * products + q,
        sums.own - q,
        sums.norm - g2,
        sums.trace - traces,
    )
    return values_of(xp, n, n - 1, n - w, rest)


def values_of(xp: Any, n: int, count: int, total: Any, sums: Sums) -> tuple:
    """(rate, position, share of the rate in the mean q) from sums over `count` samples that weigh `total` of n."""
    rate = ratio(xp, n * n * (sums.square - sums.own), total * total - sums.spread)
    scale = (n / total) ** 2
    position = ratio(xp, ratio(xp, rate, scale * sums.norm), sums.trace)
    return rate, position, ratio(xp, rate, scale * count * sums.own)


def assembled(xp: Any, n: int, sums: Sums, errors: Sequence, probing: Any) -> Population:
    """The values of n samples from their sums, the jackknife's errors, and the relative error of the trace."""
    rate, position, share = whole(xp, n, sums)
    scale, low, high = _noise_scales(xp, share, errors[2], sums.spread / n)
    return Population(
        rate=rate,
        chi_pos=position,
        noise_scale=scale,
        rate_stderr=errors[0],
        chi_pos_stderr=xp.sqrt(errors[1] ** 2 + (position * probing) ** 2),
        noise_scale_low=low,
        noise_scale_high=high,
        gradient_noise=n * sums.own - sums.spread / n * rate,
    )


def _weights(lin: Linearization, like: Array) -> Array:
    """w_n, (N,), with a sum of N: what a sample weighs in the mean, or 1 where nothing is known."""
    if lin.sample_terms is None:
        return lin.xp.ones_like(like)
    weights = lin.xp.astype(lin.sample_terms, like.dtype)
    return ratio(lin.xp, weights, lin.xp.sum(weights) / like.shape[0])


def _noise_scales(xp: Any, share: Array, stderr: Array, spread: Array) -> tuple[Array, Array, Array]:
    """(noise scale, lower and upper end of its interval): 1 / share less spread, which is 1 for equal weights."""

    def scale(share: Array) -> Array:
        """1 / share - spread, at least 0; inf for a share that is not above zero, and nan for nan."""
        infinite = xp.where(share <= 0, xp.full_like(share, float("inf")), share)
        inverse = 1 / xp.where(share > 0, share, xp.ones_like(share)) - spread
        inverse = xp.where(inverse > 0, inverse, xp.zeros_like(inverse))
        return xp.where(share > 0, inverse, infinite)

    above_zero = xp.where(share < 0, xp.zeros_like(share), share)
    return scale(share), scale(above_zero + INTERVAL * stderr), scale(share - INTERVAL * stderr)
