"""Checkpoints of the paper's release to this package's format, and back.

    python -m clara_hf.original.convert SRC OUT [--subfolder NAME] [--base NAME_OR_PATH] [--prompts_file FILE] [--full]
    python -m clara_hf.original.convert SRC OUT --to_original

SRC is a folder or a Hub id; OUT must not exist. Base weights are only read with `--full`; otherwise at most the base's
embedding matrices are, to see which rows differ.
"""

import copy
import json
import os
import shutil
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from clara_hf.program import UsageError, option, parse, run_program
from clara_hf.program.files import new_folder
from modeling_clara.configuration_clara import PROMPT_KINDS, CLaRaConfig
from modeling_clara.modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.processing_clara import CLaRaProcessor
from modeling_clara.weights_clara import NOTICES, absolute_place, embedding_keys

from .export import to_original
from .layout import (
    ADAPTER_NAMES,
    ADAPTERS_FILE,
    CONFIG_FILE,
    ENCODER,
    LAYERS_FILE,
    LORA_KEY,
    REASONER,
    OriginalCheckpoint,
    read_original,
)
from .prompts import prompts_from_code, prompts_from_file
from .weight_files import ConversionError, WeightFiles, first_line, write_json, write_weights


logger = logging.get_logger(__name__)

# The published code has no setting for these.
TEMPERATURE, DROPOUT, MSE_WEIGHT = 0.02, 0.1, 0.1
METHODS_MODULE = "original_methods_clara"
TOKENIZER_SAMPLE = "In 1871, Ana's  café\tsold 3.5 kg (of tea):\n\u2014 \u6771\u4eac."


@dataclass
class Base:
    """The decoder below the adapters: its place, and what is needed of it besides weights."""

    name: str
    config: object
    tokenizer: object
    eos_token_id: int | list[int] | None


def convert(
    source: str,
    out: str,
    subfolder: str = "",
    base: str | None = None,
    prompts: str | None = None,
    full: bool = False,
) -> str:
    """Write a published checkpoint in this package's format.

    Args:
        source (`str`): folder or Hub id.
        out (`str`): folder to write; it appears only when everything is in it.
        subfolder (`str`): of `source`, as in the published repositories.
        base (`str`, *optional*): folder or Hub id of the decoder; the one the checkpoint names by default.
        prompts (`str`, *optional*): JSON file of chat templates; by default those in the checkpoint's own code.
        full (`bool`): whether to write the base's weights too.

    Returns:
        What was found and assumed, as text of several lines.

    Raises:
        ConversionError: a file is missing, broken or of another kind; `out` is then not written.
        UsageError: `out` exists and holds something.
    """
    original = read_original(source, subfolder)
    decoder = _load_base(base or _named_base(original, source), original.assumed)
    templates, prompts_from = _find_prompts(original, prompts)
    report = {"source": os.path.join(source, subfolder), **_describe(original), "base": decoder.name}
    config = _make_config(original, decoder, templates)
    with torch.device("meta"):
        model = CLaRaForRetrievalGeneration(config)
    # The published code computes in the type that it saves, whatever the base's.
    model.to(next(iter(original.layers.values())).dtype)
    state = _make_state(original, model)
    config.saved_embedding_rows, rows = _rows_to_save(original.layers, decoder.name, min(config.added_token_ids))
    with new_folder(out) as folder:
        model.processor = CLaRaProcessor(decoder.tokenizer, config)
        config.checkpoint_format = "flat" if full else "adapter"
        model.save_pretrained(folder, state_dict=state)
        _check_tokenizer(folder, model.processor)
        _write_methods(folder)
        _copy_notices(source, subfolder, folder)
        if full:
            _write_full(folder, state, model, decoder.name)
    report |= {"embeddings": rows, "prompts": prompts_from, "written": f"{out} ({'full' if full else 'adapter-only'})"}
    assumed = [("assumed", sentence) for sentence in original.assumed]
    return "\n".join(f"{name:<12}{value}" for name, value in [*report.items(), *assumed])


