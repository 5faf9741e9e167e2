r"""Optimizer and parametrization: SGD and Adam, standard and mu-parametrization, side by side.

The paper names optimizer and architecture as the ways to reach further, since feature learning is what sustains
progress in the tail. This study asks how position and network scale depend on the optimizer, and on how initial weights
and learning rates go with the width. In the mu-parametrization (Yang and Hu, arXiv 2011.14522; Yang et al., arXiv
2203.03466) features move as much in wide networks as in narrow ones; in the standard one they move the less, the wider
the network is.

It is written here with factors in front of the weights, so that plain gradient descent has one learning rate, and the
kernel that `lnp.decompose` measures is the one that SGD follows. Adam follows another one, and is measured with the
plain one all the same.
"""

import torch
from shared import plt, positive, save, schedule, shades
from teacher import CLASSES, INPUTS, Teacher, loss_of
from torch import nn

import lnp

WIDTHS, STEPS, BATCH, MEASURED = (32, 128, 512), 1000, 256, 4096
RATES = {"SGD": 0.1, "Adam": 1e-3}


class Student(nn.Module):
    """Two hidden layers; `ratio` is the width over the narrowest one's, or 1 in the standard parametrization."""

    def __init__(self, width, ratio, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(a, b, std):
            return nn.Parameter(std * torch.randn(a, b, generator=generator))

        self.grow, self.shrink = ratio**0.5, ratio**-0.5
        self.first, self.bias = draw(INPUTS, width, INPUTS**-0.5 * self.shrink), nn.Parameter(torch.zeros(width))
        self.hidden, self.second_bias = draw(width, width, width**-0.5), nn.Parameter(torch.zeros(width))
        self.last, self.last_bias = draw(width, CLASSES, width**-0.5), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        """Logits."""
        h = torch.tanh(self.grow * (x @ self.first + self.bias))
        h = torch.tanh(h @ self.hidden + self.grow * self.second_bias)
        return self.shrink * (h @ self.last) + self.last_bias

    def adam_rates(self, rate):
        """Parameter groups: Adam's steps have a size of their own, so that each kind of weight needs its own rate."""
        groups = {
            rate * self.shrink: [self.first, self.bias, self.second_bias, self.last],
            rate * self.shrink**2: [self.hidden],
            rate: [self.last_bias],
        }
        if self.shrink == 1:
            return [{"params": list(self.parameters()), "lr": rate}]
        return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def run(optimizer, mu, width, seed=0):
    """([(step, Decomposition)], relative change of the first hidden layer's outputs)."""
    teacher, generator = Teacher(), torch.Generator().manual_seed(seed)
    model = Student(width, width / WIDTHS[0] if mu else 1.0, seed)
    if optimizer == "SGD":
        updates = torch.optim.SGD(model.parameters(), RATES["SGD"])
    else:
        updates = torch.optim.Adam(model.adam_rates(RATES["Adam"]))
    probe = teacher.draw(1000, generator)[0]

    def features():
        return torch.tanh(model.grow * (probe @ model.first + model.bias)).detach()

    before, points, found = features(), schedule(STEPS, 12), []
    for step in range(STEPS + 1):
        if step in points:
            found.append((step, lnp.decompose(model, teacher.draw(MEASURED, generator), population=True, seed=step)))
        updates.zero_grad()
        loss_of(model, teacher.draw(BATCH, generator)).backward()
        updates.step()
    return found, float((features() - before).norm() / before.norm())


def main():
    """Train all, draw, tell."""
    torch.set_num_threads(1)
    kinds = [(optimizer, mu) for optimizer in RATES for mu in (False, True)]
    figure, axes = plt.subplots(3, len(kinds), figsize=(11, 7.2), sharex=True, sharey="row")
    for column, (optimizer, mu) in zip(axes.T, kinds, strict=True):
        name = f"{optimizer}, {'mu' if mu else 'standard'}"
        for width, color in zip(WIDTHS, shades(len(WIDTHS)), strict=True):
            found, moved = run(optimizer, mu, width)
            steps = [max(step, 0.7) for step, _ in found]
            column[0].plot(steps, [d.loss for _, d in found], color=color, label=f"width {width}")
            column[1].plot(steps, [d.chi_net for _, d in found], color=color)
            parts = [d.population for _, d in found]
            errors = [p.chi_pos_stderr for p in parts]
            positive(column[2], steps, [p.chi_pos for p in parts], errors, color=color)
            r = lnp.reach([step for step, _ in found], [p.chi_pos for p in parts], errors, window=4)
            first, last = found[0][1], found[-1][1]
            print(
                f"{name:15} width {width:3d}: loss {last.loss:.3f}, chi_net {first.chi_net:8.1f} x "
                f"{last.chi_net / first.chi_net:5.2f}, reach {r.chi_pos:.1e} ± {r.stderr:.0e}, "
                f"features moved by {moved:.3f}",
                flush=True,
            )
        column[0].set(title=name, xscale="log", yscale="log")
        column[1].set(yscale="log")
        column[2].set(yscale="log", xlabel="step")
    for axis, label in zip(axes[:, 0], ("loss", "$\\chi_{net}$", "$\\chi_{pos}$ of the population"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend()
    save(figure, "06_optimizer_and_parametrization")


if __name__ == "__main__":
    main()
