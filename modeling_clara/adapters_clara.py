"""Three LoRA adapters on one decoder, and how one forward pass runs under one of them.

PEFT's `set_adapter` is global and toggles `requires_grad`, which loses gradients as soon as one training step runs two
adapters. Here the adapter of a forward pass is chosen inside a context manager and `requires_grad` is never touched.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .decoding_clara import last_layer, use_attention, use_forward
from .functional_clara import gathered


logger = logging.get_logger(__name__)

COMPRESSOR = "compressor"
QUERY_REASONER = "query_reasoner"
GENERATOR = "generator"
# Tokens in a forward pass from which on adding an update of usual rank to the weights costs less than applying it.
MERGE_FROM = 256


def add_adapter(decoder: nn.Module, name: str, config) -> None:
    """Put a LoRA adapter with the settings of a `CLaRaConfig` on the linear layers of `decoder`, in place.

    Raises:
        ValueError: the settings name fused experts, embeddings, or layers that are not there or carry no adapter.
    """
    check_targets(decoder, config.lora_target_modules)
    with warnings.catch_warnings(), targets_named(config.lora_target_modules):
        # PEFT warns of a second adapter; three on one decoder are what this model is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=linear_targets(decoder, config.lora_target_modules),
        )
        inject_adapter_in_model(lora, decoder, adapter_name=name)


def check_targets(decoder: nn.Module, targets: str | list[str]) -> None:
    """Raise a `ValueError` where `targets` reach an embedding matrix, whose rows for added tokens a checkpoint holds
    under the base's own name, or are no regular expression."""
    if targets == "all-linear":
        return
    settings = LoraConfig(target_modules=targets)
    ends = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    for name, module in decoder.named_modules():
        if not any(module is end for end in ends):
            continue
        try:
            is_reached = check_target_module_exists(settings, name)
        except re.error as error:
            raise ValueError(f"lora_target_modules={targets!r:.200} is no regular expression: {error}.") from error
        if is_reached:
            raise ValueError(
                f"lora_target_modules={targets!r:.200} reaches {name!r}, which carries no adapter: name linear layers "
                "other than the output head, or 'all-linear'."
            )


@contextmanager
def targets_named(targets: str | list[str]) -> Iterator[None]:
    """Name the argument in what PEFT says of `targets`."""
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "lora_target_modules" in reason:
            raise
        raise ValueError(f"lora_target_modules={targets!r:.200} cannot be used: {reason:.300}") from error


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
        with _forwards({layer: _fused(layer, name) for layer in layers if can_fuse(layer, name)}):
            yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer._active_adapter = previous


@contextmanager
def _forwards(functions: dict[LoraLayer, Callable]) -> Iterator[None]:
    """Let layers compute by `function(x)` for the block."""
    with ExitStack() as stack:
        for layer, function in functions.items():
            stack.enter_context(use_forward(layer, function))
        yield


def can_fuse(layer: nn.Module, name: str) -> bool:
    """Whether a layer's output under adapter `name` can be computed as [`LoraProduct`]: one LoRA update of usual kind
    over a linear layer, on a CPU, all of it whole and in one precision, outside autocast."""
    if type(layer) is not LoraLinear or name not in layer.lora_A or layer.merged or layer.disable_adapters:
        return False
    base, a, b, dropout = (layer.get_base_layer(), *(part[name] for part in _parts(layer)))
    usual = type(base) is type(a) is type(b) is nn.Linear and b.bias is None and name not in layer.lora_variant
    if not usual or type(dropout) not in (nn.Dropout, nn.Identity) or torch.is_autocast_enabled("cpu"):
        return False
    weights = [base.weight, a.weight, b.weight]
    # accelerate brings offloaded weights in by a forward of its own; ZeRO-3 gathers sharded ones in hooks.
    brought = any("forward" in part.__dict__ for part in (base, a, b)) or not _is_ours(layer.__dict__.get("forward"))
    brought = brought or is_deepspeed_zero3_enabled()
    whole = all(type(weight.data) is torch.Tensor and weight.numel() for weight in weights)
    kinds = {(weight.device.type, weight.dtype) for weight in weights}
    return whole and not brought and kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


