"""Probes balanced over samples, in pairs that swap vectors: what samples have in common cancels, and is no error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from lnp.contract.linearization import Array, device_of
from lnp.estimators import errors
from lnp.estimators.errors import Error
from lnp.estimators.independent import TRUSTED, Independent, State
from lnp.estimators.probe import compute_if, pilot_size
from lnp.estimators.signs import Signs


@dataclass(frozen=True)
class Swapped(Independent):
    """Probes balanced over samples, in pairs: in the second one neighbours swap their vectors."""

    step = 2

    @property
    def signs(self) -> Signs:
        """Those of the record, which are balanced."""
        assert isinstance(self.lin.signs, Signs), "probe_to_tolerance takes this scheme only then"
        return self.lin.signs

    @property
    def least(self) -> int:
        """Probes whose error may be trusted: two of N samples have N / 2 degrees of freedom at most."""
        return 2 * -(-TRUSTED // (self.probe.groups // 2))

    def first(self) -> tuple[State, Error, Array]:
        """One probe of all samples where a pilot says that it is enough, or their spread, else a pair of them."""
        xp, pair = self.lin.xp, self.signs.pairs(0)
        values = self.probe.square_norms(pair.first)
        error = self._by_pilot(values, pair.second) if self.piloted else errors.across_groups(xp, values)
        enough, nothing = self.suffices(values, error), (xp.zeros_like(values), xp.zeros_like(values))
        if self.max_probes == 1:
            return (1, values, *nothing), error, enough
        swapped = partial(self.probe.square_norms, pair.second)
        (second,) = compute_if(self.lin, xp.logical_not(enough), lambda: (swapped(),), (values,))
        return self._joined((0, 0.0, *nothing), values, second, pair.partner), error, enough

    def turn(self, state: State) -> State:
        """The state after two more probes."""
        pair = self.signs.pairs(state[0] // 2)
        first, second = (self.probe.square_norms(v) for v in (pair.first, pair.second))
        return self._joined(state, first, second, pair.partner)

    def error(self, state: State) -> Error:
        """Of an even number of probes."""
        xp, (count, mean, squares, own) = self.lin.xp, state
        signs, groups = self.signs, self.probe.groups
        rounds, probes = count // 2, self.factor(count)
        used = self.factor((groups + groups % 2) * rounds % signs.block)
        shared = errors.common_noise(signs.block, used) * 4 / (probes * probes)
        pairs = self.factor(groups // 2 * rounds)
        found = errors.of_swaps(
            xp, squares, own, pairs=pairs, samples=groups, block=signs.block, probes=probes, shared=shared
        )
        return errors.no_freer_than(xp, found, mean, 0.5 * probes)

    def _by_pilot(self, values: Array, second: Array) -> Error:
        """The error of one probe of all samples, by pairs among some of them that have swapped their vectors."""
        assert self.probe.pilot is not None, "a pilot was found to be there"
        xp, signs, groups, pilot = self.lin.xp, self.signs, self.probe.groups, self.probe.pilot()
        size = pilot_size(groups)
        some, others = xp.take(values, pilot.index, axis=1), pilot.square_norms(second)
        both, own = self._swaps(some - others, signs.drawn_partners(size))
        shared = errors.common_noise(signs.block, groups % signs.block)
        found = errors.of_swaps(
            xp, both, own, pairs=size // 2, samples=groups, block=signs.block, probes=1, shared=shared
        )
        scaled = replace(found, variance=found.variance * errors.scaled_up(xp, values, some) * (size / groups))
        return errors.no_freer_than(xp, scaled, values, 1)

    def _joined(self, state: tuple, first: Array, second: Array, partner: Array) -> State:
        """The state with a pair of probes more."""
        count, mean, squares, own = state
        both, alone = self._swaps(first - second, partner)
        mean = mean + (0.5 * (first + second) - mean) * (2 / self.factor(count + 2))
        return count + 2, mean, squares + both, own + alone

    def _swaps(self, difference: Array, partner: Array) -> tuple[Array, Array]:
        """(R, M) squares of d_n + d_n', and of d_n, of differences d (R, M); samples without a partner add nothing."""
        xp = self.lin.xp
        own_place = xp.astype(xp.arange(partner.shape[0], device=device_of(difference)), partner.dtype)
        paired = xp.astype(partner != own_place, difference.dtype)
        both = (difference + xp.take(difference, partner, axis=1)) * paired
        return both * both, difference * difference * paired
