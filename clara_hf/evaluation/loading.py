"""Models for an evaluation, each on this process's device; what cannot be loaded is told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from clara_hf.evaluation.settings import UsageError
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaProcessor


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


def describe_clara(folder: str) -> tuple[dict, CLaRaProcessor]:
    """What is to be known of a CLaRa checkpoint before its weights are loaded, and its processor.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, or another kind of model.
    """
    config = _clara_config(folder)
    if not any(Path(folder).glob("*.safetensors")):
        raise OSError("it holds no weights (*.safetensors).")
    _check_weights(folder)
    names = ("compression_rate", "num_memory_tokens", "hidden_size", "doc_max_length", "top_k", "temperature")
    made = {name: getattr(config, name) for name in names}
    return {**made, "base": config.base_model_name_or_path}, CLaRaProcessor.from_pretrained(folder, config=config)


def load_clara(folder: str) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint, ready to answer.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, an incomplete one, or another kind of model.
    """
    _clara_config(folder)
    return CLaRaForRetrievalGeneration.from_pretrained(folder).to(PartialState().device).eval()


def _clara_config(folder: str) -> CLaRaConfig:
    config = AutoConfig.from_pretrained(folder)
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
    package = {
        "bi-encoder": "sentence_transformers",
        "cross-encoder": "sentence_transformers",
        "llmlingua2": "llmlingua",
    }
    if kind in package and find_spec(package[kind]) is None:
        raise ImportError(f"No module named {package[kind]!r}")
    if Path(name).is_dir():
        _check_weights(name)
    if kind == "bi-encoder":
        from sentence_transformers.util import is_sentence_transformer_model

        if is_sentence_transformer_model(name):
            return  # its parts have configurations of their own
    base = name
    if kind == "llm-listwise" and find_adapter_config_file(name) is not None:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    AutoConfig.from_pretrained(base)
    if needs_tokenizer:
        AutoTokenizer.from_pretrained(name)


def _check_weights(folder: str) -> None:
    for path in sorted(Path(folder).rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path.name} is damaged ({error}).") from error


def load_causal_model(name: str) -> PreTrainedModel:
    """A causal language model, with its adapter if the folder holds one."""
    return AutoModelForCausalLM.from_pretrained(name).to(PartialState().device).eval()


def load_chat_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer."""
    return load_causal_model(name), AutoTokenizer.from_pretrained(name)


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
    return model, CLaRaProcessor.from_pretrained(clara) if clara is not None else plain_processor(folder, model)


def without_adapters(decoder: PreTrainedModel) -> PreTrainedModel:
    """Takes all LoRA layers off `decoder`, in place."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, LoraLayer):
            decoder.set_submodule(name, layer.get_base_layer())
    return decoder


def plain_processor(folder: str, model: PreTrainedModel) -> CLaRaProcessor:
    """A processor with the default prompts over the tokenizer of a plain model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = CLaRaConfig(decoder_config=model.config)
    added = CLaRaProcessor.add_tokens(tokenizer, config.num_memory_tokens, config.distinct_memory_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = model.generation_config.eos_token_id
    values = {**added, "pad_token_id": pad, "eos_token_id": end if end is not None else tokenizer.eos_token_id}
    for name, value in values.items():
        setattr(config, name, value)
    return CLaRaProcessor(tokenizer, config)
