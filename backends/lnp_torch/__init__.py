"""lnp for PyTorch: `nn.Module`s, functions with parameters, Hugging Face models."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("lnp_torch needs PyTorch, which is not installed. Run: pip install 'lnp[torch]'") from error

from lnp_torch.backend import accepts, evaluate, linearize
from lnp_torch.collectives import alone
from lnp_torch.group import Group, group_of, needs_all, process_number
from lnp_torch.optimizers import step_size
from lnp_torch.refusals import refusal
from lnp_torch.state_guard import untouched
from lnp_torch.training_step import shared
from lnp_torch.updates import difference, replayed, snapshot

CONVERSION = "torch.as_tensor(numpy.asarray(values))"
"""How users make a tensor of other arrays, for messages: PyTorch does not compute with NumPy's."""

__all__ = [
    "CONVERSION",
    "Group",
    "accepts",
    "alone",
    "difference",
    "evaluate",
    "group_of",
    "linearize",
    "needs_all",
    "process_number",
    "refusal",
    "replayed",
    "shared",
    "snapshot",
    "step_size",
    "untouched",
]
