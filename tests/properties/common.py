"""Random networks, and what must hold for each of them in every framework."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

import lnp
from lnp.contract.linearization import device_of
from lnp.testing import Loss, Scenario, Truth

FACTORS = ("chi_loss", "chi_net", "chi_pos")
EPSILON = 0.1  # of the normalisation: large, so that the third derivative along the gradient stays moderate
TOLERANCE = {"float64": 4 * 2.0**-26, "float32": 4 * 2.0**-11.5}
"""4 sqrt(eps)."""


@dataclass(frozen=True)
class Network:
    """Dense layers with an activation, a layer normalisation and a residual connection around each hidden one."""

    widths: tuple[int, ...]
    activation: str
    bias: bool
    normalise: bool
    residual: bool

    @property
    def hidden(self):
        return range(len(self.widths) - 2)

    def parameters(self, rng):
        """{name: array}, in the order of use."""
        drawn = {}
        for i, (rows, columns) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            drawn[f"layer{i}.weight"] = rng.normal(size=(rows, columns)) / rows**0.5
            if self.bias:
                drawn[f"layer{i}.bias"] = rng.normal(size=columns)
            if self.normalise and i in self.hidden:
                drawn[f"norm{i}.weight"] = 1 + 0.1 * rng.normal(size=columns)
        return drawn

    def skips(self, i):
        return self.residual and self.widths[i] == self.widths[i + 1]

    def __call__(self, xp, p, x):
        for i in self.hidden:
            z = x @ p[f"layer{i}.weight"]
            if self.bias:
                z = z + p[f"layer{i}.bias"]
            if self.normalise:
                z = z - xp.mean(z, axis=-1, keepdims=True)
                z = z / xp.sqrt(xp.mean(z * z, axis=-1, keepdims=True) + EPSILON) * p[f"norm{i}.weight"]
            z = ACTIVATIONS[self.activation](xp, z)
            x = x + z if self.skips(i) else z
        last = len(self.widths) - 2
        x = x @ p[f"layer{last}.weight"]
        return x + p[f"layer{last}.bias"] if self.bias else x

    def jacobian(self, p, x):
        """By forward accumulation: d h / d parameter for each parameter so far, (N, width, *parameter's shape)."""
        tangents = {}
        for i in range(len(self.widths) - 1):
            before = dict(tangents), x
            weight = p[f"layer{i}.weight"]
            eye = np.eye(weight.shape[1])
            tangents = {name: np.einsum("ni...,ij->nj...", t, weight) for name, t in tangents.items()}
            tangents[f"layer{i}.weight"] = np.einsum("ni,jk->njik", x, eye)
            x = x @ weight
            if self.bias:
                tangents[f"layer{i}.bias"] = np.broadcast_to(eye, (len(x), *eye.shape))
                x = x + p[f"layer{i}.bias"]
            if i not in self.hidden:
                break
            if self.normalise:
                tangents, x = normalised(tangents, x, p[f"norm{i}.weight"], f"norm{i}.weight")
            slope = SLOPES[self.activation](x)
            tangents = {name: over(slope, t) * t for name, t in tangents.items()}
            x = ACTIVATIONS[self.activation](np, x)
            if self.skips(i):
                tangents = {name: t + before[0].get(name, 0) for name, t in tangents.items()}
                x = x + before[1]
        return {name: tangents[name] for name in p}


def normalised(tangents, z, gain, name):
    z = z - z.mean(axis=1, keepdims=True)
    deviation = np.sqrt(np.mean(z**2, axis=1, keepdims=True) + EPSILON)
    y = z / deviation
    moved = {}
    for key, t in tangents.items():
        centred = t - t.mean(axis=1, keepdims=True)
        along = np.mean(over(y, t) * centred, axis=1, keepdims=True)
        moved[key] = over(gain / deviation, t) * (centred - over(y, t) * along)
    moved[name] = np.einsum("nj,jk->njk", y, np.eye(len(gain)))
    return moved, y * gain


def over(array, tangent):
    """(N, width) as a factor of (N, width, ...)."""
    return array.reshape(*array.shape, *[1] * (tangent.ndim - 2))


ACTIVATIONS = {
    "tanh": lambda xp, z: xp.tanh(z),
    "sin": lambda xp, z: xp.sin(z),
    "softplus": lambda xp, z: xp.log1p(xp.exp(z)),
    "relu": lambda xp, z: xp.where(z > 0, z, xp.zeros_like(z)),
}
SLOPES = {
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "sin": np.cos,
    "softplus": lambda z: 1 / (1 + np.exp(-z)),
    "relu": lambda z: 1.0 * (z > 0),
}


@st.composite
def scenarios(
    draw, activations=tuple(ACTIVATIONS), losses=("mse", "cross_entropy"), residual=True, dtypes=("float64",)
):
    hidden = draw(st.lists(st.integers(3, 5), max_size=2))
    outputs, samples = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    loss = draw(st.sampled_from(losses)) if outputs > 1 else "mse"
    network = Network(
        (draw(st.integers(1, 4)), *hidden, outputs),
        draw(st.sampled_from(activations)),
        draw(st.booleans()),
        draw(st.booleans()),
        residual and draw(st.booleans()),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inputs = rng.normal(size=(samples, network.widths[0]))
    if loss == "mse":
        targets = rng.normal(size=(samples, outputs))
    else:
        targets = draw(st.sampled_from([rng.integers(0, outputs, samples), rng.dirichlet(np.ones(outputs), samples)]))
    scenario = Scenario(f"{network}", network.parameters(rng), inputs, targets, loss, network, network.jacobian)
    return scenario.cast(draw(st.sampled_from(dtypes)))


def measure(kit, scenario, **options):
    return kit.measure(scenario, **{"estimator": "exact", **options})


def agree(actual, expected, tolerance=TOLERANCE["float64"]):
    """Relative to the expected value; positions also to an absolute 1e-12, what cancellation in J^T g leaves.

    Where no unit is active J = 0, and positions are nan.
    """
    actual, expected = float(actual), float(expected)
    assert np.isnan(actual) == np.isnan(expected), (actual, expected)
    assert np.isnan(expected) or abs(actual - expected) <= tolerance * abs(expected) + 1e-12, (actual, expected)


def same_factors(a, b, names=FACTORS, tolerance=TOLERANCE["float64"]):
    for name in names:
        agree(getattr(a, name), getattr(b, name), tolerance)


def product_is_the_measured_change(kit, scenario):
    """(L(theta - eta grad) - L(theta + eta grad)) / (2 eta) = -chi_loss chi_net chi_pos + O(eta^2).

    The steps are 0.005 and 0.0025 long. Halving divides the error by four, up to 5% for the next order, above a
    floor: a millionth of the rate, and the rounding of the losses, 30 eps L / eta. Extrapolated to eta = 0 nothing
    else is left.
    """
    d = measure(kit, scenario)
    rate = float(d.chi_loss) * float(d.chi_net) * float(d.chi_pos)
    if not rate > 1e-12:
        return  # g = 0 or J^T g = 0
    model, batch = kit.build(scenario)

    def slope(eta):
        forth, back = (
            lnp.measured_loss_change(model, batch, scenario.loss, learning_rate=sign * eta) for sign in (1, -1)
        )
        return (forth - back) / (2 * eta)

    eta = 0.005 / rate**0.5
    floor = 1e-6 * rate + 30 * 2.0**-52 * (1 + abs(float(d.loss))) / eta
    whole, half = slope(eta) + rate, slope(eta / 2) + rate
    assert abs(whole - 4 * half) <= 0.05 * abs(whole) + 5 * floor, (whole, half, rate)
    assert abs(whole - 4 * half) / 3 <= 5 * floor, (whole, half, rate)
    assert abs(whole) <= 0.05 * rate + floor, (whole, rate)


def position_is_that_of_the_dense_kernel(kit, scenario):
    """g'Kg / (g'g tr K) with K from the record's own pull-backs; at most lambda_max / tr K."""
    dtype = str(scenario.inputs.dtype)
    tolerance, truth, lin = TOLERANCE[dtype], Truth(scenario), kit.record(scenario)
    d = measure(kit, scenario)
    units = np.eye(truth.outputs.size).reshape(-1, *truth.shape)
    device = device_of(lin.outputs)
    pulled = [lin.vjp(lin.xp.asarray(unit, dtype=lin.outputs.dtype, device=device)) for unit in units]
    kernel = np.array([[sum(map(float, lin.inner_products(a, b).values())) for b in pulled] for a in pulled])
    np.testing.assert_allclose(kernel, truth.kernel(), rtol=0, atol=tolerance * np.abs(truth.kernel()).max())
    g = np.asarray(kit.to_numpy(lin.loss_gradient), "float64").reshape(-1)
    np.testing.assert_allclose(g, truth.gradient.reshape(-1), rtol=0, atol=tolerance * np.abs(g).max())
    agree(d.chi_net, np.trace(kernel) / truth.terms, tolerance)
    agree(d.chi_loss, truth.terms * g @ g, tolerance)
    if not kernel.any():
        assert np.isnan(float(d.chi_pos))
        return
    expected = g @ kernel @ g / (g @ g) / np.trace(kernel)
    assert abs(float(d.chi_pos) - expected) <= tolerance
    highest = np.linalg.eigvalsh(truth.kernel())[-1] / np.trace(truth.kernel())
    assert 0 <= float(d.chi_pos) <= highest + tolerance


def scaling_the_loss_scales_chi_loss_alone(kit, scenario):
    """L -> c L multiplies chi_loss by c^2."""
    base = BY_HAND[scenario.loss]
    targets = scenario.targets
    if np.issubdtype(targets.dtype, np.integer):
        targets = np.eye(Truth(scenario).shape[1])[targets]
    scenario = replace(scenario, targets=targets)
    scaled = [
        Loss(lambda xp, f, y, c=c: c * base.value(xp, f, y), lambda f, y, c=c: c * base.gradient(f, y))
        for c in (1.0, -3.0)
    ]
    one, three = (measure(kit, scenario, loss=kit.loss(loss), loss_terms=7) for loss in scaled)
    agree(three.chi_loss, 9 * float(one.chi_loss))
    same_factors(three, one, ("chi_net", "chi_pos"))
    named = measure(kit, scenario, loss_terms=7)
    same_factors(one, named)
    agree(one.loss, named.loss)


def cross_entropy(xp, f, y):
    return -xp.mean(xp.sum(y * (f - xp.log(xp.sum(xp.exp(f), axis=-1, keepdims=True))), axis=-1))


def cross_entropy_gradient(f, y):
    p = np.exp(f) / np.exp(f).sum(axis=-1, keepdims=True)
    return (p * y.sum(axis=-1, keepdims=True) - y) / len(f)


BY_HAND = {
    "mse": Loss(lambda xp, f, y: xp.mean((f - y) ** 2), lambda f, y: 2 * (f - y) / f.size),
    "cross_entropy": Loss(cross_entropy, cross_entropy_gradient),
}


def rotated_outputs_change_nothing(kit, scenario):
    """Outputs and targets times an orthogonal matrix, mean squared error."""
    size = scenario.targets.shape[1]
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    last = [name for name in scenario.parameters if name.startswith(f"layer{len(scenario.apply.widths) - 2}.")]
    parameters = {name: p @ q if name in last else p for name, p in scenario.parameters.items()}
    turned = replace(scenario, parameters=parameters, targets=scenario.targets @ q)
    same_factors(measure(kit, turned), measure(kit, scenario), (*FACTORS, "loss"))


def order_changes_nothing(kit, scenario):
    """Samples, hidden units and parameters in another order. Networks without residual connections."""
    rng = np.random.default_rng(1)
    samples = rng.permutation(len(scenario.inputs))
    parameters = dict(reversed(scenario.parameters.items()))
    for i in scenario.apply.hidden:
        units = rng.permutation(scenario.apply.widths[i + 1])
        for name in (f"layer{i}.weight", f"layer{i}.bias", f"norm{i}.weight"):
            if name in parameters:
                parameters[name] = parameters[name][..., units]
        parameters[f"layer{i + 1}.weight"] = parameters[f"layer{i + 1}.weight"][units]
    inputs, targets = scenario.inputs[samples], scenario.targets[samples]
    shuffled = replace(scenario, parameters=parameters, inputs=inputs, targets=targets)
    same_factors(measure(kit, shuffled), measure(kit, scenario), (*FACTORS, "loss"))


def repeating_the_batch_changes_nothing(kit, scenario):
    """Every sample three times: n grows with it."""
    inputs, targets = (np.concatenate([array] * 3) for array in (scenario.inputs, scenario.targets))
    repeated = measure(kit, replace(scenario, inputs=inputs, targets=targets))
    once = measure(kit, scenario)
    same_factors(repeated, once, (*FACTORS, "loss", "rate"))
    assert float(repeated.loss_terms) == 3 * float(once.loss_terms)


def layers_recombine(kit, scenario):
    """chi_pos = sum_l (chi_net_l / chi_net) chi_pos_l; rates and network scales add up."""
    for estimator in ("exact", "joint"):
        d = measure(kit, scenario, by_layer=True, estimator=estimator, max_probes=2)
        assert set(d.layers) == {name.partition(".")[0] for name in scenario.parameters}
        parts = d.layers.values()
        agree(sum(float(part.rate) for part in parts), d.rate)
        agree(sum(float(part.chi_net) for part in parts), d.chi_net)
        present = [part for part in parts if float(part.chi_net) > 0]
        weighted = sum(float(part.chi_net) * float(part.chi_pos) for part in present)
        agree(weighted / float(d.chi_net) if present else np.nan, d.chi_pos)


SMOOTH = ("tanh", "sin", "softplus")
PROPERTIES = (
    (product_is_the_measured_change, scenarios(activations=SMOOTH)),
    (position_is_that_of_the_dense_kernel, scenarios(dtypes=("float64", "float32"))),
    (scaling_the_loss_scales_chi_loss_alone, scenarios()),
    (rotated_outputs_change_nothing, scenarios(losses=("mse",))),
    (order_changes_nothing, scenarios(residual=False)),
    (repeating_the_batch_changes_nothing, scenarios()),
    (layers_recombine, scenarios()),
)
"""What holds, and the scenarios for which it does."""

NAMES = [holds.__name__ for holds, _ in PROPERTIES]
