"""Models that cannot be measured without touching them, and what to do instead."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lnp.contract.trees import leaves
from lnp_torch.dtensors import is_sharded

SHARDED = (
    "The model's parameters are sharded over processes ({}), and lnp measures whole ones: nothing has been touched. "
    "Expected a model whose every process holds all of its parameters, as in DistributedDataParallel, or one that "
    "fully_shard or parallelize_module alone has sharded. Measure an unsharded copy of it, such as a checkpoint in one "
    "process."
)
TOGETHER = (
    "The model's parameters are sharded over processes by fully_shard or parallelize_module, and this measurement is "
    "made by one process alone: nothing has been touched. Expected lnp.decompose(model, batch) or tracker.observe in "
    "all processes, and no group=None. Call it so, or measure an unsharded copy of the model, such as a checkpoint in "
    "one process."
)


SPLIT = (
    "This network is tensor parallel, and lnp runs it whole, where {}: its code depends on what each process holds, "
    "such as a number of heads that was divided by the number of processes, or the processes were given "
    "different batches, or draw different dropout masks. Expected the same function with whole weights, and one batch "
    "in all processes of the mesh. Write such sizes as -1, call model.eval() where there is dropout, or measure an "
    "unsharded copy of the model, such as a checkpoint in one process."
)


@contextlib.contextmanager
def with_whole_weights() -> Iterator[None]:
    """Around a network that has whole weights in the place of its parts: what it raises may come from that."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(SPLIT.format(f"it raised a {type(error).__name__} ({error})")) from error


def refusal(model: Any) -> str | None:
    """Why one process alone cannot measure the model, in a sentence that says what to do; None if it can.

    Every process of a run comes to the same answer, and nothing is computed or sent for it.
    """
    kinds = _not_to_be_gathered(model)
    if kinds:
        return SHARDED.format(", ".join(sorted(kinds)))
    return TOGETHER if any(map(is_sharded, _tensors(model))) else None


def process_group_of_shards(model: Any) -> Any:
    """The processes over which a model's parameters are sharded; None for one that is not sharded.

    Raises
    ------
    ValueError
        For a model that is sharded in another way.
    """
    if refusal(model) != TOGETHER:
        refuse(model)
        return None
    mesh = next(tensor.device_mesh for tensor in _tensors(model) if is_sharded(tensor))
    return mesh.get_group() if mesh.ndim == 1 else torch.distributed.group.WORLD


def is_tensor_parallel(model: Any) -> bool:
    """Whether single operations are spread over processes (`parallelize_module`), which all have the same batch."""
    return any(map(is_sharded, _tensors(model))) and not _states_of_fsdp(model)


def refuse(model: Any) -> None:
    """Raise ValueError for a model that one process alone cannot measure, before anything has happened."""
    reason = refusal(model)
    if reason is not None:
        raise ValueError(reason)


def _not_to_be_gathered(model: Any) -> set[str]:
    """The ways in which parameters are spread over processes that cannot be gathered."""
    kinds = {"ZeRO stage 3" for tensor in _tensors(model) if hasattr(tensor, "ds_id")}  # DeepSpeed leaves it empty
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.modules()) if fsdp is not None and isinstance(model, nn.Module) else []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        kinds.add("FullyShardedDataParallel")
    sharded = [tensor for tensor in _tensors(model) if is_sharded(tensor)]
    states = _states_of_fsdp(model)
    groups = [group for state in states for group in parameter_groups(state)]
    meshes = [group.mesh_info.mesh for group in groups]
    if any(tensor.device_mesh != mesh for tensor in sharded for mesh in meshes):
        kinds.add("fully_shard together with tensor parallelism, or over several meshes")
    if sharded and not states:
        kinds |= _not_one_tensor_parallel(model, sharded)
    if any(mesh.ndim > 1 and mesh.size() != torch.distributed.get_world_size() for mesh in meshes):
        kinds.add("fully_shard, over several dimensions of a part of the processes")
    if any(type(getattr(group, "offload_policy", None)).__name__ == "CPUOffloadPolicy" for group in groups):
        kinds.add("fully_shard with a CPUOffloadPolicy")
    narrow = [state._mp_policy.param_dtype for state in states] + [tensor.dtype for tensor in sharded]
    if torch.float16 in narrow:  # whose gradients are scaled on the way, and are met before that is undone
        kinds.add("fully_shard of float16")
    return kinds


