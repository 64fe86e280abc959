"""How a CLaRa model is made from a base, loaded and saved: in full, or adapter-only over a named base."""

import copy
import os
from dataclasses import fields as fields_of
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCardData
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .adapters_clara import (
    COMPRESSOR,
    GENERATOR,
    QUERY_REASONER,
    add_adapter,
    checkpoint_under_adapter,
    copy_adapter,
    keeping_attention,
    lora_layers,
)
from .configuration_clara import (
    HUB_ARGUMENTS,
    CLaRaConfig,
    as_loaded,
    check_others_can_load,
    give_usual_rights,
    is_hub_id,
)
from .decoding_clara import check_has_first_layers
from .functional_clara import copy_whole, gathered, whole_copy
from .processing_clara import CLaRaProcessor, end_token_ids, padding_id
from .quantization_clara import base_only, dequantized, refuse_quantized, settle_quantized
from .weights_clara import (
    ADDED_INPUT_ROWS,
    ADDED_OUTPUT_ROWS,
    BASE_SAMPLE,
    absence_told,
    absolute_place,
    check_complete,
    check_has_weights,
    damage_told,
    decoder_state,
    embedding_keys,
    fill_added_rows,
    fingerprint,
    is_other_base,
    is_own_weight,
    keep_release,
    load_base,
    merge_adapters,
    open_repository,
    place_of_base,
    push_folder,
    quiet_load_report,
    read_adapter_checkpoint,
    remove_stale_weights,
    sample_base,
    saved_format,
    saved_rows,
    split_adapters,
    unpartitioned,
    write_adapters,
)


logger = logging.get_logger(__name__)

