"""A model as an argument names it: in a folder or on the Hub, CLaRa checkpoint or plain base, and how it is loaded."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from clara_hf.program import UsageError, option, read_json
from clara_hf.program.errors import loading
from clara_hf.program.paths import check_model_name
from clara_hf.program.values import checked_mapping
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.pretrained_clara import SET_BY_FROM_BASE
from modeling_clara.quantization_clara import quantize_base


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelSource:
    """A model, and how it is loaded. As a text: a folder, or a Hub id with or without `@revision`.

    Parameters:
        model_name_or_path (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        subfolder (`str`): where the model lies in the folder or repository.
        dtype (`str`): of the weights, or `auto`.
        attn_implementation (`str`, *optional*): attention kernel, as in `from_pretrained`.
        device_map (`str` or `dict`, *optional*): where layers go, as in `from_pretrained`.
        load_in_4bit, load_in_8bit (`bool`): quantize the frozen base, see
            [`~modeling_clara.quantization_clara.quantize_base`].
        rate (`int`, *optional*): which of several compression rates of a CLaRa model is used; a stage trains it alone.
        gguf_file (`str`, *optional*): name of the base's GGUF file in its folder, see
            [`~modeling_clara.quantization_clara.dequantized`].
    """

    model_name_or_path: str = option(help="A CLaRa checkpoint or a causal language model.")
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", aliases="--model_revision")
    subfolder: str = option("", "Folder of the model within its folder or repository.")
    dtype: str = option("auto", "Dtype of the weights.", choices=DTYPES)
    attn_implementation: str | None = option(None, "Attention kernel.")
    device_map: dict | str | None = option(None, "Placement of the layers, such as auto.")
    load_in_4bit: bool = option(False, "Quantize the frozen base to 4 bits (QLoRA).")
    load_in_8bit: bool = option(False, "Quantize the frozen base to 8 bits.")
    rate: int | None = option(None, "Which of the model's several compression rates to use.")
    gguf_file: str | None = option(None, "GGUF file in the base's folder; it is dequantized beside it, once.")

    def __post_init__(self):
        name, _, revision = self.model_name_or_path.rpartition("@")
        if name and self.revision is None and not Path(self.model_name_or_path).exists():
            self.model_name_or_path, self.revision = name, revision
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError("load_in_4bit and load_in_8bit are both set: choose one.")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}.")

    def __str__(self) -> str:
        """The name with what else is set, for messages and as a key."""
        name = f"{self.model_name_or_path}@{self.revision}" if self.revision else self.model_name_or_path
        return " ".join([name, *(f"{option}={value}" for option, value in self.chosen.items())])

    @property
    def chosen(self) -> dict[str, Any]:
        """What is set besides name and revision."""
        values = {one.name: getattr(self, one.name) for one in fields(ModelSource)[2:]}
        return {one.name: values[one.name] for one in fields(ModelSource)[2:] if values[one.name] != one.default}

    @property
    def setting(self) -> str | dict[str, Any]:
        """As it stands in a settings file: its name, or a mapping where more is set."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"model_name_or_path": self.model_name_or_path, **revision, **self.chosen} if self.chosen else str(self)

    @property
    def folder(self) -> Path:
        """Where it lies, if it is local."""
        return Path(self.model_name_or_path, self.subfolder)

    @property
    def place(self) -> dict[str, Any]:
        """Where it lies, as arguments of every `from_pretrained`."""
        places = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in places.items() if value}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a model's `from_pretrained`."""
        own = {"attn_implementation": self.attn_implementation, "device_map": self.device_map}
        return {"dtype": self.dtype, **self.place, **{name: value for name, value in own.items() if value}}

    @property
    def is_clara(self) -> bool:
        """Whether its configuration, on disk or on the Hub, is that of a CLaRa checkpoint.

        Raises:
            UsageError: there is no model.
        """
        if self.gguf_file is not None:
            return False
        folder = self.folder
        check_model_name("model_name_or_path", self.model_name_or_path, self.revision)
        if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
            raise UsageError(f"{folder} holds no model: finish the stage that writes it, or name another folder.")
        try:
            config, _ = PreTrainedConfig.get_config_dict(self.model_name_or_path, **self.place)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"there is no model {self.model_name_or_path}: {reason}") from error
        return config.get("model_type") == CLaRaConfig.model_type


@dataclass
class CLaRaModelArguments(ModelSource):
    """Where a stage's model comes from: a [`ModelSource`], and what is set in its configuration.

    Parameters:
        clara_config (`dict`): fields of [`CLaRaConfig`]; they make a new model and override those of a checkpoint.
        prompts_file (`str`, *optional*): JSON file with the `prompts` of the configuration.
    """

    clara_config: dict | None = option(None, "Fields of CLaRaConfig, YAML or JSON.", fields_of=CLaRaConfig)
    prompts_file: str | None = option(None, "JSON file with prompts.")

    def __post_init__(self):
        super().__post_init__()
        self.clara_config = checked_mapping(self.clara_config or {}, CLaRaConfig, "clara_config")
        if set_elsewhere := sorted({"dtype", *SET_BY_FROM_BASE} & set(self.clara_config)):
            name = set_elsewhere[0]
            remedy = "give it beside clara_config" if name == "dtype" else "the base and its tokenizer set it"
            raise UsageError(f"clara_config takes no {name}: {remedy}.")

    def fields(self) -> dict[str, Any]:
        """What is set in the configuration, prompts included."""
        prompts = {"prompts": read_json(self.prompts_file)} if self.prompts_file else {}
        return {**(self.clara_config or {}), **prompts}


def load_clara(source: ModelSource, **settings) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint, or a new CLaRa model over a causal language model.

    Args:
        settings: fields of [`CLaRaConfig`].

    Raises:
        UsageError: there is no model.
        ImportError, ValueError: the base cannot be quantized, see [`~modeling_clara.quantization_clara.quantize_base`].
    """
    name = source.model_name_or_path
    settings |= {} if source.rate is None else {"rate": source.rate}
    if source.is_clara:
        model = CLaRaForRetrievalGeneration.from_pretrained(name, **source.options, **settings)
    else:
        own = {**source.options, "gguf_file": source.gguf_file}
        model = CLaRaForRetrievalGeneration.from_base(name, **own, **settings)
    if source.load_in_4bit or source.load_in_8bit:
        quantize_base(model, 4 if source.load_in_4bit else 8)
    return model


def load_trained(source: ModelSource, device: str | None = None) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint to be used: in evaluation mode, and on `device`, by default the accelerator if there is one.

    Raises:
        UsageError: there is no model, or it is a plain language model.
    """
    if not source.is_clara:
        raise UsageError(f"{source} is no CLaRa checkpoint: train one from it, or name another model.")
    with loading("model", source):
        model = load_clara(source).eval()
    if source.device_map is not None and device is None:
        return model
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or accelerator or "cpu")


def load_model(args: CLaRaModelArguments) -> CLaRaForRetrievalGeneration:
    """The model of a stage, see [`load_clara`]."""
    return load_clara(args, **args.fields())