def _not_one_tensor_parallel(model: Any, sharded: list[Any]) -> set[str]:
    """The ways in which DTensors are spread other than over one mesh of one dimension."""
    kinds = set()
    mesh = sharded[0].device_mesh
    if mesh.ndim > 1 or any(tensor.device_mesh != mesh for tensor in sharded):
        kinds.add("DTensor, over several meshes or several dimensions of one")
    if not isinstance(model, nn.Module) or any(map(is_sharded, model.buffers())):
        kinds.add("DTensor, where it is no parameter of a module")
    if any(tensor.dtype == torch.float16 for tensor in sharded):
        kinds.add("DTensor of float16")
    return kinds


def _states_of_fsdp(model: Any) -> list[Any]:
    """What `fully_shard` keeps of each module that it was called for."""
    own: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module._get_fsdp_state() for module in modules if isinstance(module, own)]


def parameter_groups(state: Any) -> list[Any]:
    """The groups of parameters that `fully_shard` gathers at a time."""
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups  # up to PyTorch 2.11
    return [group for group in groups if group is not None]


def refuse_transforms() -> None:
    """Raise RuntimeError inside a transform of torch.func, of which a measurement would become a part."""
    functorch: Any = torch._C._functorch
    if functorch.get_dynamic_layer_stack_depth():
        kind = functorch.peek_interpreter_stack().key().name.lower()
        raise RuntimeError(
            f"lnp was called inside a transform of torch.func ({kind}). Expected a call outside of transforms: a "
            "measurement makes passes of its own, which the transform would change. Measure before or after it."
        )


def refuse_devices(model: Any, batches: Any) -> None:
    """Raise ValueError if what failed has its batch on other devices than the model.

    Asked after an error alone: models that are spread over several devices may move their batch themselves.
    """
    own = {str(tensor.device) for tensor in _tensors(model)}
    given = {str(leaf.device) for leaf in leaves(batches) if isinstance(leaf, torch.Tensor)}
    if own and given and not own & given:
        there = " and ".join(sorted(own))
        raise ValueError(
            f"The batch is on {' and '.join(sorted(given))}, the model on {there}. Expected both on one device. Move "
            f"the batch: batch.to({min(own)!r}), or each of its tensors."
        )


def _tensors(model: Any) -> list[Any]:
    if isinstance(model, nn.Module):
        return [*model.parameters(), *model.buffers()]
    return leaves(model[1]) if isinstance(model, tuple) and len(model) == 2 else []


COMPILED = (
    "{} is compiled, and a compiled forward pass allows one backward pass, where a measurement that shares the step's "
    "own takes several: nothing has been touched. Expected a step that is not compiled. Call lnp.decompose or "
    "tracker.observe, which make a pass of their own."
)
REENTRANT = (
    "The model uses torch.utils.checkpoint with use_reentrant=True, whose inside is not part of the step's graph. "
    "Expected use_reentrant=False. Set it, or call lnp.decompose, which makes a pass of its own."
)


SCRIPTED = (
    "The model is a {}, which cannot be watched while it is called: nothing has been touched. Expected a module that "
    "is not scripted as a whole. Call lnp.decompose or tracker.observe, which make a pass of their own."
)


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError if a module, or its way to be called, is compiled; and for a scripted model."""
    if isinstance(model, torch.jit.RecursiveScriptModule):  # which takes no hooks
        raise ValueError(SCRIPTED.format(type(model).__name__))
    for name, module in model.named_modules():
        called = (vars(module).get("forward"), vars(module).get("_compiled_call_impl"))
        if hasattr(module, "_orig_mod") or any(hasattr(f, "_torchdynamo_orig_callable") for f in called):
            raise ValueError(COMPILED.format(f"The module {name!r}" if name else "The model"))


def refuse_graph(loss: Any) -> None:
    """Raise RuntimeError if what is compiled, or a reentrant checkpoint, is among the operations that led to a loss."""
    stack, seen = [getattr(loss, "grad_fn", None)], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CompiledFunctionBackward":
            raise RuntimeError(COMPILED.format("A part of the step"))
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(REENTRANT)
        stack.extend(following for following, _ in node.next_functions)


def refuse_hooks(model: nn.Module, hooked: bool) -> None:
    """Raise RuntimeError if the user's code runs in the backward pass: it would run again with each probe.

    `hooked` says whether the forward pass has put hooks on activations.
    """
    own = any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())
    if hooked or own or any(p._backward_hooks for p in model.parameters()):
        raise RuntimeError(
            "Hooks run in the step's backward pass (register_hook, retain_grad, register_full_backward_hook), and a "
            "measurement that shares the step's graph would run them with each of its probes: nothing has been "
            "touched. Expected a model without them. Call lnp.decompose or tracker.observe, which make a pass of "
            "their own."
        )
