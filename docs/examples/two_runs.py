"""Two runs, one question: two networks learn handwritten digits, one of them with frozen features. Why is it slower?

pip install '.[torch]' scikit-learn
python docs/examples/two_runs.py [folder] [steps]
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import lnp

STEPS = (0, 10, 100, 316)
LOSSES = (2.0, 1.0, 0.4)


def train(path: Path, steps: int, frozen: bool) -> lnp.History:
    """What a tracker saw of one run, on 800 digits that neither run trains on."""
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float()
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    held_out, trained = order[:800], order[800:]
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model[0].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    schedule = lnp.schedule.log_windows(8, width=3, last=steps - 1)
    batch = images[held_out], labels[held_out]
    with lnp.Tracker(path, schedule, batch=batch, learning_rate=optimizer) as tracker:
        for step in range(steps):
            tracker.observe(step, model)
            index = trained[torch.randint(len(trained), (64,))]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return tracker.history


def ratio(slow: dict, fast: dict, column: str) -> str:
    """One value divided by the other, with a standard error where both have one."""
    if column not in fast:  # the first measurement has no net rate
        return "-"
    found, error = slow[column] / fast[column], f"{column}_stderr"
    if error not in fast:
        return f"{found:.2f}"
    relative = ((slow[error] / slow[column]) ** 2 + (fast[error] / fast[column]) ** 2) ** 0.5
    return f"{found:.2f} ± {abs(found) * relative:.1g}"


def show(title: str, columns: list[str], pairs: list[tuple[dict, dict]]) -> None:
    """A line for each pair of rows: steps, losses, and the ratios of the columns."""
    print(f"\n{title}\n{'steps':>9}{'losses':>14}", *(f"{column:>21}" for column in columns))
    for slow, fast in pairs:
        steps, losses = f"{slow['step']}, {fast['step']}", f"{slow['loss']:.3f}, {fast['loss']:.3f}"
        print(f"{steps:>9}{losses:>14}", *(f"{ratio(slow, fast, column):>21}" for column in columns))


def main(folder: Path, steps: int) -> None:
    fast = train(folder / "all_layers.jsonl", steps, frozen=False).rows()
    slow = train(folder / "frozen.jsonl", steps, frozen=True).rows()
    by_step = {row["step"]: row for row in fast}
    same_step = [(row, by_step[row["step"]]) for row in slow if row["step"] in STEPS]
    nearest = [[min(rows, key=lambda row: abs(row["loss"] - loss)) for rows in (slow, fast)] for loss in LOSSES]
    scales = ["chi_loss", "chi_net"]
    population, net = ["population/rate", *scales, "population/chi_pos"], ["net/rate", *scales, "net/chi_pos"]
    show("frozen / all layers, at the same step, to first order", population, same_step)
    show("frozen / all layers, at the same step, as the loss really fell", net, same_step)
    show("frozen / all layers, at the same loss, as the loss really fell", net, nearest)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
