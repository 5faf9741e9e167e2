"""Several batches, and parts of one: nested batches, and the Gram matrix of loss gradients."""

from lnp.batches.gram import GradientGram, gradient_gram
from lnp.batches.nested import NestedBatches, decompose_nested

__all__ = ["GradientGram", "NestedBatches", "decompose_nested", "gradient_gram"]
