"""A checkpoint of this package in the layout of the paper's release."""

import json
import os

import torch

from clara_hf.program.files import new_folder
from modeling_clara.adapters_clara import QUERY_REASONER
from modeling_clara.configuration_clara import ORIGINAL_MODEL_TYPE, CLaRaConfig
from modeling_clara.modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.weights_clara import (
    ADDED_INPUT_ROWS,
    ADDED_OUTPUT_ROWS,
    embedding_keys,
    fit_rows,
    place_of_base,
    read_adapter_checkpoint,
)

from .layout import (
    ADAPTER_NAMES,
    ADAPTERS_FILE,
    CONFIG_FILE,
    DECODER,
    ENCODER,
    LAYERS_FILE,
    REASONER,
    find_file,
    same_tensor,
)
from .weight_files import ConversionError, WeightFiles, first_line, write_json


# What `config.json` of a model holds that was not converted from a published one; the rest follows from its settings.
_NEW_CONFIG = {
    "ae_mode": "token",
    "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
    "compr_model_name": None,
    "load_adapters": True,
    "lora": True,
    "model_type": ORIGINAL_MODEL_TYPE,
    "optimize_mem_tokens": True,
    "quantization": "no",
    "training_form": "both_separately",
}
# Settings that the published code has fixed; other values are lost on the way, and the model then computes otherwise.
_FIXED = {
    "keep_end_token": False,
    "exact_prompt_end": False,
    "split_control_tokens": False,
    "topk_taken_mask": "published",
    "temperature": 0.02,
}


def to_original(source: str, out: str, subfolder: str = "", base: str | None = None) -> str:
    """Write a checkpoint in the published layout; its modelling code is the release's, and is not written.

    Args:
        source (`str`): folder or Hub id of a checkpoint of this package.
        out (`str`): folder to write; it appears only when everything is in it.
        subfolder (`str`): of `source`.
        base (`str`, *optional*): place of the decoder, if it is not where the configuration says.

    Returns:
        What was written, and which settings the layout cannot hold, as text of several lines.

    Raises:
        ConversionError: `source` is no checkpoint of this package, or holds what the layout cannot.
    """
    path = find_file(source, CONFIG_FILE, subfolder)
    with open(path, encoding="utf-8") as file:
        found = json.load(file).get("model_type")
    if found != CLaRaConfig.model_type:
        raise ConversionError(f"{path} has the model_type {found!r}: only a checkpoint of this package has a way back")
    config = CLaRaConfig.from_pretrained(os.path.dirname(path))
    base = base or place_of_base(config.base_model_name_or_path, os.path.dirname(path))
    if config.lora_alpha != 2 * config.lora_r:
        raise ConversionError(f"lora_alpha is {config.lora_alpha}, but the published code always takes twice lora_r")
    _check_memories(config)
    with torch.device("meta"):
        model = CLaRaForRetrievalGeneration(config)
    try:
        is_full = config.checkpoint_format == "full"
        weights = WeightFiles(source, subfolder) if is_full else read_adapter_checkpoint(os.path.dirname(path))
    except OSError as error:
        raise ConversionError(f"{os.path.dirname(path)} has no weights: {first_line(error)}") from error
    layers = _embedding_matrices(weights, model, base)
    adapters = _adapters(weights, model, config.original)
    values = _config_values(config, adapters)
    for name in (config.original or {}).get("copies", []):
        adapters[name] |= layers
    with new_folder(out) as folder:
        write_json(os.path.join(folder, CONFIG_FILE), values)
        torch.save(adapters, os.path.join(folder, ADAPTERS_FILE))
        parameters = {key: torch.nn.Parameter(value, requires_grad=False) for key, value in layers.items()}
        torch.save(parameters, os.path.join(folder, LAYERS_FILE))
    lost = [f"{name} {getattr(config, name)!r}" for name, fixed in _FIXED.items() if getattr(config, name) != fixed]
    lines = [f"adapters    {', '.join(adapters)}", f"written     {out}"]
    if lost:
        lines.append(f"lost        {', '.join(lost)}: the published code has these fixed")
    return "\n".join(lines)