def _parts(layer: LoraLayer) -> tuple[nn.ModuleDict, nn.ModuleDict, nn.ModuleDict]:
    return layer.lora_A, layer.lora_B, layer.lora_dropout


def _is_ours(forward: Callable | None) -> bool:
    return forward is None or getattr(forward, "func", None) in (_forward_fused, _forward_merged)


def _fused(layer: LoraLayer, name: str) -> Callable:
    """A layer's forward under adapter `name`; looked up once, since a decoding step computes less than that takes."""
    a, b, dropout = (part[name] for part in _parts(layer))
    return partial(_forward_fused, layer.get_base_layer(), a, b, dropout, layer.scaling[name])


def _forward_fused(
    base: nn.Linear, a: nn.Linear, b: nn.Linear, dropout: nn.Module, scale: float, x: torch.Tensor
) -> torch.Tensor:
    kept = None
    if dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        kept, kept_scale = dropout_mask(x.shape, dropout.p)
        scale *= kept_scale
    operands = x, base.weight, base.bias, a.weight, b.weight, scale, kept
    # A Function costs a decoding step a fifth of its time, and without gradients does nothing.
    return LoraProduct.apply(*operands) if torch.is_grad_enabled() else lora_product(*operands)[0]


def dropout_mask(shape: torch.Size, p: float) -> tuple[torch.Tensor, float]:
    """Which values dropout keeps, 1 or 0 in uint8, and what those are multiplied by, so that their mean stays.

    `p` is rounded to 16 bits: four values share a draw of the CPU's generator, which is most of dropout's cost there.
    They are compared within their own type, and kept in one that is soon made a float: to and from bool, PyTorch takes
    six times as long.
    """
    count, cut = shape.numel(), round(p * 2**16)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(shape).ge_(cut - 2**15)
    return kept.to(torch.uint8), 2**16 / max(2**16 - cut, 1)


def kept_of(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return kept.to(x.dtype).mul_(x)


def lora_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`LoraProduct`] computes `[..., out]`, and the product with `A` `[..., r]`."""
    low = (x if kept is None else kept_of(x, kept)) @ a.T
    output = nn.functional.linear(x, weight, bias)
    output.view(-1, len(b)).addmm_(low.view(-1, len(a)), b.T, alpha=scale)
    return output, low


class LoraProduct(torch.autograd.Function):
    """`x W^T + bias + scale (kept x) A^T B^T` without the sums, products and copies between.

    What PEFT's layer computes, in its place where nothing but a LoRA update is active. In and out of backward go the
    gradients of `x`, `A` and `B` (where they are wanted); the base is frozen. For it only `x` is held, one byte per
    value where there is dropout, and the product with `A`.

    Shapes: `x` and `kept` `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`; one dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, kept):
        output, low = lora_product(x, weight, bias, a, b, scale, kept)
        ctx.save_for_backward(x, weight, a, b, low, kept)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, a, b, low, kept = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_a, wants_b = ctx.needs_input_grad[:5]
        gradient = gradient.reshape(-1, len(b))
        of_low = (gradient @ b).mul_(ctx.scale)
        of_x = of_a = of_b = None
        if wants_x:
            of_x = gradient @ weight
            if kept is None:
                of_x.addmm_(of_low, a)
            else:
                of_x.addcmul_(of_low @ a, kept.view(of_x.shape).to(of_x.dtype))
            of_x = of_x.view(x.shape)
        if wants_a:
            of_a = of_low.T @ (x if kept is None else kept_of(x, kept)).reshape(-1, x.shape[-1])
        if wants_b:
            # The narrow matrix on the left is faster by half.
            of_b = (low.view(-1, len(a)).T @ gradient).mul_(ctx.scale).T
        of_weight = gradient.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        of_bias = gradient.sum(dim=0) if wants_bias else None
        return of_x, of_weight, of_bias, of_a, of_b, None, None


