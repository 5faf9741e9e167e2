r"""Random features: everything in closed form.

The paper claims that -dL/dt = chi_loss chi_net chi_pos, and that learning runs down the kernel's spectrum, so that
chi_pos falls. Where the features are fixed, so is the kernel, and gradient descent is solved: with residual r = f - y,
loss ||r||^2 / N, learning rate eta and Theta = sum_i lambda_i u_i u_i^T,

    <u_i, r_t> = (1 - 2 eta lambda_i / N)^t <u_i, r_0>,   w_i(t) = <u_i, r_t>^2 / ||r_t||^2,
    chi_pos(t) = sum_i w_i(t) lambda_i / tr Theta

This study trains random-feature models of several widths on one batch, measures with `lnp.decompose` and
`lnp.spectrum`, and lays the measurements on these curves.
"""

import numpy as np
from shared import plt, save, schedule, shades

import lnp
import lnp.plot
import lnp_numpy

SAMPLES, INPUTS, WIDTHS, STEPS = 400, 8, (25, 100, 400, 1600), 30_000
ROUNDING = 1e-10
"""Below this position nothing is left to learn, and the gradient is a difference of almost equal numbers."""
SHOWN = (0, 10, 100, 1000, 10_000)


def task(generator):
    """Points on a sphere, and a function of them with parts of many frequencies."""
    x = generator.standard_normal((SAMPLES, INPUTS))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    directions = generator.standard_normal((INPUTS, 30))
    return x, np.sum(np.sin(2.0 * x @ directions) / np.arange(1, 31), axis=1, keepdims=True)


def model(width, generator):
    """tanh features, scaled so that the kernel does not grow with their number."""
    return lnp_numpy.RandomFeatureModel(
        weight=np.zeros((width, 1)),
        projection=2.0 * generator.standard_normal((INPUTS, width)),
        activation=lambda z: np.tanh(z) / np.sqrt(width),
    )


def descend(net, batch, rate, steps):
    """(step, model) at each of the steps of gradient descent."""
    features, weight, done = net.features(batch[0]), net.weight, 0
    for step in steps:
        for _ in range(step - done):
            weight = weight - rate * 2 / SAMPLES * features.T @ (features @ weight - batch[1])
        done = step
        yield step, lnp_numpy.RandomFeatureModel(weight, projection=net.projection, activation=net.activation)


def solution(net, batch, rate, steps):
    """(loss, chi_pos) at the steps, by formula."""
    features = net.features(batch[0])
    values, vectors = np.linalg.eigh(features @ features.T)
    shrunk = (1 - 2 * rate * values / SAMPLES) ** (2 * np.asarray(steps)[:, None])
    parts = shrunk * (vectors.T @ -batch[1]).T ** 2
    return parts.sum(axis=1) / SAMPLES, parts @ values / parts.sum(axis=1) / values.sum()


def main():
    """Train, measure, compare, draw."""
    generator = np.random.default_rng(0)
    batch = task(generator)
    figure, axes = plt.subplot_mosaic([["loss", "position"], ["film", "film"]], figsize=(8.5, 6.2))
    grid, steps = np.geomspace(1, STEPS, 300), schedule(STEPS, 22)
    for width, color in zip(WIDTHS, shades(len(WIDTHS)), strict=True):
        net = model(width, generator)
        rate = 0.4 * SAMPLES / np.linalg.norm(net.features(batch[0]), 2) ** 2
        measured = [lnp.decompose(now, batch, "mse") for _, now in descend(net, batch, rate, steps)]
        expected = np.transpose(solution(net, batch, rate, steps))
        errors = [
            max(abs(d.loss / loss - 1), abs(d.chi_pos / position - 1))
            for d, (loss, position) in zip(measured, expected, strict=True)
            if position > ROUNDING
        ]
        print(f"{width:5d} features: measured and theory differ by at most {max(errors):.0e} (relative); ", end="")
        print(f"chi_pos {measured[0].chi_pos:.3f} -> {measured[-1].chi_pos:.1e}, loss {measured[-1].loss:.3g}")
        for name, line in zip(("loss", "position"), solution(net, batch, rate, grid), strict=True):
            axes[name].loglog(grid, line, color=color, label=f"{width} features")
        axes["loss"].plot(steps[1:], [d.loss for d in measured[1:]], ".", color=color)
        axes["position"].plot(steps[1:], [d.chi_pos for d in measured[1:]], ".", color=color)
    axes["loss"].set(xlabel="step", ylabel="loss", title="dots: measured; lines: theory")
    axes["position"].set(xlabel="step", ylabel="$\\chi_{pos}$", title="spectral position")
    axes["position"].set_ylim(1e-8, 1)
    axes["position"].legend()
    spectra = {step: lnp.spectrum(now, batch, "mse", steps=40) for step, now in descend(net, batch, rate, SHOWN)}
    lnp.plot.spectrum(spectra, axes["film"]).set_title("where in the spectrum the loss falls")
    save(figure, "01_random_features")


if __name__ == "__main__":
    main()
