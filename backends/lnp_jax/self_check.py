"""Verdicts on models, found out once for each structure and shape, and remembered."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract import validation
from lnp.contract.options import Options
from lnp_jax.apart import INTERACT, Differences, Verdict, compared, impossible, irregular
from lnp_jax.bound_model import Network, prepared
from lnp_jax.model import Arrays, Structure

REMEMBERED = 256
_VERDICTS: OrderedDict[Any, Verdict] = OrderedDict()


def judged(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict:
    """Whether the samples of this model, at these shapes, can be taken apart.

    The comparison is made at the parameters as they are, and once more with noise added to them: a path that is
    closed now, by a gate at zero, may open later in the training.
    """
    remembered = known(structure, arrays, batch, options)
    if remembered is not None:
        return remembered
    inputs, how, key = _case(structure, arrays, batch, options)
    reason = impossible(prepared(structure, arrays, inputs, how))
    found = [] if reason else [jax.device_get(_differences(structure, how, arrays, inputs, noise)) for noise in (0, 1)]
    verdict = Verdict(reason)
    for differences in found:
        other = differences.verdict()
        verdict = Verdict(verdict.reason or other.reason, verdict.excluded | other.excluded)
    if reason or verdict.reason or found[0].finite:  # what is not finite shows nothing
        _remember(key, verdict)
    return verdict


def interacting(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict:
    """The verdict on samples that gave other outputs on their own than in the batch when they were measured. It holds
    from then on: what couples them may be closed again in the next batch's outputs, and still be open in its gradients.
    """
    verdict = Verdict(INTERACT.format("on this batch or one before, they give other outputs on their own"))
    _remember(_case(structure, arrays, batch, options)[2], verdict)
    return verdict


def _remember(key: tuple, verdict: Verdict) -> None:
    _VERDICTS[key] = verdict
    while len(_VERDICTS) > REMEMBERED:
        _VERDICTS.popitem(last=False)


def known(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict | None:
    """What was found out before about this model at these shapes, or None. Needs no values, so that it is there for
    what is traced too.
    """
    key = _case(structure, arrays, batch, options)[2]
    if key not in _VERDICTS:
        return None
    _VERDICTS.move_to_end(key)
    return _VERDICTS[key]


def _case(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> tuple[Any, Options, tuple]:
    """(inputs, the options that matter, what the verdict is found by)."""
    inputs, _ = validation.unpack(batch)
    how = Options(microbatch=options.microbatch, batch_statistics=options.batch_statistics)
    leaves, treedef = jax.tree.flatten((arrays, inputs))
    return inputs, how, (structure, how, treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))


def traced(arrays: Any) -> bool:
    """Whether this runs inside a compiled function: some arrays have no value, or what is made of them has none."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in (*jax.tree.leaves(arrays), jnp.zeros(())))


@partial(jax.jit, static_argnums=(0, 1))
def _differences(structure: Structure, options: Options, arrays: Arrays, inputs: Any, noise: Any) -> Differences:
    net = prepared(structure, arrays, inputs, options)
    size = None if options.microbatch is None else max(2, options.microbatch)
    return compared(_moved(net, noise), size)


def _moved(net: Network, noise: Any) -> Network:
    """The network with irregular numbers on its parameters: of a tenth of their size, and a tenth."""
    moved = {}
    for number, (name, p) in enumerate(net.parameters.items()):
        size = 0.1 * jnp.sqrt(jnp.mean(jnp.square(p.astype(jnp.float32)))) + 0.1
        moved[name] = p + (noise * size * irregular(p.shape, number)).astype(p.dtype)
    return net.at(moved)