def _copy_notices(source: str, subfolder: str, folder: str) -> None:
    """Copy the authors' licence and notices, from the checkpoint's folder or the root of its repository."""
    for name in NOTICES:
        for place in dict.fromkeys((subfolder, "")):
            path = cached_file(source, name, subfolder=place, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                shutil.copyfile(path, os.path.join(folder, name))
                break


def _write_methods(folder: str) -> None:
    """Give the checkpoint `folder` the method names of the release, as code of its own."""
    with open(os.path.join(os.path.dirname(__file__), "methods.py"), encoding="utf-8") as file:
        source = file.read()
    with open(os.path.join(folder, f"{METHODS_MODULE}.py"), "w", encoding="utf-8") as file:
        file.write(source.replace("from modeling_clara.", "from ."))
    path = os.path.join(folder, CONFIG_FILE)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["auto_map"]["AutoModel"] = f"{METHODS_MODULE}.OriginalCLaRa"
    write_json(path, config)


def _describe(original: OriginalCheckpoint) -> dict[str, str]:
    config = original.config
    names = [
        name + (" (with copies of the embeddings)" if name in original.copies else "") for name in original.adapters
    ]
    if REASONER not in original.adapters:
        names.append(f"no {REASONER}: copied from {ENCODER}")
    length, rate = config["doc_max_length"], config["compr_rate"]
    return {
        "stage": str(config.get("training_stage", "not stated")),
        "rate": f"{rate}: documents of {length} tokens to {length // rate} memory vectors",
        "adapters": f"rank {original.rank}; " + ", ".join(names),
    }


def _named_base(original: OriginalCheckpoint, source: str) -> str:
    """The decoder that the checkpoint names: a folder beside it, or else a path or a Hub id."""
    name = original.config.get("decoder_model_name")
    if not name:
        raise ConversionError(f"{original.folder} does not name its decoder: pass --base")
    parents = [
        original.folder,
        os.path.dirname(os.path.abspath(original.folder)),
        os.path.dirname(os.path.abspath(source)),
    ]
    for place in [os.path.join(parent, name) for parent in parents] + [name]:
        if os.path.isfile(os.path.join(place, CONFIG_FILE)):
            original.assumed.append(f"decoder_model_name {name!r} is the folder {os.path.abspath(place)}")
            return os.path.abspath(place)
    return name


def _load_base(name: str, assumed: list[str]) -> Base:
    name = os.path.abspath(name) if os.path.isdir(name) else name
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"the decoder {name!r} could not be loaded, pass --base with its place: {first_line(error)}"
        ) from error
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        eos = GenerationConfig.from_model_config(config).eos_token_id
    # The published code gives the tokenizers of Qwen, which have no beginning token, their first extra token, and can
    # run no other tokenizer without one.
    if tokenizer.bos_token is None:
        if not tokenizer.extra_special_tokens:
            raise ConversionError(f"the tokenizer of {name!r} has neither a beginning token nor extra special tokens")
        tokenizer.bos_token = str(tokenizer.extra_special_tokens[0])
        assumed.append(f"the tokenizer has no beginning token: {tokenizer.bos_token}, the first of its extra tokens")
    return Base(name, config, tokenizer, eos)


def _find_prompts(original: OriginalCheckpoint, path: str | None) -> tuple[dict, str]:
    if path is not None:
        templates, place = prompts_from_file(path), path
    elif original.code is not None:
        templates, place = prompts_from_code(original.code), original.code
    else:
        templates, place = {}, None
    missing = [kind for kind in PROMPT_KINDS if kind not in templates]
    if missing:
        logger.warning(
            f"No prompts of the checkpoint were found for {', '.join(missing)}: this package's own will be used, which "
            "it was not trained with. Pass --prompts_file with a JSON file of them."
        )
    found = [kind for kind in PROMPT_KINDS if kind in templates]
    sources = [f"{', '.join(found)} from {place}"] if found else []
    return templates, "; ".join(sources + ([f"{', '.join(missing)} are this package's own"] if missing else []))


