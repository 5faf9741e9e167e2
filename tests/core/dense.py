"""A record made of a dense Jacobian, over any array namespace."""

import numpy as np

from lnp import Linearization
from lnp.contract.linearization import Subset
from lnp.estimators.signs import Signs, seed_words


def network(samples=4, outputs=3, sizes=(5, 2), seed=0):
    """{name: (N, K, P) Jacobian} and the loss gradient (N, K)."""
    rng = np.random.default_rng(seed)
    jacobian = {f"layer{i}.weight": rng.normal(size=(samples, outputs, size)) for i, size in enumerate(sizes)}
    return jacobian, rng.normal(size=(samples, outputs))


def record(jacobian, gradient, xp=np, *, seed=0, terms=6, independent=True, dtype="float64", **changes):
    """The Linearization of outputs zero and L = <g, f>."""
    dense = {name: xp.asarray(array.astype(dtype)) for name, array in jacobian.items()}
    shape = gradient.shape

    def flat(name):
        return xp.reshape(dense[name], (shape[0] * shape[1], -1))

    def sample_square_norms(v):
        pulled = {name: xp.sum(array * v[:, :, None], axis=1) for name, array in dense.items()}
        return {name: xp.sum(array * array, axis=1) for name, array in pulled.items()}

    fields = {
        "xp": xp,
        "outputs": xp.asarray(np.zeros(shape, dtype)),
        "loss": xp.asarray(np.zeros((), dtype)),
        "loss_gradient": xp.asarray(gradient.astype(dtype)),
        "loss_terms": terms,
        "vjp": lambda v: {name: xp.reshape(v, (1, -1)) @ flat(name) for name in dense},
        "inner_products": lambda u, w: {name: xp.sum(u[name] * w[name]) for name in u},
        "signs": balanced(shape, seed, xp, dtype),
        "jvp": lambda u: xp.reshape(sum(flat(name) @ xp.reshape(u[name], (-1,)) for name in dense), shape),
        "sample_square_norms": sample_square_norms if independent else None,
    }
    return Linearization(**{**fields, **changes})


def balanced(shape, seed=0, xp=np, dtype="float64", width=0):
    """The core's signs."""
    return Signs(xp, seed_words(seed), shape, width, False, getattr(xp, dtype), xp.asarray)


def independent(shape, seed=0, xp=np, dtype="float64"):
    """Signs without a design."""

    def signs(index):
        drawn = np.random.default_rng((seed, int(index))).integers(0, 2, size=shape)
        return xp.asarray((2 * drawn - 1).astype(dtype))

    return signs


def drawn(jacobian, seed=0, xp=np):
    """The record's `subset`: samples drawn at random, with their own rows of the Jacobian."""
    shape = next(iter(jacobian.values())).shape[:2]

    def subset(size):
        index = balanced(shape, seed, xp).drawn(size)
        rows = {name: array[np.asarray(index)] for name, array in jacobian.items()}
        lin = record(rows, np.zeros((size, shape[1])), xp)
        return Subset(index, lin.sample_square_norms, lin.jvp)

    return subset


def kernel(jacobian, names=None):
    """Theta of some parameters."""
    flat = [array.reshape(-1, array.shape[-1]) for name, array in jacobian.items() if names is None or name in names]
    return sum(array @ array.T for array in flat)


def offdiagonal(matrix):
    """||matrix - diag||_F^2."""
    return float(np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
