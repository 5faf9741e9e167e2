"""Squared norms of single samples' gradients from the operations that use the parameters."""
