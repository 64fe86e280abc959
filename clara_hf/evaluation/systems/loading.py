"""Models for an evaluation, each on this process's device; what cannot be loaded is told in one sentence."""

import hashlib
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file

from clara_hf.data.files import content_digest
from clara_hf.evaluation.plan import NAMED
from clara_hf.program import models, read_json
from clara_hf.program.models import ModelSource
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaProcessor


# Files and folders beside a model that do not decide about its answers: logs, trainer states, results.
BESIDE_MODEL = (
    *(".*", "*.log", "*log.jsonl", "*.md", "runs", "events.out.*", "checkpoint-*", "trainer_state.json"),
    *(
        "training_args.bin",
        "optimizer*",
        "scheduler.pt",
        "rng_state*",
        "global_step*",
        "unfinished",
        "predictions",
        "cache",
        "trec",
    ),
    *("results.json", "table.*", "costs.*", "analysis.json", "*.html", "*.png", "*.svg"),
)


def is_object(model) -> bool:
    """Whether a model is given as an object, not by its folder or name."""
    return not isinstance(model, ModelSource)


def describe_clara(model) -> tuple[dict, CLaRaProcessor]:
    """What is to be known of a CLaRa checkpoint before its weights are loaded, and its processor.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, or another kind of model.
    """
    if is_object(model):
        return _facts(model.config), model.processor
    config = _clara_config(model)
    if model.folder.is_dir():
        if not any(model.folder.glob("*.safetensors")):
            raise OSError("it holds no weights (*.safetensors).")
        _check_weights(model.folder)
    return _facts(config), CLaRaProcessor.from_pretrained(model.model_name_or_path, config=config, **model.place)


def _facts(config: CLaRaConfig) -> dict:
    names = ("num_memory_tokens", "hidden_size", "doc_max_length", "top_k", "temperature")
    values = {"compression_rate": config.rate_in_use, **{name: getattr(config, name) for name in names}}
    return {**values, "base": config.base_model_name_or_path}


def load_clara(source: ModelSource) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint, ready to answer.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, an incomplete one, or another kind of model.
    """
    _clara_config(source)
    return _placed(models.load_clara(source), source)


def _placed(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    return (model if source.device_map else model.to(PartialState().device)).eval()


def _clara_config(source: ModelSource) -> CLaRaConfig:
    config = AutoConfig.from_pretrained(source.model_name_or_path, **source.place)
    if not isinstance(config, CLaRaConfig):
        raise ValueError(f"it holds a {config.model_type} model, not a CLaRa checkpoint.")
    if source.rate is not None:
        config.rate = source.rate
        config.validate_ranges()
    return config


def check_model(source: ModelSource, kind: str = "llm-listwise", needs_tokenizer: bool = True) -> None:
    """Looks whether a model is there and whole, without loading its weights.

    Args:
        source: the model.
        kind: the system that it is for, `llm-listwise` for any causal language model, or an adapter on one.
        needs_tokenizer: whether the tokenizer is taken from it, too.

    Raises:
        OSError, ValueError, ImportError: it is not, or the package that loads it is not installed.
    """
    if kind in NAMED and find_spec(NAMED[kind]) is None:
        raise ImportError(f"No module named {NAMED[kind]!r}")
    if source.folder.is_dir():
        _check_weights(source.folder)
    if kind == "dro":
        return AutoConfig.from_pretrained(describe_dro(source.model_name_or_path)["base"])
    name, place = source.model_name_or_path, source.place
    if NAMED.get(kind) == "sentence_transformers":
        from sentence_transformers.util import is_sentence_transformer_model

        if is_sentence_transformer_model(name):
            return  # its parts have configurations of their own
    if kind == "llm-listwise" and find_adapter_config_file(name, **place) is not None:
        AutoConfig.from_pretrained(PeftConfig.from_pretrained(name, **place).base_model_name_or_path)
    else:
        AutoConfig.from_pretrained(name, **place)
    if needs_tokenizer:
        AutoTokenizer.from_pretrained(name, **place)


def describe_dro(folder: str) -> dict:
    """Settings of what DRO's training saved, and its `base`.

    Raises:
        OSError: the folder holds none.
    """
    settings = Path(folder, "dro.json")
    if not settings.is_file():
        raise OSError(f"{folder} holds no {settings.name}, which DRO's training writes last")
    base = PeftConfig.from_pretrained(settings.parent / "selection").base_model_name_or_path
    return {**read_json(settings), "base": base}


def _check_weights(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with path.open("rb"), safe_open(path, "pt"):  # safetensors does not tell of a file that may not be read
                pass
        except SafetensorError as error:
            raise OSError(f"{path.name} is damaged ({error}).") from error


def load_causal_model(source: ModelSource) -> PreTrainedModel:
    """A causal language model, with its adapter if the folder holds one."""
    return _placed(AutoModelForCausalLM.from_pretrained(source.model_name_or_path, **source.options), source)


def load_chat_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer."""
    source = ModelSource(name)
    return load_causal_model(source), AutoTokenizer.from_pretrained(source.model_name_or_path, **source.place)