# What `from_base` takes besides fields: for the base and its tokenizer, for the base alone, for the new model.
_READ_OPTIONS = (*HUB_ARGUMENTS, "trust_remote_code")
# Of the first, what says where in its repository a checkpoint lies, and so nothing of the base under its adapters.
_OF_CHECKPOINT = ("revision", "subfolder")
_BASE_OPTIONS = ("use_safetensors", "variant", "weights_only", "low_cpu_mem_usage")
_PLACE_OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_buffers", "quantization_config")
_TOKEN_IDS = ("memory_token_ids", "ae_token_id", "enc_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
_PUSH_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
SET_BY_FROM_BASE = ("decoder_config", *_TOKEN_IDS)


class CLaRaPreTrainedModel(PreTrainedModel):
    """A decoder with three LoRA adapters and memory embeddings; everything about their weights on disk."""

    config: CLaRaConfig
    decoder: PreTrainedModel
    memory_embeddings: nn.Embedding
    memory_projection: nn.Linear
    quantized_by: str | None
    config_class = CLaRaConfig
    base_model_prefix = "clara"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CLaRaConfig):
        super().__init__(config)
        number_of_ids = len(config.added_token_ids) - 3
        if config.pad_token_id is None:
            raise ValueError("this CLaRaConfig has no pad_token_id: set it, to the base's or any other id.")
        self.decoder = AutoModelForCausalLM.from_config(config.decoder_config, dtype=torch.get_default_dtype())
        if config.layers_that_read is not None:
            check_has_first_layers(self.decoder)
        for name in self.adapter_names:
            add_adapter(self.decoder, name, config)
        self.memory_embeddings = nn.Embedding(number_of_ids, config.hidden_size)
        if config.memory_projection:
            self.memory_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self._processor = None
        self._hub_arguments = {}
        self._base_sample = None
        self.quantized_by = None
        self.post_init()

    @classmethod
    def can_generate(cls) -> bool:
        """`False`: `generate` takes texts and is the model's own, also where transformers mixes its own into remote
        code; a `generation_config.json` of the checkpoint would mean nothing."""
        return False

    @property
    def adapter_names(self) -> list[str]:
        return [COMPRESSOR, GENERATOR] + ([QUERY_REASONER] if self.config.query_reasoner else [])

    @property
    def processor(self) -> CLaRaProcessor:
        """The checkpoint's processor, loaded from the model's folder or repository on first use.

        Raises:
            OSError: its files are missing or damaged, or the model was not loaded from anywhere.
        """
        if self._processor is None:
            if not self.name_or_path:
                raise OSError("the model was loaded from no checkpoint: set model.processor to a CLaRaProcessor.")
            self._processor = CLaRaProcessor.from_pretrained(
                self.name_or_path, config=self.config, **self._hub_arguments
            )
        return self._processor

    @processor.setter
    def processor(self, processor: CLaRaProcessor):
        self._processor = processor

    @property
    def device(self) -> torch.device:
        """Where inputs go: the first weight's device, or the one that it is brought to where it is offloaded."""
        device = super().device
        if device.type != "meta":
            return device
        hooks = (module._hf_hook for module in self.modules() if hasattr(module, "_hf_hook"))
        places = (hook.execution_device for hook in hooks if hasattr(hook, "execution_device"))
        return torch.device(next((place for place in places if place is not None), device))

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def resize_token_embeddings(self, *arguments, **options):
        """Refused: the rows that a checkpoint keeps are known by the ids of its own added tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a CLaRa model's vocabulary is that of its base with its own tokens behind it, and cannot be resized: add "
            "tokens to the base and its tokenizer, save both, and call from_base on them."
        )

    def add_adapter(self, *arguments, **options):
        """Refused, as are `load_adapter` and `peft.get_peft_model`: no forward pass would use a further adapter.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a CLaRa model has adapters of its own, and would not use another one: set their shape (lora_r, "
            "lora_target_modules, ...) in from_base, and train them as they are. After get_peft_model, which has "
            "changed it, load the model again."
        )

    load_adapter = add_adapter

    @property
    def peft_config(self):
        # PEFT sets it after it put its adapters in: what it had done would else be silently without effect.
        raise AttributeError("a CLaRa model is none of PEFT's")

    @peft_config.setter
    def peft_config(self, value):
        self.add_adapter()

    def initialize_weights(self):
        # Left to the decoder's own rule, a missing lora_B would be drawn at random instead of being zero.
        for layer in lora_layers(self.decoder):
            for name in layer.lora_A:
                weights = (layer.lora_A[name], layer.lora_B[name])
                if not all(getattr(module.weight, "_is_hf_initialized", False) for module in weights):
                    layer.reset_lora_parameters(name, True)
                for module in weights:
                    module._is_hf_initialized = True
        super().initialize_weights()

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        function = checkpoint_under_adapter(self.decoder, keeping_attention(gradient_checkpointing_func))
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)

    @classmethod
    def from_base(
        cls,
        base_model_name_or_path: str,
        dtype="auto",
        attn_implementation: str | None = None,
        gguf_file: str | None = None,
        **fields,
    ):
        """A new CLaRa model over a causal language model: fresh adapters, added tokens, everything frozen.

        Memory tokens and slot markers get ids behind the tokenizer's last one; where the base's vocabulary is padded
        they take padding rows, and it is enlarged only if they do not fit.

        Args:
            base_model_name_or_path (`str`): folder or Hub id of a model for `AutoModelForCausalLM`.
            dtype (`str` or `torch.dtype`): of all weights; `"auto"` takes the base's.
            attn_implementation (`str`, *optional*): as in `from_pretrained`.
            gguf_file (`str`, *optional*): name of a GGUF file in that folder, which becomes a base beside it on first
                use, see [`~quantization_clara.dequantized`]; with `dtype="auto"` in float32.
            fields: of [`CLaRaConfig`]; among them, as in `from_pretrained`, options of the Hub (`revision`, `token`,
                ...), of reading the base's weights and of placing the model (`device_map`, ...).

        Raises:
            OSError: there is no base at `base_model_name_or_path`.
            ValueError: an unknown field, one out of range, a base that is a CLaRa checkpoint, or a `device_map` that
                offloads layers with adapters.
        """
        name = os.fspath(base_model_name_or_path)
        fields, read, own, place = _split_base_arguments(fields)
        dtype = _checked_dtype(dtype)
        if gguf_file is not None or os.path.isdir(name):
            name = os.path.join(name, read.pop("subfolder", "")) if read.get("subfolder") else name
        if gguf_file is not None:
            name = dequantized(name, gguf_file, dtype)
        if read.get("subfolder") and fields.get("checkpoint_format", "full") != "full":
            raise ValueError(
                f"checkpoint_format is {fields['checkpoint_format']!r}, but the base is in the subfolder "
                f"{read['subfolder']!r} of {name}, where adapters alone could not find it again: save 'full'."
            )
        base = load_base(name, dtype, **read, **own)
        tokenizer = AutoTokenizer.from_pretrained(name, **read)
        first_added = len(tokenizer)
        geometry = CLaRaConfig(**fields)
        ids = CLaRaProcessor.add_tokens(tokenizer, geometry.most_memory_tokens, geometry.distinct_memory_tokens)
        decoder_config = copy.deepcopy(base.config)
        text_config = decoder_config.get_text_config()
        # The ids of a tokenizer may have gaps, so that its length is not what it needs.
        needed = max(tokenizer.get_vocab().values()) + 1
        text_config.vocab_size = max(base.get_input_embeddings().weight.shape[0], needed)
        config = CLaRaConfig(
            **fields,
            **ids,
            decoder_config=decoder_config,
            base_model_name_or_path=absolute_place(name),
            eos_token_id=end_token_ids(tokenizer, base.generation_config),
            pad_token_id=padding_id(tokenizer),
        )
        with unpartitioned():
            state = decoder_state(cls, base, config)
        fill_added_rows(state, base, config, first_added)
        if quantization := place.get("quantization_config"):
            place["quantization_config"] = base_only(quantization, config)
        with quiet_load_report():
            place |= {"dtype": base.dtype, "attn_implementation": attn_implementation}
            model, info = cls._load(None, config=config, state_dict=state, **place)
        info["missing_keys"] = {key for key in info["missing_keys"] if ".lora_" not in key}
        check_complete(info, f"a model over the base {name!r}")
        # Adapters that are made after loading have no place where accelerate would find them.
        model._check_all_at_hand({key: value for key, value in model.state_dict().items() if is_own_weight(key)})
        if quantization:
            settle_quantized(model, place["quantization_config"])
        if config.query_reasoner:
            copy_adapter(model.decoder, COMPRESSOR, QUERY_REASONER)
        model._base_sample = sample_base(state, config)
        model.processor = CLaRaProcessor(tokenizer, model.config)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a CLaRa checkpoint, full or adapter-only, frozen and in evaluation mode.

        Arguments are those of `PreTrainedModel.from_pretrained`; fields of [`CLaRaConfig`] among them override the
        checkpoint's, for instance `base_model_name_or_path` where the base has moved. An adapter-only checkpoint finds
        a base that is named by a path relative to the checkpoint's own folder; options of the Hub (`token`,
        `cache_dir`, ...) and of reading weights (`variant`, ...) are for the base too, except `revision` and
        `subfolder`. `checkpoint_format` says how to save from now on, not how the checkpoint was saved. Of overridden
        `prompts`, kinds that are left out are the default ones.

        Raises:
            OSError: no checkpoint or no weights at `pretrained_model_name_or_path`, or damaged ones.
            ValueError: weights are missing, or made for another decoder; a field is out of range, or asks for another
                number of memory tokens than the checkpoint has; another kind of model.
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        given = kwargs.get("base_model_name_or_path")
        dtype, former, save_format = (kwargs.pop(name, None) for name in ("dtype", "torch_dtype", "checkpoint_format"))
        dtype = _checked_dtype(former if dtype is None else dtype)
        # Loaded as remote code, the configuration's class may come from another copy of the module than CLaRaConfig.
        if not isinstance(config, PreTrainedConfig):
            source = config if config is not None else name
            with absence_told(os.fspath(source)):
                config, kwargs = CLaRaConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        if config.decoder_config is None:
            raise OSError(f"{name} holds no CLaRa checkpoint: its config.json, if any, has no decoder_config.")
        refuse_quantized(config, name)
        config = as_loaded(config, name, save_format)
        # The place as seen from here, so that the model can be saved somewhere else.
        beside = "." if given and os.path.isdir(given) else os.path.join(name, hub.get("subfolder", ""))
        config.base_model_name_or_path = place_of_base(config.base_model_name_or_path, beside)
        if quantization := kwargs.get("quantization_config"):
            kwargs["quantization_config"] = base_only(quantization, config)
        with absence_told(name):
            is_adapter = saved_format(name, config, hub) != "full"
        check_has_weights(os.path.join(name, hub["subfolder"]) if "subfolder" in hub else name)
        if dtype in (None, "auto"):
            dtype = config.dtype or "auto"
        with quiet_load_report(), damage_told(name):
            if is_adapter:
                own_weights = read_adapter_checkpoint(name, hub)
                own = {option: value for option, value in hub.items() if option not in _OF_CHECKPOINT}
                own |= {option: kwargs[option] for option in _BASE_OPTIONS if option in kwargs}
                base = load_base(config.base_model_name_or_path, dtype, **own)
                with unpartitioned():
                    state = decoder_state(cls, base, config)
                merge_adapters(state, own_weights, name, base, config)
                made_over = state.pop(BASE_SAMPLE, None)
                place = {"dtype": base.dtype, **_place_options(kwargs)}
                model, info = cls._load(None, config=config, state_dict=state, **place)
                model.name_or_path = model.config.name_or_path = name
            else:
                model, info = cls._load(name, *model_args, config=config, **{**kwargs, **hub, "dtype": dtype})
                state, made_over = dict(model.named_parameters()), None
        if quantization:
            settle_quantized(model, kwargs["quantization_config"])
        check_complete(info, f"{name} over the base {config.base_model_name_or_path!r}" if is_adapter else name)
        model._base_sample = sample_base(state, config)
        if is_other_base(made_over, model._base_sample):
            raise ValueError(
                f"{name} was made over another base: the weights of {config.base_model_name_or_path!r} are not those "
                "that its adapters were trained on. Pass base_model_name_or_path= with its own base."
            )
        model._hub_arguments = hub
        return (model, info) if kwargs.get("output_loading_info") else model

    @classmethod
    def _load(cls, name: str | None, *model_args, config: CLaRaConfig, **options):
        """A frozen model as transformers loads it. What does not fit is left for `check_complete` to tell."""
        options = {name: value for name, value in options.items() if value is not None}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(name, *model_args, config=config, **options)
        model.requires_grad_(False)
        return model, info

    def save_pretrained(self, save_directory, state_dict: dict | None = None, push_to_hub: bool = False, **kwargs):
        """Write weights (in the configuration's `checkpoint_format`), configuration, code and processor.

        Raises:
            ValueError: a full save of a quantized base, a `variant` of adapters, or offloaded adapters.
        """
        adapters = None
        if self.config.checkpoint_format != "full":
            if kwargs.get("variant") is not None:
                raise ValueError(f"variant={kwargs['variant']!r}: adapters have no variants; leave it out.")
            state_dict = self.adapter_state_dict(state_dict)
            if self.config.checkpoint_format == "adapter":
                state_dict, adapters = split_adapters(state_dict)
                kwargs.pop("max_shard_size", None)
        elif self.quantized_by is not None:
            raise ValueError(
                f"the base is quantized ({self.quantized_by}) and cannot be saved: set model.config.checkpoint_format "
                "to 'adapter'."
            )
        if kwargs.get("is_main_process", True) and (self._processor is not None or self.name_or_path):
            self.processor.save_pretrained(save_directory)
        hub = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        named = self.config.to_dict().get("auto_map", {}).get("AutoModel", "")
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        remove_stale_weights(save_directory, kwargs.get("variant"))
        if adapters is not None:
            write_adapters(save_directory, adapters, self.decoder, self.config.base_model_name_or_path)
        give_usual_rights(save_directory)
        if self.config.original is not None and self.name_or_path:
            keep_release(save_directory, self.config, named, self.name_or_path, self._hub_arguments)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **hub)

    def push_to_hub(
        self, repo_id: str, *, private=None, token=None, revision=None, max_shard_size="50GB", tags=None, **options
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit, and a short card where there is none of a person.

        Arguments are those of `PreTrainedModel.push_to_hub`. `clara publish` writes a card with data and results.

        Raises:
            ValueError: adapters alone over a base that is no Hub id.
        """
        check_others_can_load(self.config)
        repo_id = open_repository(repo_id, private, token, revision)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if not HfApi(token=token).file_exists(repo_id, "README.md", revision=revision):
                with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
                    file.write(_short_card(repo_id, self.config, tags))
            options.setdefault("commit_message", "Upload model")
            return push_folder(folder, repo_id, token=token, revision=revision, **options)

    def adapter_state_dict(self, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """What an adapter-only checkpoint holds: LoRA weights, memory embeddings, the rows of the added tokens, and a
        few values of the base, by which it is known again.

        Args:
            state_dict (*optional*): the model's whole state, or what this method returned. Without it, the weights are
                collected on the CPU of every process that holds a part (ZeRO-3, FSDP): all of them call this together.
        """
        if state_dict is not None and ADDED_INPUT_ROWS in state_dict:
            return state_dict
        self._check_all_at_hand(state_dict)
        ends = [f"decoder.{key}" for key in embedding_keys(self.decoder) if key is not None]
        if state_dict is None:
            wanted = {key for key in self.state_dict() if is_own_weight(key) or key in ends}
            with gathered(value for key, value in self.named_parameters() if key in wanted):
                state_dict = {key: whole_copy(value) for key, value in self.state_dict().items() if key in wanted}
        kept = {key: value for key, value in state_dict.items() if is_own_weight(key)}
        rows = saved_rows(self.config)
        for name, key in zip((ADDED_INPUT_ROWS, ADDED_OUTPUT_ROWS), ends, strict=False):
            kept[name] = state_dict[key][rows].clone()
        if self._base_sample is not None:
            kept[BASE_SAMPLE] = self._base_sample.clone()
        return kept

    def _check_all_at_hand(self, state_dict: dict | None = None) -> None:
        """Raise a `ValueError` if weights are offloaded (`device_map`), so that their values cannot be read."""
        state = self.state_dict() if state_dict is None else state_dict
        if away := next((key for key, value in state.items() if value.is_meta), None):
            raise ValueError(
                f"{away} is offloaded by device_map: its values are needed to make, load or save adapters and to tell "
                "whose memories a store holds; load the model without offloading."
            )

    def load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Put back the adapters and memory embeddings of an `adapter_state_dict`, in place; the base stays as it is.

        Raises:
            ValueError: `state_dict` lacks some of them, or holds others; weights are offloaded (`device_map`).
        """
        self._check_all_at_hand()
        own = {key: value for key, value in self.state_dict().items() if is_own_weight(key)}
        given = {key: value for key, value in state_dict.items() if is_own_weight(key)}
        if set(given) != set(own):
            wrong = min(set(given) ^ set(own))
            raise ValueError(f"state_dict does not fit the model's adapters: {wrong!r} is in only one of the two.")
        for key, value in own.items():
            copy_whole(given[key], value)

    def compressor_fingerprint(self) -> str:
        """Digest (hex) of what shapes a memory: geometry, compressor, memory embeddings and projection, samples of the
        base.

        Any change but of the base changes it. Of every frozen tensor only some 64 values are looked at, evenly
        spread: another base is told, but not one in which a few other values were changed.

        Raises:
            ValueError: weights are offloaded (`device_map`).
        """
        self._check_all_at_hand()
        own = [self.memory_embeddings.weight]
        own += [self.memory_projection.weight] if self.config.memory_projection else []
        return fingerprint(self.decoder, own, self.config)


def _short_card(repo_id: str, config: CLaRaConfig, tags: str | list[str] | None) -> str:
    base, is_alone = config.base_model_name_or_path, config.checkpoint_format != "full"
    data = ModelCardData(
        library_name="clara-hf",
        pipeline_tag="question-answering",
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if is_alone else None,
        tags=["clara", "arxiv:2511.18659", *([tags] if isinstance(tags, str) else tags or [])],
    )
    return f"""---
{data.to_yaml().strip()}
---

# {repo_id.rpartition("/")[2]}

A [CLaRa](https://arxiv.org/abs/2511.18659) model: documents are compressed once, each to {config.num_memory_tokens}
vectors, retrieved among these, and answered from. Results were not measured when this card was written.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
memories = model.compress(["The first document.", "The second document."])
answers = model.generate(questions=["A question?"], memories=memories)
```
"""


def _split_base_arguments(arguments: dict) -> tuple[dict, dict, dict, dict]:
    """The configuration fields among the arguments of `from_base`, then its three kinds of options."""
    kinds = (_READ_OPTIONS, _BASE_OPTIONS, _PLACE_OPTIONS)
    options = [{name: arguments[name] for name in names if name in arguments} for names in kinds]
    fields = {name: value for name, value in arguments.items() if not any(name in kind for kind in kinds)}
    known = {field.name for field in fields_of(CLaRaConfig)} - set(SET_BY_FROM_BASE)
    unknown = set(fields) - known
    if unknown:
        raise ValueError(
            f"from_base takes no {', '.join(sorted(unknown))}: give fields of CLaRaConfig that the base does not set, "
            "or options of from_pretrained such as dtype, revision, token or device_map."
        )
    return fields, *options


def _checked_dtype(dtype):
    """`dtype`, if transformers can make a model of it.

    Raises:
        ValueError: it cannot.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or found in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return dtype
    raise ValueError(f"dtype must be auto, float32, bfloat16, float16 or float64, got {dtype!r:.80}.")


def _place_options(arguments: dict) -> dict:
    """Those of `from_pretrained`'s arguments that an adapter-only checkpoint's model is made with.

    Raises:
        TypeError: an argument that `from_pretrained` does not know, as for other checkpoints.
    """
    names = ("attn_implementation", "key_mapping", *_PLACE_OPTIONS)
    without_use = (*_READ_OPTIONS, *_BASE_OPTIONS, "adapter_kwargs", "code_revision", "output_loading_info")
    without_use += ("ignore_mismatched_sizes",)  # mismatches are refused, of full checkpoints too
    unknown = [name for name in arguments if name not in (*names, *without_use) and not name.startswith("_")]
    if unknown:
        raise TypeError(f"from_pretrained got an unexpected argument {unknown[0]!r}.")
    return {name: arguments[name] for name in names if name in arguments}
