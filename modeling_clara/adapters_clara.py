"""Three LoRA adapters on one decoder, and how one forward pass runs under one of them.

PEFT's `set_adapter` is global and toggles `requires_grad`, which loses gradients as soon as one training step runs two
adapters. Here the adapter of a forward pass is chosen inside a context manager and `requires_grad` is never touched.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .sharded_clara import gathered


logger = logging.get_logger(__name__)

COMPRESSOR = "compressor"
QUERY_REASONER = "query_reasoner"
GENERATOR = "generator"


def add_adapter(decoder: nn.Module, name: str, config) -> None:
    """Put a LoRA adapter with the settings of a `CLaRaConfig` on the linear layers of `decoder`, in place.

    Raises:
        ValueError: the settings name fused experts.
    """
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=linear_targets(decoder, config.lora_target_modules),
    )
    with warnings.catch_warnings():
        # PEFT warns of a second adapter; three on one decoder are what this model is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(lora, decoder, adapter_name=name)


def linear_targets(decoder: nn.Module, targets: str | list[str]) -> str | list[str]:
    """`targets`, without the experts of a mixture that are fused into one tensor: `all-linear` leaves them frozen.

    PEFT wraps such tensors, which allows no dropout and gives the base's weights other names.

    Raises:
        ValueError: `targets` names fused experts.
    """
    targets = targets if isinstance(targets, str) else list(targets)
    if all(parameter.dim() < 3 for parameter in decoder.parameters()):
        return targets
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(decoder.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), twin)
    found = {name: module for name, module in twin.named_modules() if isinstance(module, LoraLayer)}
    fused = [name for name, module in found.items() if isinstance(module, ParamWrapper)]
    if not fused:
        return targets
    if targets != "all-linear":
        raise ValueError(
            f"lora_target_modules={targets!r} reaches {fused[0]!r}, experts that are fused into one tensor, which "
            "carries no adapter: name other layers, or 'all-linear', which leaves the experts frozen."
        )
    logger.warning_once(f"the experts of the {decoder.config.model_type} decoder are fused: they carry no adapters.")
    return [name for name in found if not any(name == other or name.startswith(f"{other}.") for other in fused)]


def lora_layers(decoder: nn.Module) -> Iterator[LoraLayer]:
    """The layers of `decoder` that carry adapters."""
    return (module for module in decoder.modules() if isinstance(module, LoraLayer))


def adapter_parameters(decoder: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters of one adapter, in the order of the modules."""
    marks = (f".lora_A.{name}.", f".lora_B.{name}.")
    return (parameter for key, parameter in decoder.named_parameters() if any(mark in key for mark in marks))


def copy_adapter(decoder: nn.Module, source: str, target: str) -> None:
    """Overwrite the weights of adapter `target` with those of `source`."""
    targets, sources = list(adapter_parameters(decoder, target)), list(adapter_parameters(decoder, source))
    with torch.no_grad(), gathered([*targets, *sources], changed=True):
        for new, old in zip(targets, sources, strict=True):
            new.copy_(old)


def remove_adapter(decoder: nn.Module, name: str) -> None:
    """Take adapter `name` off the layers of `decoder`, which must keep another one."""
    for layer in lora_layers(decoder):
        # PEFT picks another active adapter for a removed one, with a warning and with gradients: pick it here.
        layer._active_adapter = [other for other in layer.lora_A if other != name][:1]
        layer.delete_adapter(name)
    del decoder.peft_config[name]


@contextmanager
def use_adapter(decoder: nn.Module, name: str) -> Iterator[None]:
    """Run the forward passes of the block under adapter `name`; `requires_grad` stays as it is.

    Raises:
        ValueError: the decoder has no such adapter.
    """
    layers = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
    if name not in layers[0].lora_A:
        # PEFT passes over a name that it does not know: the block would run on the bare base.
        raise ValueError(f"the decoder has no adapter {name!r}, only {sorted(layers[0].lora_A)}.")
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer._active_adapter = previous


def checkpoint_under_adapter(decoder: nn.Module, checkpoint: Callable) -> Callable:
    """Make an activation-checkpointing function recompute under the adapter of its forward pass.

    Recomputation happens in backward, when another adapter (or none) may be chosen; without this the gradients are
    silently wrong.
    """

    def checkpoint_function(function: Callable, *args, **kwargs):
        layer = next(lora_layers(decoder))
        (name,) = layer._active_adapter

        def run(*inputs, **options):
            with use_adapter(decoder, name):
                return function(*inputs, **options)

        return checkpoint(run, *args, **kwargs)

    return checkpoint_function