@contextmanager
def merged_adapter(decoder: nn.Module, name: str, tokens: int) -> Iterator[None]:
    """Like [`use_adapter`], for inference over many tokens: each layer adds the adapter's update to its weight while it
    runs, and multiplies once.

    That costs one sum per layer and forward pass in place of two narrow products and a sum per token. The base is only
    read, so nothing has to be restored, and no more than one layer's weight is held besides. Results equal those of
    [`use_adapter`] up to rounding. Layers whose weights are not whole in float32 (quantized, offloaded, spread over
    processes, half precision, in which the sum would lose most of the update) run as under [`use_adapter`].

    Args:
        tokens: of the block's largest forward pass; where they are few, looking at the layers would cost more.
    """
    with use_adapter(decoder, name):
        merged = [layer for layer in lora_layers(decoder) if _can_merge(layer, name)] if tokens >= MERGE_FROM else []
        with _forwards({layer: _merged(layer, name) for layer in merged}):
            yield


def _can_merge(layer: LoraLayer, name: str) -> bool:
    base = layer.get_base_layer()
    if type(base) is not nn.Linear or type(layer) is not LoraLinear or name not in layer.lora_A:
        return False
    weights = (base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    # accelerate brings offloaded weights in by a forward of its own
    hooked = not _is_ours(layer.__dict__.get("forward")) or "forward" in base.__dict__
    plain = all(type(weight.data) is torch.Tensor and not weight.is_meta and weight.numel() for weight in weights)
    return plain and not hooked and all(weight.dtype == torch.float32 for weight in weights)


def _merged(layer: LoraLayer, name: str) -> Callable:
    """A layer's forward that adds the update of adapter `name` to the weight, and for few tokens is the layer's own."""
    a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    return partial(_forward_merged, layer.forward, layer.get_base_layer(), a, b, scale)


def _forward_merged(
    own: Callable, base: nn.Linear, a: nn.Linear, b: nn.Linear, scale: float, x: torch.Tensor
) -> torch.Tensor:
    if x.numel() < MERGE_FROM * x.shape[-1]:
        return own(x)
    with torch.autocast(x.device.type, enabled=False):
        weight = torch.addmm(base.weight, b.weight, a.weight, alpha=scale)
    return nn.functional.linear(x, weight, base.bias)


def keeping_attention(checkpoint: Callable) -> Callable:
    """What an activation-checkpointing function with the option `keep_attention` stands for: one that computes
    everything again in backward but attention, whose outputs are kept.

    Of a layer these are one more vector of the hidden width per token; attention is what grows with a text's length.

    Raises:
        ValueError: it is asked for reentrant checkpointing, which keeps nothing.
    """
    if not isinstance(checkpoint, partial) or "keep_attention" not in checkpoint.keywords:
        return checkpoint
    options = dict(checkpoint.keywords)
    keeps = options.pop("keep_attention")
    options.setdefault("use_reentrant", False)
    if keeps and options["use_reentrant"]:
        raise ValueError("keep_attention is True, which reentrant checkpointing cannot do: set use_reentrant to False.")
    if keeps:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps_attention)
    return partial(checkpoint.func, *checkpoint.args, **options)


def _keeps_attention(context, operation, *arguments, **options) -> CheckpointPolicy:
    is_attention = any(kind in str(operation) for kind in ("scaled_dot_product", "flash_attn", "flex_attention"))
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_under_adapter(decoder: nn.Module, checkpoint: Callable) -> Callable:
    """Make an activation-checkpointing function recompute under the adapter and attention of its forward pass, and the
    last layer in the places of then.

    Recomputation happens in backward, when others may be chosen; without this the gradients are silently wrong.
    """

    def checkpoint_function(function: Callable, *args, **kwargs):
        layer = next(lora_layers(decoder))
        (name,), attention = layer._active_adapter, decoder.config._attn_implementation
        last = last_layer(decoder)
        forward = None if last is None else last.__dict__.get("forward")

        def run(*inputs, **options):
            reading = nullcontext() if last is None else use_forward(last, forward)
            with use_adapter(decoder, name), use_attention(decoder, attention), reading:
                return function(*inputs, **options)

        return checkpoint(run, *args, **kwargs)

    return checkpoint_function
