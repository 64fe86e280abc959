"""Models for an evaluation, each on this process's device; what cannot be loaded is told in one sentence."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file

from clara_hf.evaluation.plan import NAMED, UsageError
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


@contextmanager
def loading(argument: str, name: str) -> Iterator[None]:
    """Turns what goes wrong in loading `name` into one sentence.

    Raises:
        UsageError: names `argument`, `name` and the reason.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"{argument}: {name} cannot be loaded: {reason}") from error
    except ImportError as error:
        raise UsageError(f"{argument} needs a package that is not installed: {error}") from error


def is_object(model) -> bool:
    """Whether a model is given as an object, not by its folder or name."""
    return not isinstance(model, (str, Path))


def on_hub(name: str) -> tuple[str, dict[str, str]]:
    """A model's name, and the revision behind its `@` as an argument of `from_pretrained`; a folder is as it is."""
    if Path(name).exists() or "@" not in str(name):
        return str(name), {}
    name, revision = str(name).rsplit("@", 1)
    return name, {"revision": revision}


def describe_clara(model) -> tuple[dict, CLaRaProcessor]:
    """What is to be known of a CLaRa checkpoint before its weights are loaded, and its processor.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, or another kind of model.
    """
    if is_object(model):
        return _facts(model.config), model.processor
    config = _clara_config(model)
    if Path(model).is_dir():
        if not any(Path(model).glob("*.safetensors")):
            raise OSError("it holds no weights (*.safetensors).")
        _check_weights(model)
    name, place = on_hub(model)
    return _facts(config), CLaRaProcessor.from_pretrained(name, config=config, **place)


def _facts(config: CLaRaConfig) -> dict:
    names = ("compression_rate", "num_memory_tokens", "hidden_size", "doc_max_length", "top_k", "temperature")
    return {**{name: getattr(config, name) for name in names}, "base": config.base_model_name_or_path}


def load_clara(folder: str) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint, ready to answer.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, an incomplete one, or another kind of model.
    """
    _clara_config(folder)
    name, place = on_hub(folder)
    return CLaRaForRetrievalGeneration.from_pretrained(name, **place).to(PartialState().device).eval()


def _clara_config(folder: str) -> CLaRaConfig:
    name, place = on_hub(folder)
    config = AutoConfig.from_pretrained(name, **place)
    if not isinstance(config, CLaRaConfig):
        raise ValueError(f"it holds a {config.model_type} model, not a CLaRa checkpoint.")
    return config


def check_model(name: str, kind: str = "llm-listwise", needs_tokenizer: bool = True) -> None:
    """Looks whether a model is there and whole, without loading its weights.

    Args:
        name: a local folder, or a name on the Hub.
        kind: the system that it is for, `llm-listwise` for any causal language model, or an adapter on one.
        needs_tokenizer: whether the tokenizer is taken from it, too.

    Raises:
        OSError, ValueError, ImportError: it is not, or the package that loads it is not installed.
    """
    if kind in NAMED and find_spec(NAMED[kind]) is None:
        raise ImportError(f"No module named {NAMED[kind]!r}")
    if Path(name).is_dir():
        _check_weights(name)
    if kind == "bi-encoder":
        from sentence_transformers.util import is_sentence_transformer_model

        if is_sentence_transformer_model(name):
            return  # its parts have configurations of their own
    name, place = on_hub(name)
    if kind == "llm-listwise" and find_adapter_config_file(name, **place) is not None:
        AutoConfig.from_pretrained(PeftConfig.from_pretrained(name, **place).base_model_name_or_path)
    else:
        AutoConfig.from_pretrained(name, **place)
    if needs_tokenizer:
        AutoTokenizer.from_pretrained(name, **place)


def _check_weights(folder: str) -> None:
    for path in sorted(Path(folder).rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path.name} is damaged ({error}).") from error


def load_causal_model(name: str) -> PreTrainedModel:
    """A causal language model, with its adapter if the folder holds one."""
    name, place = on_hub(name)
    return AutoModelForCausalLM.from_pretrained(name, **place).to(PartialState().device).eval()


def load_chat_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer."""
    place = on_hub(name)
    return load_causal_model(name), AutoTokenizer.from_pretrained(place[0], **place[1])


def load_text_model(folder: str | None, clara: str | None) -> tuple[PreTrainedModel, CLaRaProcessor]:
    """The model that answers from raw text, and the processor that writes its prompts.

    Args:
        folder: a causal language model or an adapter on one; without it, the decoder of `clara` without its adapters.
        clara: the CLaRa checkpoint whose prompts and tokenizer are used; without it, the model's own tokenizer and the
            default prompts.
    """
    if folder is None:
        model = load_clara(clara)
        return without_adapters(model.decoder), model.processor
    model = load_causal_model(folder)
    if clara is None:
        return model, plain_processor(folder, model)
    name, place = on_hub(clara)
    return model, CLaRaProcessor.from_pretrained(name, **place)


def without_adapters(decoder: PreTrainedModel) -> PreTrainedModel:
    """Takes all LoRA layers off `decoder`, in place."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, LoraLayer):
            decoder.set_submodule(name, layer.get_base_layer())
    return decoder


def plain_processor(folder: str, model: PreTrainedModel) -> CLaRaProcessor:
    """A processor with the default prompts over the tokenizer of a plain model."""
    name, place = on_hub(folder)
    tokenizer = AutoTokenizer.from_pretrained(name, **place)
    config = CLaRaConfig(decoder_config=model.config)
    added = CLaRaProcessor.add_tokens(tokenizer, config.num_memory_tokens, config.distinct_memory_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = model.generation_config.eos_token_id
    values = {**added, "pad_token_id": pad, "eos_token_id": end if end is not None else tokenizer.eos_token_id}
    for name, value in values.items():
        setattr(config, name, value)
    return CLaRaProcessor(tokenizer, config)


def model_hash(folder: str, *without: str | Path) -> str:
    """Changes with every file in a model's folder that may decide about its answers; of a name on the Hub, its commit.

    Args:
        without: folders whose files do not count, should they lie in it.
    """
    if not Path(folder).is_dir():
        return f"{folder}@{_commit(folder)}"
    place = Path(folder).resolve()
    without = [other for other in (Path(other).resolve() for other in without) if place in other.parents]
    paths = []
    for path in place.rglob("*"):
        parts = path.relative_to(place).parts
        beside = any(fnmatch(part, pattern) for part in parts for pattern in BESIDE_MODEL)
        if path.is_file() and not beside and not any(path.is_relative_to(other) for other in without):
            paths.append(path)
    return files_hash(place, paths)


def files_hash(root: Path, paths: list[Path]) -> str:
    """Digest of files: their names from `root` on, and what they hold."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _commit(name: str) -> str | None:
    """The commit of a model on the Hub, as its configuration was fetched."""
    name, place = on_hub(name)
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
    dtype = str((model.config if is_object(model) else _clara_config(model)).dtype)
    return [str(place), "torch.bfloat16" if dtype.endswith("bfloat16") else "torch.float16", "memory"]
