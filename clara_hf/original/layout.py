"""The published checkpoint layout: its files are found, read and checked."""

import json
import os
import re
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers.utils import cached_file

from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.configuration_clara import ORIGINAL_MODEL_TYPE

from .weight_files import ConversionError, first_line


CONFIG_FILE, CODE_FILE = "config.json", "modeling_clara.py"
ADAPTERS_FILE, LAYERS_FILE = "adapters.pth", "decoder_first_last_layers.pth"
DECODER, ENCODER, REASONER = "decoder_adapter", "encoder_adapter", "query_reasoner_adapter"
ADAPTER_NAMES = {DECODER: GENERATOR, ENCODER: COMPRESSOR, REASONER: QUERY_REASONER}
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])\.weight")
# Settings that every published configuration has; what is taken, and said, where one is missing.
SETTINGS = {"sep": True, "different_mem_tokens": True, "generation_top_k": 1}


@dataclass
class OriginalCheckpoint:
    """A published checkpoint in memory.

    Args:
        folder (`str`): where its `config.json` lies on this machine.
        config (`dict`): its `config.json`, completed with what had to be assumed.
        adapters (`dict[str, dict[str, Tensor]]`): LoRA weights by published adapter name.
        copies (`list[str]`): adapters that held copies of the embeddings as well.
        layers (`dict[str, Tensor]`): embedding matrices `[vocab, H]` by name in the decoder.
        code (`str`, *optional*): its own modelling file.
        assumed (`list[str]`): sentences about what the files do not say.
    """

    folder: str
    config: dict
    adapters: dict[str, dict[str, torch.Tensor]]
    copies: list[str]
    layers: dict[str, torch.Tensor]
    code: str | None
    assumed: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.config["lora_r"]

    @property
    def target_modules(self) -> list[str]:
        """Names of the linear layers that carry adapters, without the path to them."""
        modules = {found["module"] for key in self.adapters[ENCODER] if (found := LORA_KEY.fullmatch(key))}
        return sorted({module.rpartition(".")[2] for module in modules})


def find_file(source: str, name: str, subfolder: str = "") -> str:
    """Path of a file of a folder, or of a Hub repository.

    Raises:
        ConversionError: there is no such file.
    """
    if os.path.isdir(source):
        path = os.path.join(source, subfolder, name)
        if os.path.isfile(path):
            return path
        inside = sorted(entry for entry in os.listdir(source) if os.path.isfile(os.path.join(source, entry, name)))
        hint = f": pass --subfolder, one of {', '.join(inside)}" if inside and not subfolder else ""
        raise ConversionError(f"{path} is missing{hint}")
    try:
        return cast(str, cached_file(source, name, subfolder=subfolder))  # it raises where there is none
    except (OSError, ValueError) as error:
        place = os.path.join(source, subfolder, name)
        raise ConversionError(f"{place} is neither on this machine nor on the Hub: {first_line(error)}") from error


def read_original(source: str, subfolder: str = "") -> OriginalCheckpoint:
    """Read a published checkpoint, on the CPU and without running any of its code.

    Raises:
        ConversionError: a file is missing, truncated, or not of this layout.
    """
    path = find_file(source, CONFIG_FILE, subfolder)
    config, assumed = _read_config(path)
    layers_path = find_file(source, LAYERS_FILE, subfolder)
    layers = _load(layers_path)
    _check_tensors(layers, layers_path)
    adapters_path = find_file(source, ADAPTERS_FILE, subfolder)
    adapters, copies = _read_adapters(adapters_path, layers)
    checkpoint = OriginalCheckpoint(
        os.path.dirname(path), config, adapters, copies, layers, _find_code(source, subfolder), assumed
    )
    ranks = {tensor.shape[0] for key, tensor in adapters[ENCODER].items() if ".lora_A." in key}
    if "lora_r" not in config:
        config["lora_r"] = min(ranks)
        assumed.append(f"lora_r is missing: {min(ranks)}, the rank of the adapters")
    if ranks != {checkpoint.rank}:
        raise ConversionError(f"{adapters_path} has adapters of rank {ranks}, but {path} says lora_r {checkpoint.rank}")
    return checkpoint


def _read_config(path: str) -> tuple[dict, list[str]]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no JSON file: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != ORIGINAL_MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ConversionError(
            f"{path} has the model_type {found!r}, but a published checkpoint has {ORIGINAL_MODEL_TYPE!r}"
        )
    for key in ("doc_max_length", "compr_rate"):
        if not isinstance(config.get(key), int):
            raise ConversionError(f"{path} needs a whole number {key}, got {config.get(key)!r}")
    if config.get("compr_model_name") is not None or config.get("lora") is False:
        raise ConversionError(f"{path} describes a model with another compressor than an adapter of its decoder")
    missing = [key for key in SETTINGS if key not in config]
    config.update({key: SETTINGS[key] for key in missing})
    return config, [f"{key} is missing: {SETTINGS[key]}" for key in missing]


def _load(path: str):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors alike
        raise ConversionError(f"{path} is truncated, or no PyTorch file of tensors: {first_line(error)}") from error


def _check_tensors(values, path: str) -> None:
    is_state = isinstance(values, dict) and all(isinstance(value, torch.Tensor) for value in values.values())
    if not is_state or not values:
        raise ConversionError(f"{path} holds no named tensors: it is no file of this layout")
    for key, value in values.items():
        values[key] = value.detach()


def _read_adapters(path: str, layers: dict) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """LoRA weights by adapter, and which adapters held copies of the embeddings, which must equal `layers`."""
    values = _load(path)
    if not isinstance(values, dict) or not {DECODER, ENCODER} <= set(values) <= set(ADAPTER_NAMES):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ConversionError(f"{path} needs {DECODER}, {ENCODER} and perhaps {REASONER}, got {found}")
    adapters, copies = {}, []
    for name, tensors in values.items():
        _check_tensors(tensors, f"{path} ({name})")
        adapters[name] = {key: value for key, value in tensors.items() if LORA_KEY.fullmatch(key)}
        others = {key: value for key, value in tensors.items() if key not in adapters[name]}
        for key, value in others.items():
            if key not in layers or not same_tensor(value, layers[key]):
                raise ConversionError(f"{path} ({name}) holds {key}, which is not what {LAYERS_FILE} holds")
        if others and set(others) != set(layers):
            raise ConversionError(f"{path} ({name}) holds copies of {sorted(others)} only, not of {sorted(layers)}")
        copies += [name] if others else []
        first = next(iter(adapters))
        if not adapters[name] or set(adapters[name]) != set(adapters[first]):
            raise ConversionError(f"{path} is incomplete: {name} has {len(adapters[name])} LoRA weights")
    return adapters, copies


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every value."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _find_code(source: str, subfolder: str) -> str | None:
    for place in dict.fromkeys([subfolder, ""]):
        try:
            return find_file(source, CODE_FILE, place)
        except ConversionError:
            continue
    return None
