"""Weights that are spread over processes: whole ones for a while under DeepSpeed ZeRO-3, copies of FSDP's."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.integrations import is_deepspeed_zero3_enabled


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Whole parameters for the block where ZeRO-3 leaves each process a part of them; elsewhere nothing happens.

    All processes enter the block together. In it, the model's forward passes may differ in number between them.

    Args:
        changed (`bool`): whether to keep what the first process writes into the parameters; else that is lost.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    # An import statement would be demanded of everybody who loads a checkpoint with its code.
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None):
        yield


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Models that are built in the block have whole weights under ZeRO-3 too: a base is only read, to make the state
    that the model itself is loaded from."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)


def whole_copy(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU. All processes that hold a part of the tensor (FSDP) call this together."""
    value = value.detach()
    if _is_process_group():
        from torch.distributed.tensor import DTensor

        value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.to("cpu", copy=True)


def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Write a whole tensor into one that may be spread over processes (FSDP), in place."""
    if _is_process_group():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            source = source.to(target.device, target.dtype)
            source = distribute_tensor(source, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(source)


def _is_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
