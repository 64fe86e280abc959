"""Configuration of a CLaRa model: the nested decoder, the compression geometry, adapters, retrieval and prompts."""

import copy
import json
import math
import os
import re
import shutil
from typing import TypeGuard

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


CHECKPOINT_FORMATS = ("full", "adapter", "flat")
EMBEDDING_ROWS = ("added", "all")
READOUTS = ("memory_tokens", "mean_pool")
TAKEN_MASKS = ("exact", "published")
ESTIMATORS = ("straight_through", "soft", "gumbel")
# Value of `memory_scale` until `from_base` has measured the base.
EMBEDDING_SCALE = "embeddings"
SWITCHES = (
    "distinct_memory_tokens",
    "memory_projection",
    "query_reasoner",
    "keep_end_token",
    "separated_slots",
    "exact_prompt_end",
    "split_control_tokens",
)
# Arguments of every `from_pretrained` that say where files are and how they are fetched.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
ORIGINAL_MODEL_TYPE = "CLaRa"
CONFIGURATIONS = ("config.json", "adapter_config.json")
PROMPT_KINDS = ("answer", "qa", "paraphrase")
DEFAULT_PROMPTS = {
    "answer": {
        "system": "You answer questions from the background documents you are given. Keep the answer short.",
        "user": "Documents:\n{docs}\n\nQuestion: {question}",
        "assistant": "{answer}",
    },
    "qa": {
        "system": "You write question and answer pairs that together cover every fact of a document.",
        "user": "Document:\n{docs}",
        "assistant": "Question: {question}\nAnswer: {answer}",
    },
    "paraphrase": {
        "system": "You restate a document in other words, with all of its facts and nothing added.",
        "user": [
            "Document: {docs}\nRestate the document in your own words.",
            "Rewrite this document so that it says the same in other words: {docs}",
            "{docs}\nWhat does the document above say? Put it differently.",
        ],
        "assistant": "{paraphrase}",
    },
}


