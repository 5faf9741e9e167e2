"""Random features learn a teacher in plain NumPy, with a gradient by hand. lnp adds a tracker, and a line to the loop.

pip install '.[plot]'
python docs/examples/numpy_loop.py [folder] [steps]
"""

import sys
from pathlib import Path

import numpy as np

import lnp
import lnp.plot
import lnp_numpy


def main(folder: Path, steps: int) -> lnp.Tracker:
    rng = np.random.default_rng(0)
    # directions of the inputs matter less and less: what is learnt late lies in the tail
    scale = np.arange(1, 33) ** -1.0
    teacher, projection = rng.standard_normal((32, 1)), rng.standard_normal((32, 256))
    weight, bias, rate = np.zeros((256, 1)), np.zeros(1), 5e-3

    def draw(samples: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.standard_normal((samples, 32)) * scale
        return inputs, inputs @ teacher

    schedule = lnp.schedule.log_windows(6, width=3, last=steps - 1)
    tracker = lnp.Tracker(folder / "numpy.jsonl", schedule, batch=draw(500), learning_rate=rate)
    for step in range(steps):
        model = lnp_numpy.RandomFeatureModel(weight, bias, projection)
        tracker.observe(step, model)
        inputs, targets = draw(128)
        features = model.features(inputs)
        mistake = 2 * (features @ weight + bias - targets) / targets.size
        weight, bias = weight - rate * features.T @ mistake, bias - rate * mistake.sum(axis=0)
    lnp.plot.dashboard(tracker, "NumPy").savefig(folder / "numpy.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
