"""lnp for PyTorch: `nn.Module`s, functions with parameters, Hugging Face models."""

from lnp_torch.backend import accepts, evaluate, linearize

__all__ = ["accepts", "evaluate", "linearize"]