class CLaRaConfig(PreTrainedConfig):
    r"""Configuration of a [`CLaRaForRetrievalGeneration`] (arXiv 2511.18659).

    Args:
        decoder_config (`PreTrainedConfig` or `dict`, *optional*): configuration of the causal language model that
            carries the adapters, with the vocabulary already enlarged by the added tokens. Read from
            `base_model_name_or_path` when missing.
        base_model_name_or_path (`str`, *optional*): where the decoder's frozen weights come from. An `adapter`
            checkpoint needs it to load.
        doc_max_length (`int`): document budget in tokens; longer documents are cut.
        compression_rate (`int` or `list[int]`): document budget divided by the number of memory tokens. A list, from
            the smallest on, makes one checkpoint for several rates: training draws one for each step, and at a rate
            with l memory tokens the first l are read. With `mean_pool` the rates must be multiples of the first; each
            vector is then the mean of those of the first rate in its place.
        rate (`int`, *optional*): the one of several rates that is in use, and trained alone if it is set; otherwise the
            first, and all are trained. See [`~CLaRaForRetrievalGeneration.at_rate`].
        query_max_length (`int`): question budget in tokens.
        readout (`"memory_tokens"` or `"mean_pool"`): where memories, and the states of questions, are read.
            `memory_tokens` puts l memory tokens behind a text and takes their states. `mean_pool` takes those of the
            text itself: with its markers it has T tokens, and memory vector j is the mean of the states from
            floor(j T / l) up to floor((j + 1) T / l), whose numbers differ by at most one. Of a text with fewer than l
            tokens, some stand for several vectors. The mean over all of a question stands in each of its l vectors. The
            MSE term then has no use, see `mse_weight`.
        compressor_layers (`int`, *optional*): so many of the decoder's layers, from the first on, read documents and
            questions; all by default. With fewer, the state of each position is divided by its root mean square, in
            place of the final norm, which was made for the last layer's states. 0 takes token embeddings, with
            `mean_pool`.
        memory_projection (`bool`): whether states become memories through a linear map `[H, H]`, the same for documents
            and questions. The first stage fits it to give back token embeddings, see `fit_memory_projection`, since a
            frozen language model reads these and not the states of its layers; it does not train.
        memory_scale (`float` or `"embeddings"`, *optional*): root mean square that each memory vector, and each vector
            of a question, is brought to; as they are by default. `"embeddings"` is that of the base's token embeddings,
            their mean, which `from_base` puts here as a number.
        distinct_memory_tokens (`bool`): `True` for one embedding per memory token, `False` for a single shared one.
        top_k (`int`): documents that are selected for a question.
        temperature (`float`): of the straight-through top-k; the paper uses 0.02.
        topk_taken_mask (`"exact"` or `"published"`): see [`straight_through_topk`].
        topk_estimator (`"straight_through"`, `"soft"` or `"gumbel"`): what slots hold in training mode, see
            [`straight_through_topk`]; otherwise they hold the best candidates.
        query_reasoner (`bool`): whether the checkpoint has a query-reasoner adapter; without one, questions are read
            by the compressor.
        mse_weight (`float`): weight of the mean-squared error between document and memory means (λ, 0.1 in the paper),
            both before `memory_scale`. With `mean_pool` the two are equal by construction, and there is no such term.
        lora_r, lora_alpha, lora_dropout, lora_target_modules: as in [`peft.LoraConfig`], the same for all adapters.
        keep_end_token (`bool`): whether a cut document keeps its end token. The published model drops it.
        document_start (`str`, *optional*): text of the token before every document or question; the tokenizer's
            beginning token where `None`, and nothing where it has none.
        separated_slots (`bool`): whether the memory slots of a prompt leave out the `<SEP>` between them. `False`
            writes all memory vectors one after the other from the first slot on, over `<SEP>`, as the published model
            does with `sep: false`.
        exact_prompt_end (`bool`): whether labels start exactly where the prompt ends, even if a token would span its
            end. `False` leaves out as many tokens as the prompt has on its own, as the published model does.
        split_control_tokens (`bool`): whether control tokens of the tokenizer (`</s>`, chat markup) that stand in
            documents, questions and answers are split as text. `False` lets them act, as the published model does.
        prompts (`dict`): chat templates by kind (`answer`, `qa`, `paraphrase`), each with `system` (`str` or `None`),
            `user` (`str`, or a list to draw from) and `assistant`. `{docs}` stands for the documents; `{question}`,
            `{answer}` and `{paraphrase}` for their text.
        checkpoint_format (`"full"`, `"adapter"` or `"flat"`): what `save_pretrained` writes; `adapter` leaves out the
            frozen base and keeps adapters, each in a folder as PEFT has it, and in `clara.safetensors` the memory
            embeddings and rows of the added tokens; `flat`, for a run's checkpoints, is all of that in one file.
        saved_embedding_rows (`"added"` or `"all"`): which rows of the token embeddings an `adapter` checkpoint keeps;
            `all` where other rows than those of the added tokens differ from the base's.
        memory_token_ids (`list[int]`): ids of the memory tokens, `num_memory_tokens` of them or one if shared.
        ae_token_id, enc_token_id, sep_token_id (`int`): ids of the marker tokens.
        original (`dict`, *optional*): of a converted checkpoint of the paper's release, what its way back needs: its
            `config.json`, and which of its adapters held copies of the embeddings.

    Raises:
        ValueError: a value out of range or of another type, naming the argument.
    """

    model_type = "clara"
    sub_configs = {"decoder_config": AutoConfig}

    decoder_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    doc_max_length: int = 256
    compression_rate: int | list[int] = 16
    rate: int | None = None
    query_max_length: int = 256
    readout: str = "memory_tokens"
    compressor_layers: int | None = None
    memory_projection: bool = False
    memory_scale: float | str | None = None
    distinct_memory_tokens: bool = True
    top_k: int = 5
    temperature: float = 0.02
    topk_taken_mask: str = "exact"
    topk_estimator: str = "straight_through"
    query_reasoner: bool = False
    mse_weight: float = 0.1
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_target_modules: str | list[str] = "all-linear"
    keep_end_token: bool = True
    document_start: str | None = None
    separated_slots: bool = True
    exact_prompt_end: bool = True
    split_control_tokens: bool = True
    prompts: dict | None = None
    checkpoint_format: str = "full"
    saved_embedding_rows: str = "added"
    memory_token_ids: list[int] | None = None
    ae_token_id: int | None = None
    enc_token_id: int | None = None
    sep_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    original: dict | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        # As AutoConfig does it: errors can then name the folder.
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        subfolder = f" --subfolder {kwargs['subfolder']}" if kwargs.get("subfolder") else ""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == ORIGINAL_MODEL_TYPE:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of the paper's release; convert it first: "
                f"python -m clara_hf.original.convert {pretrained_model_name_or_path} OUT{subfolder}"
            )
        if values.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {values['model_type']} model and no CLaRa checkpoint: "
                "CLaRaForRetrievalGeneration.from_base makes one from a decoder."
            )
        return values, kwargs

    def __post_init__(self, **kwargs):
        self.validate_ranges()
        self.prompts = self._complete_prompts(self.prompts)
        if self.decoder_config is None and self.base_model_name_or_path is not None:
            self.decoder_config = AutoConfig.from_pretrained(self.base_model_name_or_path)
        if isinstance(self.decoder_config, dict):
            place = f"{kwargs['name_or_path']}: " if kwargs.get("name_or_path") else ""
            self.decoder_config = read_decoder_config(self.decoder_config, f"{place}decoder_config")
        self._check_layers()
        super().__post_init__(**kwargs)

    def validate_ranges(self):
        """Raise a `ValueError` that names the field whose value is out of range or of another type."""
        for name in ("doc_max_length", "query_max_length", "top_k", "lora_r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.80}.")
        self._check_rates()
        for name, is_allowed, wanted in (
            ("temperature", lambda value: value > 0, "positive"),
            ("lora_alpha", lambda value: value > 0, "positive"),
            ("mse_weight", lambda value: value >= 0, "at least 0"),
            ("lora_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r:.80}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_allowed(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r:.80}.")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.80}.")
        if not isinstance(self.document_start, (str, type(None))):
            raise ValueError(f"document_start must be a text or None, got {self.document_start!r:.80}.")
        choices = {
            "topk_taken_mask": TAKEN_MASKS,
            "topk_estimator": ESTIMATORS,
            "readout": READOUTS,
            "checkpoint_format": CHECKPOINT_FORMATS,
            "saved_embedding_rows": EMBEDDING_ROWS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r:.80}.")
        for name in ("memory_token_ids", "ae_token_id", "enc_token_id", "sep_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, (list, tuple)) else [0 if value is None else value]
            is_list = name == "memory_token_ids" and value is not None and ids is not value
            if is_list or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
                raise ValueError(f"{name} must be whole numbers, as the base's tokenizer has them, got {value!r:.80}.")
        if not isinstance(self.decoder_config, (dict, PreTrainedConfig, type(None))):
            raise ValueError(
                f"decoder_config must be a dictionary or a configuration, got {self.decoder_config!r:.80}."
            )
        targets = self.lora_target_modules
        names = [targets] if isinstance(targets, str) else targets
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"lora_target_modules must be a string or a list of strings, got {targets!r:.80}.")
        self._check_scale()
        self._check_layers()

    def _check_rates(self):
        given, rates = self.compression_rate, self.compression_rates
        for rate in rates:
            if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
                raise ValueError(f"compression_rate must be a whole number of at least 1, got {given!r:.80}.")
            if self.doc_max_length % rate:
                raise ValueError(f"compression_rate must divide doc_max_length, got {rate} and {self.doc_max_length}.")
        if not rates or sorted(set(rates)) != rates:
            raise ValueError(f"compression_rate must list different rates, the smallest first, got {given!r:.80}.")
        if self.readout == "mean_pool" and (other := [rate for rate in rates if rate % rates[0]]):
            raise ValueError(
                f"compression_rate lists {other[0]}, but with readout 'mean_pool' rates must be multiples of the "
                f"first, {rates[0]}."
            )
        if self.rate is not None and (isinstance(self.rate, bool) or self.rate not in rates):
            raise ValueError(f"rate must be one of the compression rates {rates}, or None, got {self.rate!r:.80}.")

    def _check_scale(self):
        scale = self.memory_scale
        if scale is None or scale == EMBEDDING_SCALE:
            return
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not 0 < scale < math.inf:
            raise ValueError(f"memory_scale must be positive, {EMBEDDING_SCALE!r} or None, got {scale!r:.80}.")

    def _check_layers(self):
        layers = self.compressor_layers
        if layers is None:
            return
        known = isinstance(self.decoder_config, PreTrainedConfig)
        most = self.get_text_config().num_hidden_layers if known else math.inf
        if not isinstance(layers, int) or isinstance(layers, bool) or not 0 <= layers <= most:
            highest = f" to {most}, the decoder's layers" if known else ""
            raise ValueError(f"compressor_layers must be a whole number from 0{highest}, or None, got {layers!r:.80}.")
        if layers == 0 and self.readout == "memory_tokens":
            raise ValueError(
                "compressor_layers is 0, where memory tokens know nothing of the text: set readout to 'mean_pool', or "
                "take at least one layer."
            )

    @staticmethod
    def _complete_prompts(prompts: dict | None) -> dict:
        if prompts is not None and not isinstance(prompts, dict):
            raise ValueError(f"prompts must be a dictionary with keys of {PROMPT_KINDS}, got {prompts!r:.80}.")
        wrong = [kind for kind, prompt in (prompts or {}).items() if not isinstance(prompt, dict)]
        if wrong:
            raise ValueError(f"prompts[{wrong[0]!r:.80}] must be a dictionary, got {prompts[wrong[0]]!r:.80}.")
        unknown = set(prompts or {}) - set(PROMPT_KINDS)
        if unknown:
            raise ValueError(f"prompts has unknown kinds {sorted(unknown)}; the kinds are {PROMPT_KINDS}.")
        prompts = {kind: dict((prompts or {}).get(kind, DEFAULT_PROMPTS[kind])) for kind in PROMPT_KINDS}
        for kind, prompt in prompts.items():
            if set(prompt) != {"system", "user", "assistant"}:
                raise ValueError(f"prompts[{kind!r:.80}] needs system, user and assistant, got {sorted(prompt)}.")
            if not isinstance(prompt["system"], (str, type(None))) or not isinstance(prompt["assistant"], str):
                raise ValueError(
                    f"prompts[{kind!r:.80}] needs texts for system (or None) and assistant, got {prompt!r:.80}."
                )
            users = [prompt["user"]] if isinstance(prompt["user"], str) else prompt["user"]
            if (
                not isinstance(users, (list, tuple))
                or not users
                or not all(isinstance(user, str) and "{docs}" in user for user in users)
            ):
                raise ValueError(f"prompts[{kind!r:.80}]['user'] needs {{docs}} in every template, got {users!r:.80}.")
        return prompts

    @property
    def compression_rates(self) -> list[int]:
        """All compression rates, the smallest first."""
        given = self.compression_rate
        return list(given) if isinstance(given, (list, tuple)) else [given]

    @property
    def rate_in_use(self) -> int:
        """The compression rate of memories that are made now."""
        return self.compression_rates[0] if self.rate is None else self.rate

    @property
    def num_memory_tokens(self) -> int:
        """Memory vectors per document (l), at the rate in use."""
        return self.doc_max_length // self.rate_in_use

    @property
    def most_memory_tokens(self) -> int:
        """Memory vectors per document at the smallest of the compression rates."""
        return self.doc_max_length // self.compression_rates[0]

    @property
    def encoder_memory_tokens(self) -> int:
        """Memory tokens behind a document or question when it is read: none where the text itself is pooled."""
        return self.num_memory_tokens if self.readout == "memory_tokens" else 0

    @property
    def layers_that_read(self) -> int | None:
        """How many of the decoder's layers read documents and questions; `None` for all, and the final norm."""
        layers = self.compressor_layers
        return None if layers is None or layers == self.get_text_config().num_hidden_layers else layers

    @property
    def hidden_size(self) -> int:
        """Width of a memory vector (H)."""
        return self.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix, added and padding tokens included."""
        return self.get_text_config().vocab_size

    @property
    def added_token_ids(self) -> list[int]:
        """Ids of the added tokens: memory tokens, `<AE>`, `<ENC>`, `<SEP>`.

        Raises:
            ValueError: the configuration has none.
        """
        ids = [*(self.memory_token_ids or [None]), self.ae_token_id, self.enc_token_id, self.sep_token_id]
        if None in ids:
            raise ValueError(
                "this CLaRaConfig has no memory_token_ids, ae_token_id, enc_token_id or sep_token_id: "
                "CLaRaForRetrievalGeneration.from_base sets them, and CLaRaProcessor.add_tokens returns them."
            )
        return ids

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        if self.decoder_config is None:
            raise AttributeError(
                "this CLaRaConfig has neither decoder_config nor base_model_name_or_path: set one of them."
            )
        return self.decoder_config.get_text_config(decoder=decoder, encoder=encoder)


def as_loaded(config: CLaRaConfig, name: str, save_format: str | None) -> CLaRaConfig:
    """A copy of `config` with all prompts, for the checkpoint `name`, of whose fields some may have been overridden.

    Args:
        save_format: the copy's `checkpoint_format`; `None` for the checkpoint's own.

    Raises:
        ValueError: a field is out of range, or asks for another number of memory tokens than the checkpoint has.
    """
    config = copy.deepcopy(config)
    config.checkpoint_format = save_format or config.checkpoint_format.replace("flat", "adapter")
    config.validate_ranges()
    config.prompts = config._complete_prompts(config.prompts)
    if config.memory_scale == EMBEDDING_SCALE:
        raise ValueError(
            f"memory_scale={EMBEDDING_SCALE!r} is measured where from_base makes a model: give {name} a number, or "
            "leave it out."
        )
    wanted = config.most_memory_tokens if config.distinct_memory_tokens else 1
    found = len(config.memory_token_ids or [])
    if found != wanted:
        geometry = ("distinct_memory_tokens", "doc_max_length", "compression_rate")
        asked = ", ".join(f"{field}={getattr(config, field)}" for field in geometry)
        raise ValueError(
            f"{name} has {found} memory_token_ids, but {asked} ask for {wanted}: leave these fields as the checkpoint "
            "has them, or train a model with others from its base (from_base)."
        )
    return config


def read_decoder_config(values: dict, name: str) -> PreTrainedConfig:
    """The configuration of a decoder from the dictionary that a `config.json` holds of it; `name` is used in errors.

    Raises:
        ValueError: no `model_type`, one that transformers does not know, or values that do not go together.
    """
    values = copy.deepcopy(values)
    if "model_type" not in values:
        raise ValueError(f"{name} needs a model_type, got the keys {sorted(values)}.")
    kind = values.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{name} has the model_type {kind!r}, which this version of transformers does not know.")
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        # Those of huggingface_hub's checks are no ValueErrors, and have the reason as their cause.
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(
            f"{name} is no sound configuration of a {kind} model ({reason}): use config.json as it was saved."
        ) from error


def is_hub_id(name: str | None) -> TypeGuard[str]:
    """Whether a base is named as on the Hub, `user/name`, and not by a place that only this machine has."""
    return name is not None and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


def check_others_can_load(config: CLaRaConfig) -> None:
    """Raise a `ValueError` for adapters alone whose base nobody else has."""
    if config.checkpoint_format != "full" and not is_hub_id(config.base_model_name_or_path):
        raise ValueError(
            f"base_model_name_or_path is {config.base_model_name_or_path!r}, which is no Hub id: others could not load "
            "adapters alone. Push the full model (checkpoint_format 'full', --full of clara publish), or set "
            "base_model_name_or_path to the base's Hub id."
        )


def give_usual_rights(folder: str) -> None:
    """Give the weights in a folder the rights of the configuration beside them, as the umask has it: safetensors leaves
    its files to their owner alone."""
    beside = [path for name in CONFIGURATIONS if os.path.exists(path := os.path.join(folder, name))]
    for name in os.listdir(folder) if beside else ():
        if name.endswith(".safetensors"):
            shutil.copymode(beside[0], os.path.join(folder, name))


def forget_places(folder: str) -> None:
    """Take places of this machine out of the `config.json` in `folder`, before others get it."""
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    if not is_hub_id(values.get("base_model_name_or_path")):
        values["base_model_name_or_path"] = None
    (values.get("decoder_config") or {}).pop("_name_or_path", None)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, sort_keys=True)
    os.replace(f"{path}.partial", path)  # what may be linked elsewhere stays as it is
