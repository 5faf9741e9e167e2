"""Squared norms of single samples' gradients, for every framework."""
