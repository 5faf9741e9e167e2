"""`lnp demo`: a ladder of widths and one network with frozen features learn handwritten digits, and are watched
doing so.

The data: scikit-learn's 1,797 digits (8 x 8 pixels), each time shifted by up to one pixel and with noise added, so
that no image comes twice. The networks: one hidden layer of tanh units. The training: plain gradient descent, the
same batches for all. What is shown is measured in the run; whether the paper's effects appear is computed from it,
and printed either way.
"""

from lnp.demo.run import Settings, run

__all__ = ["Settings", "run"]