def load_text_model(source: ModelSource | None, clara: ModelSource | None) -> tuple[PreTrainedModel, CLaRaProcessor]:
    """The model that answers from raw text, and the processor that writes its prompts.

    Args:
        source: a causal language model or an adapter on one; without it, the decoder of `clara` without its adapters.
        clara: the CLaRa checkpoint whose prompts and tokenizer are used; without it, the model's own tokenizer and the
            default prompts.
    """
    if source is None:
        model = load_clara(clara)
        return without_adapters(model.decoder), model.processor
    model = load_causal_model(source)
    if clara is None:
        return model, plain_processor(source, model)
    return model, CLaRaProcessor.from_pretrained(clara.model_name_or_path, **clara.place)


def without_adapters(decoder: PreTrainedModel) -> PreTrainedModel:
    """Takes all LoRA layers off `decoder`, in place."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, LoraLayer):
            decoder.set_submodule(name, layer.get_base_layer())
    return decoder


def plain_processor(source: ModelSource, model: PreTrainedModel) -> CLaRaProcessor:
    """A processor with the default prompts over the tokenizer of a plain model."""
    tokenizer = AutoTokenizer.from_pretrained(source.model_name_or_path, **source.place)
    config = CLaRaConfig(decoder_config=model.config)
    added = CLaRaProcessor.add_tokens(tokenizer, config.num_memory_tokens, config.distinct_memory_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = model.generation_config.eos_token_id
    values = {**added, "pad_token_id": pad, "eos_token_id": end if end is not None else tokenizer.eos_token_id}
    for name, value in values.items():
        setattr(config, name, value)
    return CLaRaProcessor(tokenizer, config)


def model_hash(source: ModelSource, *without: str | Path) -> str:
    """Changes with what decides about a model's answers: its folder's files, or its commit on the Hub, and how it is
    loaded.

    Args:
        without: folders whose files do not count, should they lie in it.
    """
    place = source.folder.resolve()
    if place.is_dir():
        without = [other for other in (Path(other).resolve() for other in without) if place in other.parents]
        paths = [path for path in place.rglob("*") if path.is_file() and _decides(path.relative_to(place))]
        paths = [path for path in paths if not any(path.is_relative_to(other) for other in without)]
        found = content_digest(place, paths, "sha256")
    else:
        found = f"{ModelSource(source.model_name_or_path, source.revision)}@{_commit(source)}"
    chosen = {name: value for name, value in source.chosen.items() if name not in ("subfolder", "device_map")}
    return hashlib.sha256(f"{found} {sorted(chosen.items())}".encode()).hexdigest() if chosen else found


def _decides(path: Path) -> bool:
    return not any(fnmatch(part, pattern) for part in path.parts for pattern in BESIDE_MODEL)


def _commit(source: ModelSource) -> str | None:
    """The commit of a model on the Hub, as its configuration was fetched."""
    name, place = source.model_name_or_path, source.place
    path = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **place)
    return extract_commit_hash(path, None)


def model_fingerprint(model) -> str:
    """Changes with the adapters, the memory embeddings and the geometry of a CLaRa model in memory."""
    found = hashlib.sha256(model.compressor_fingerprint().encode())
    for key, value in model.decoder.named_parameters():
        if ".lora_" in key:
            found.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def store_form(path: str, model) -> list:
    """What is to be known of a memory store besides its model: where it is, and in which form it holds memories, to
    the bases that were fitted for it.

    Args:
        path: its folder; of a new store, the form is what `MemoryStore.open` will choose.
        model: the CLaRa model that makes its memories.
    """
    # Imported here: the store is an extra.
    from clara_hf.memory_store.store import MemoryStore

    place = Path(path).resolve()
    if place.exists():
        store = MemoryStore.open(place)
        return [str(place), str(store.dtype), store.stored_as]
    if is_object(model):
        dtype = str(model.config.dtype)
    else:
        dtype = str(_clara_config(model).dtype) if model.dtype == "auto" else model.dtype
    return [str(place), "torch.bfloat16" if dtype.endswith("bfloat16") else "torch.float16", "memory"]
