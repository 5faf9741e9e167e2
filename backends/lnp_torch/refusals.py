"""Models that cannot be measured without touching them, and what to do instead."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lnp.contract.trees import leaves

SHARDED = (
    "The model's parameters are sharded over processes ({}), and lnp measures whole ones: nothing has been touched. "
    "Expected a model whose every process holds all of its parameters, as in DistributedDataParallel. Measure an "
    "unsharded copy of it, such as a checkpoint that is loaded in one process."
)


def refusal(model: Any) -> str | None:
    """Why the model cannot be measured, in a sentence that says what to do; None if it can.

    Every process of a run comes to the same answer, and nothing is computed or sent for it.
    """
    kinds = {kind for tensor in _tensors(model) if (kind := _sharded(tensor))}
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    modules = model.modules() if fsdp is not None and isinstance(model, nn.Module) else ()
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        kinds.add("FullyShardedDataParallel")
    return SHARDED.format(", ".join(sorted(kinds))) if kinds else None


def refuse(model: Any) -> None:
    """Raise ValueError for a model that cannot be measured, before anything has happened."""
    reason = refusal(model)
    if reason is not None:
        raise ValueError(reason)


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


def _sharded(tensor: Any) -> str:
    """How a tensor is spread over processes, or ""."""
    if hasattr(tensor, "ds_id"):  # DeepSpeed leaves an empty tensor where it has put the parameter elsewhere
        return "ZeRO stage 3"
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return "DTensor, by fully_shard or tensor parallelism"
    return ""


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