def _check_memories(config: CLaRaConfig) -> None:
    """Raise a `ConversionError` for memories that the published code does not make: it would read other ones."""
    if len(config.compression_rates) > 1:
        raise ConversionError(
            f"compression_rate is {config.compression_rates}, but the published layout holds one rate: such a "
            "checkpoint has no way back"
        )
    usual = {"readout": "memory_tokens", "layers_that_read": None, "memory_projection": False, "memory_scale": None}
    for name, value in usual.items():
        if (found := getattr(config, name)) != value:
            name = name.replace("layers_that_read", "compressor_layers")
            raise ConversionError(
                f"{name} is {found!r}, but the published code makes memories from the last layer's states at memory "
                "tokens, as they are: such a checkpoint has no way back"
            )


def _embedding_matrices(
    weights: WeightFiles | dict, model: CLaRaForRetrievalGeneration, base: str
) -> dict[str, torch.Tensor]:
    """Embedding matrices `[tokens, H]` by their name in the decoder, as long as the tokenizer."""
    config = model.config
    end = max(config.added_token_ids) + 1
    matrices = {}
    for name, key in zip((ADDED_INPUT_ROWS, ADDED_OUTPUT_ROWS), embedding_keys(model.decoder), strict=True):
        if key is None:
            continue
        if config.checkpoint_format == "full":
            matrix = weights.get(f"decoder.{key}")
        elif config.saved_embedding_rows == "all":
            matrix = weights.get(name)
        else:
            added = weights.get(name)
            matrix = fit_rows(_base_weights(base).get(key), config.vocab_size).to(added.dtype, copy=True)
            matrix[config.added_token_ids] = added
        matrices[key] = matrix[:end].clone()
    memory = weights.get("memory_embeddings.weight")
    inputs = matrices[embedding_keys(model.decoder)[0]]
    inputs[config.memory_token_ids] = memory.to(inputs.dtype)
    return matrices


def _base_weights(base: str) -> WeightFiles:
    try:
        return WeightFiles(base)
    except OSError as error:
        raise ConversionError(
            f"the embeddings of the base {base!r} are needed, pass --base with its place: {first_line(error)}"
        ) from error


def _adapters(
    weights: WeightFiles | dict, model: CLaRaForRetrievalGeneration, original: dict | None
) -> dict[str, dict[str, torch.Tensor]]:
    """LoRA weights by published adapter name; without a query reasoner that is still the copy the conversion made."""
    adapters = {}
    for name in dict.fromkeys([*(original or {}).get("adapters", []), DECODER, ENCODER, REASONER]):
        mark = f".{ADAPTER_NAMES[name]}.weight"
        if ADAPTER_NAMES[name] != QUERY_REASONER or model.config.query_reasoner:
            keys = [key for key in model.state_dict() if ".lora_" in key and key.endswith(mark)]
            adapters[name] = {key.removeprefix("decoder.").replace(mark, ".weight"): weights.get(key) for key in keys}
    if original and REASONER in adapters and REASONER not in original["adapters"]:
        pairs = zip(adapters[REASONER].values(), adapters[ENCODER].values(), strict=True)
        if all(same_tensor(one, other) for one, other in pairs):
            del adapters[REASONER]
    return adapters


def _config_values(config: CLaRaConfig, adapters: dict) -> dict:
    own = {
        "compr_rate": config.compression_rate,
        "different_mem_tokens": config.distinct_memory_tokens,
        "doc_max_length": config.doc_max_length,
        "generation_top_k": config.top_k,
        "lora_r": config.lora_r,
        "sep": config.separated_slots,
    }
    if config.original is None:
        stage = "stage2" if REASONER in adapters else "stage1"
        return {**_NEW_CONFIG, **own, "decoder_model_name": config.base_model_name_or_path, "training_stage": stage}
    values = {**config.original["config"], **own}
    if REASONER in adapters and REASONER not in config.original["adapters"]:
        values["training_stage"] = "stage2"
    return values
