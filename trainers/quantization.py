"""QLoRA: a frozen base in 4 or 8 bits under adapters and memory embeddings in full precision (arXiv 2305.14314)."""

import os

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import lora_layers


def quantize_base(model: CLaRaForRetrievalGeneration, bits: int) -> None:
    """Quantize, in place, the frozen linear layers that carry adapters: 4-bit NF4 with quantized scales, or 8-bit.

    Embeddings, norms and output head stay as they are, and so do adapters and memory embeddings. Memories of a
    quantized base are other memories: stores tell them apart, and the model must be quantized alike to use them.

    Args:
        model: loaded, with the configuration's `checkpoint_format` "adapter", since its base is not saved.
        bits (`int`): 4 or 8.

    Raises:
        ImportError: bitsandbytes is not installed, or does not run here.
        ValueError: other `bits`, a `checkpoint_format` that would save the base, or ZeRO-3 or FSDP, which divide
            weights that bitsandbytes needs whole.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}.")
    if model.config.checkpoint_format != "adapter":
        raise ValueError(
            "a quantized base is not saved: set checkpoint_format to 'adapter' (in clara_config), so that checkpoints "
            "hold what was trained and name their base."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError("ZeRO-3 cannot divide a quantized base: use DDP, ZeRO-1 or ZeRO-2, or no quantization.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("FSDP cannot divide a quantized base: use DDP, ZeRO-1 or ZeRO-2, or no quantization.")
    try:
        import bitsandbytes
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'a quantized base needs bitsandbytes: pip install "clara-hf[quantization]" ({error})'
        ) from error
    for layer in lora_layers(model.decoder):
        layer.base_layer = _quantized(bitsandbytes.nn, layer.base_layer, bits, model.dtype)


def _quantized(layers, linear: nn.Linear, bits: int, dtype) -> nn.Module:
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data.contiguous()
    if bits == 4:
        new = layers.Linear4bit(*shape, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        # Else evaluation on a CPU with AVX-512 packs the weights anew, and they come back rounded.
        new.support_avx512bf16_for_cpu = False
        new.weight = layers.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    else:
        new = layers.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    # bitsandbytes quantizes a weight when it is put on its device.
    return new.to(linear.weight.device).requires_grad_(False)
