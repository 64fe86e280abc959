"""QLoRA: a quantized frozen base under adapters and memory embeddings in full precision (arXiv 2305.14314); GGUF files,
which become bases in full precision."""

import copy
import glob
import importlib
import json
import os
import shutil

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig, QuantizationConfigMixin

from .adapters_clara import lora_layers
from .configuration_clara import CLaRaConfig, give_usual_rights


logger = logging.get_logger(__name__)

# In the folder of a dequantized GGUF file: which file it was made from.
GGUF_SOURCE = "gguf.json"
# What transformers' quantizers call the list of modules that they leave as they are.
SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
OWN_MODULES = (r".*\.lora_[AB]", "memory_embeddings", "memory_projection")


def base_only(quantization, config: CLaRaConfig):
    """A copy of a quantization configuration of transformers that leaves alone what is not the base's layers: LoRA
    matrices, memory embeddings and projection, token embeddings and output head.

    Args:
        quantization (`QuantizationConfigMixin` or `dict`): as in `from_pretrained(quantization_config=...)`.

    Raises:
        ValueError: a method that cannot leave modules out, or what is no configuration.
    """
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    if not isinstance(quantization, QuantizationConfigMixin):
        raise ValueError(
            f"quantization_config is {quantization!r:.60}: it must be a configuration of transformers or its "
            "dictionary, such as BitsAndBytesConfig(load_in_4bit=True)."
        )
    quantization = copy.deepcopy(quantization)
    field = next((name for name in SKIP_FIELDS if name in vars(quantization)), None)
    if field is None:
        raise ValueError(
            f"quantization_config: {type(quantization).__name__} quantizes every layer, the adapters' too: take a "
            f"method with {' or '.join(SKIP_FIELDS)}, such as BitsAndBytesConfig."
        )
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config.decoder_config)
    ends = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    vocabulary = [f"decoder.{name}" for name, module in decoder.named_modules() if any(module is end for end in ends)]
    skipped = [*(getattr(quantization, field) or []), *OWN_MODULES, *vocabulary]
    setattr(quantization, field, list(dict.fromkeys(skipped)))
    return quantization


def settle_quantized(model: PreTrainedModel, quantization) -> None:
    """Make a model that transformers' `quantization` loaded like one of [`quantize_base`], and check that only the
    base was quantized.

    The model then counts as one with adapters, which the Trainer trains and `save_pretrained` writes without the base.

    Raises:
        ValueError: a module besides the base's layers was quantized, or none was.
    """
    method = getattr(quantization.quant_method, "value", quantization.quant_method)
    own = {name: module for name, module in model.named_modules() if _is_own(name)}
    own |= {"token embeddings": model.get_input_embeddings(), "output head": model.get_output_embeddings()}
    for name, module in own.items():
        if isinstance(module, (nn.Linear, nn.Embedding)) and not _is_plain(module):
            raise ValueError(
                f"quantization_config: {method} quantized {name}, which must stay as it is: take another method, such "
                "as BitsAndBytesConfig."
            )
    if all(_is_plain(layer.get_base_layer()) for layer in lora_layers(model.decoder)):
        raise ValueError(f"quantization_config: {method} quantized no layer that carries an adapter: mend its options.")
    for mark in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # see `_quantized`
    model.quantized_by = method


def refuse_quantized(config: PreTrainedConfig | dict, name: str) -> None:
    """Raise a `ValueError` if a base, or a checkpoint, was saved quantized: adapters are read onto whole weights."""
    found = config.get("quantization_config") if isinstance(config, dict) else vars(config).get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(
            f"{name} was saved quantized ({getattr(method, 'value', method)}): give it in full precision, and "
            "quantization_config= to quantize it while it is loaded."
        )


def dequantized(folder: str, gguf_file: str, dtype: str | torch.dtype = "auto") -> str:
    """The folder that holds a GGUF file's model and tokenizer as every other base: safetensors, in `dtype`.

    It is made beside the file on first use, `NAME-float32` for `NAME.gguf`. Weights stay as coarse as they were.

    Args:
        folder: the folder that the file lies in.
        gguf_file: the file's name.
        dtype (`str` or `torch.dtype`): of the weights; `"auto"` is float32.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the folder cannot be written.
        ImportError: the package gguf is not installed.
        ValueError: transformers cannot read the file, or the folder was made from another file of this name.
    """
    file = os.path.join(os.fspath(folder), gguf_file)
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"there is no {file}: gguf_file names a file in the model's folder (fetch one of the Hub with hf download)."
        )
    kind = "float32" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    place = f"{file.removesuffix('.gguf')}-{kind}"
    source = {"file": gguf_file, "bytes": os.path.getsize(file), "mtime_ns": os.stat(file).st_mtime_ns}
    if not os.path.exists(place):
        logger.warning(f"{file} is dequantized once, into {place}.")
        beside = f"{place}.partial-{os.getpid()}"
        try:
            _write_dequantized(os.fspath(folder), gguf_file, getattr(torch, kind), beside)
            with open(os.path.join(beside, GGUF_SOURCE), "w", encoding="utf-8") as record:
                json.dump(source, record)
            os.rename(beside, place)
        except Exception:
            if not os.path.exists(place):  # else another process was faster
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        for left in glob.glob(f"{glob.escape(place)}.partial-*"):  # by processes that were killed, or are too late
            shutil.rmtree(left, ignore_errors=True)
    try:
        with open(os.path.join(place, GGUF_SOURCE), encoding="utf-8") as record:
            made_from = json.load(record)
    except (OSError, ValueError):
        made_from = None
    if made_from != source:
        raise ValueError(f"{place} was not made from {file} as it is now: remove that folder.")
    return place


def _write_dequantized(folder: str, gguf_file: str, dtype: torch.dtype, place: str) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise ImportError(f'a GGUF file needs the package gguf: pip install "clara-hf[gguf]" ({error})') from error
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    give_usual_rights(place)


def _is_own(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name or name.startswith(("memory_embeddings", "memory_projection"))


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer or embedding has an ordinary floating-point weight."""
    weight = getattr(module, "weight", None)
    is_tensor = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return is_tensor and weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantize_base(model: PreTrainedModel, bits: int) -> None:
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
        raise ValueError(f"bits must be 4 or 8, got {bits!r:.80}.")
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
        # An import statement would be demanded of everybody who loads a checkpoint with its code.
        bitsandbytes = importlib.import_module("bitsandbytes")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'a quantized base needs bitsandbytes: pip install "clara-hf[quantization]" ({error})'
        ) from error
    for layer in lora_layers(model.decoder):
        layer.base_layer = _quantized(bitsandbytes.nn, layer.base_layer, bits, model.dtype)
    model.quantized_by = "bitsandbytes"


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