def _make_config(original: OriginalCheckpoint, base: Base, templates: dict) -> CLaRaConfig:
    config, tokenizer = original.config, base.tokenizer
    count, distinct = config["doc_max_length"] // config["compr_rate"], bool(config["different_mem_tokens"])
    before = len(tokenizer)
    ids = CLaRaProcessor.add_tokens(tokenizer, count, distinct)
    rows = {len(matrix) for matrix in original.layers.values()}
    if rows != {len(tokenizer)}:
        raise ConversionError(
            f"{LAYERS_FILE} has {sorted(rows)} rows, but the tokenizer of {base.name!r} has {len(tokenizer)} tokens "
            f"({before} and {len(tokenizer) - before} added): this is another base, or another compr_rate"
        )
    decoder_config = copy.deepcopy(base.config)
    decoder_config.get_text_config().vocab_size = len(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.bos_token_id
    try:
        return CLaRaConfig(
            **ids,
            decoder_config=decoder_config,
            base_model_name_or_path=absolute_place(base.name),
            doc_max_length=config["doc_max_length"],
            compression_rate=config["compr_rate"],
            query_max_length=config["doc_max_length"],
            distinct_memory_tokens=distinct,
            top_k=config["generation_top_k"],
            temperature=TEMPERATURE,
            topk_taken_mask="published",
            query_reasoner=True,
            mse_weight=MSE_WEIGHT,
            lora_r=original.rank,
            lora_alpha=2 * original.rank,
            lora_dropout=DROPOUT,
            lora_target_modules=original.target_modules,
            keep_end_token=False,
            separated_slots=bool(config["sep"]),
            exact_prompt_end=False,
            split_control_tokens=False,
            prompts=templates,
            eos_token_id=base.eos_token_id,
            pad_token_id=pad,
            original={"config": original.config, "adapters": list(original.adapters), "copies": original.copies},
        )
    except ValueError as error:
        raise ConversionError(f"{os.path.join(original.folder, CONFIG_FILE)} cannot be followed: {error}") from error


def _make_state(original: OriginalCheckpoint, model: CLaRaForRetrievalGeneration) -> dict[str, torch.Tensor]:
    """Adapters, memory embeddings and embedding matrices under the names that `model` has for them, checked."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if type(model.get_input_embeddings()) is not torch.nn.Embedding:
        raise ConversionError(
            f"decoders that rescale token embeddings, as {type(model.decoder).__name__}, are not supported"
        )
    keys = [key for key in embedding_keys(model.decoder) if key is not None]
    if set(keys) != set(original.layers):
        raise ConversionError(f"{LAYERS_FILE} holds {sorted(original.layers)}, but the decoder needs {sorted(keys)}")
    matrices = {f"decoder.{key}": original.layers[key] for key in keys}
    state = {}
    for name, ours in ADAPTER_NAMES.items():
        # A copy, since tensors that share memory are saved once.
        weights = original.adapters.get(name) or {
            key: value.clone() for key, value in original.adapters[ENCODER].items()
        }
        for key, value in weights.items():
            match = LORA_KEY.fullmatch(key)
            state[f"decoder.{match['module']}.{match['half']}.{ours}.weight"] = value
    state["memory_embeddings.weight"] = matrices[f"decoder.{keys[0]}"][model.config.memory_token_ids].clone()
    for key, value in {**state, **matrices}.items():
        if tuple(value.shape) != expected.get(key):
            there = f"has {list(expected[key])}" if key in expected else "has no such weight"
            raise ConversionError(
                f"{key} has the shape {list(value.shape)}, but the decoder {model.config.base_model_name_or_path!r} "
                f"{there}: the checkpoint was made for another one"
            )
    lacking = [key for key in expected if ".lora_" in key and key not in state]
    if lacking:
        raise ConversionError(
            f"{ADAPTERS_FILE} lacks {len(lacking)} weights, {lacking[0]} among them: it is incomplete"
        )
    return state | matrices


def _rows_to_save(layers: dict[str, torch.Tensor], base: str, first_added: int) -> tuple[str, str]:
    """Which embedding rows an adapter-only checkpoint must keep: all, unless the base is seen to have the same."""
    try:
        weights = WeightFiles(base, local_files_only=True)
        found = {key: weights.get(key)[:first_added] for key in layers if key in weights}
    except OSError:
        return "all", "all rows kept, as the base's weights are not on this machine to compare with"
    for key, matrix in layers.items():
        theirs = found.get(key)
        ours = matrix[:first_added]
        if theirs is None or theirs.shape != ours.shape:
            return "all", f"all rows kept, as the base has no such {key}"
        dtype = torch.promote_types(theirs.dtype, ours.dtype)
        if not torch.equal(theirs.to(dtype), ours.to(dtype)):
            return "all", f"all rows kept, as {key} differs from the base's"
    return "added", "rows of the added tokens kept, all others are the base's"


def _check_tokenizer(folder: str, processor: CLaRaProcessor) -> None:
    """The tokenizer as it is loaded again must do what the base's does, and know the added tokens by their ids."""
    config = processor.config
    again = CLaRaProcessor.from_pretrained(folder, config=config)
    sample = [*processor.reserved_texts, processor.answer_prompt(TOKENIZER_SAMPLE, config.top_k), TOKENIZER_SAMPLE]
    ids, now = (one.tokenizer(sample, add_special_tokens=False)["input_ids"] for one in (processor, again))
    if ids != now or ids[:-2] != [[token] for token in config.added_token_ids]:
        raise ConversionError(f"the tokenizer of {config.base_model_name_or_path!r} changes when it is saved")


def _write_full(folder: str, state: dict, model: CLaRaForRetrievalGeneration, base: str) -> None:
    """Turn an adapter-only `folder` into a full one, file by file, with the base's weights under the model's names."""
    expected = set(model.state_dict())
    tied = set(model.decoder.all_tied_weights_keys) if embedding_keys(model.decoder)[1] is None else set()
    required = expected - {f"decoder.{key}" for key in tied}
    try:
        weights = WeightFiles(base)
    except OSError as error:
        raise ConversionError(f"--full needs the weights of {base!r} as safetensors: {first_line(error)}") from error
    names = {}
    for name in weights:
        module, _, leaf = name.rpartition(".")
        wrapped = f"decoder.{module}.base_layer.{leaf}"
        names[wrapped if wrapped in expected else f"decoder.{name}"] = name
    lacking = sorted(required - set(state) - set(names))
    if lacking:
        raise ConversionError(f"the files of {base!r} have no {lacking[0]} (of {len(lacking)}): convert without --full")
    os.remove(os.path.join(folder, SAFE_WEIGHTS_NAME))
    kept = [*state, *(name for name in names if name in required and name not in state)]
    write_weights(folder, kept, lambda name: state[name] if name in state else weights.get(names[name]))
    path = os.path.join(folder, CONFIG_FILE)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    write_json(path, {**config, "checkpoint_format": "full"})


@dataclass
class ConvertArguments:
    """What is converted, and where to; see [`convert`]."""

    source: str = option(help="Folder or Hub id of a checkpoint.", positional=True)
    output_dir: str = option(help="Folder to write; must not exist.", positional=True, aliases="--out")
    subfolder: str = option("", "Folder of the source, for instance compression-16.")
    base: str | None = option(None, "Folder or Hub id of the decoder; by default what the checkpoint names.")
    prompts_file: str | None = option(
        None, "JSON file of chat templates; by default those in the checkpoint's own code.", aliases="--prompts"
    )
    full: bool = option(False, "Write the base's weights too.")
    to_original: bool = option(False, "Write the published layout from this package's format.")

    def __post_init__(self):
        if self.to_original and (self.prompts_file or self.full):
            raise UsageError("prompts_file and full say nothing together with to_original: leave them out.")


def main(arguments: list[str] | None = None) -> None:
    """The command line.

    Raises:
        UsageError, ConversionError, OSError: one sentence each for the user.
    """
    options = parse(ConvertArguments, arguments, description=__doc__)
    places = options.source, options.output_dir, options.subfolder, options.base
    print(to_original(*places) if options.to_original else convert(*places, options.prompts_file, options.full))


if __name__ == "__main__":
    run_program(main)
