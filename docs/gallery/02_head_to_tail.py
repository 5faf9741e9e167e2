r"""chi_pos falls during training: learning moves from the head of the spectrum into its tail.

The paper claims that a network first learns along the dominant eigenmodes of its kernel, and later ever further in the
tail: chi_pos, the mean of the measure sum_i w_i delta(lambda_i) in units of the trace, falls by orders of magnitude.

This study trains a network on endlessly augmented digits (shifted, with noise) and takes the measure itself at
several steps, by Lanczos on the loss gradient of 8192 new images, beside the density of all eigenvalues from random
probes. Late in training the position of a batch is its sampling noise, so both the batch's and the population's are
shown.
"""

import numpy as np
import torch
from shared import plt, positive, save, schedule
from torch import nn
from torch.nn import functional as F

import lnp
import lnp.plot
from lnp.demo import data

STEPS, BATCH, RATE, WIDTH, MEASURED = 3000, 128, 0.2, 128, 8192
FRAMES = (0, 3, 30, 300, 3000)


def tensors(pair):
    """Images and labels for PyTorch."""
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1]).long()


def run(generator):
    """Train; (decompositions by step, spectra by step)."""
    images, labels = data.digits()
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    points, found, spectra = sorted({*schedule(STEPS, 20), *FRAMES}), {}, {}
    for step in range(STEPS + 1):
        if step in points:
            new = tensors(data.draw(images, labels, MEASURED, generator))
            found[step] = lnp.decompose(model, new, population=True)
            if step in FRAMES:
                spectra[step] = lnp.spectrum(model, new, steps=40, probes=3)
        x, y = tensors(data.draw(images, labels, BATCH, generator))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return found, spectra


def main():
    """Train, measure, draw."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found, spectra = run(np.random.default_rng(0))
    figure, axes = plt.subplot_mosaic([["factors", "density"], ["film", "film"]], figsize=(8.5, 6.6))
    steps = [max(step, 0.7) for step in found]
    for name, color in (("chi_loss", "C0"), ("chi_net", "C2"), ("chi_pos", "C3")):
        axes["factors"].loglog(
            steps, [getattr(d, name) for d in found.values()], ".-", color=color, label=f"$\\{name[:3]}_{{{name[4:]}}}$"
        )
    errors = [d.population.chi_pos_stderr for d in found.values()]
    positions = [d.population.chi_pos for d in found.values()]
    positive(axes["factors"], steps, positions, errors, color="k", label="$\\chi_{pos}$ of the population")
    axes["factors"].set(xlabel="step (0 at the left end)", title="the three factors")
    axes["factors"].legend(loc="lower right", bbox_to_anchor=(1, 0.2))
    lnp.plot.density(spectra, axes["density"]).set(ylabel="", title="all eigenvalues: share per decade")
    lnp.plot.spectrum(spectra, axes["film"]).set_title("where in the spectrum the loss falls")
    save(figure, "02_head_to_tail")
    for step, s in spectra.items():
        p = found[step].population
        print(
            f"step {step:4d}: loss {found[step].loss:.3f}, chi_pos {s.chi_pos:.2e} (population {p.chi_pos:.1e} ± "
            f"{p.chi_pos_stderr:.0e}), chi_net {found[step].chi_net:.0f}, eigenvalues above 0.1% of the trace carry "
            f"{s.share_above(1e-3 * s.trace):.2f} of the loss decrease and {s.weight_above(1e-3 * s.trace):.0e} of the "
            f"gradient; measure off by {s.moment_error:.0e}"
        )


if __name__ == "__main__":
    main()
