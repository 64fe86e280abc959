"""Weights at rest: of a base, read and put under the names of a CLaRa model; of a checkpoint; what tells them apart."""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import escape, glob

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER, adapter_parameters
from .configuration_clara import EMBEDDING_SCALE, ORIGINAL_MODEL_TYPE, CLaRaConfig, forget_places, give_usual_rights
from .functional_clara import gathered
from .quantization_clara import refuse_quantized


logger = logging.get_logger(__name__)

ADDED_INPUT_ROWS, ADDED_OUTPUT_ROWS = "added_rows.input", "added_rows.output"
# A few values of each of the base's matrices, by which an adapter-only checkpoint knows its base again.
BASE_SAMPLE, SAMPLED_VALUES = "base_sample", 8
# What a base's values may differ by when they are read in another precision: bfloat16's steps, float16's smallest ones.
SAMPLE_TOLERANCE = {"rtol": 2**-7, "atol": 1e-6}
# Spread of new memory embeddings around the mean token embedding, in standard deviations of the token embeddings.
MEMORY_EMBEDDING_SPREAD = 0.5
# Values taken of every frozen matrix for the compressor's fingerprint.
FINGERPRINT_SAMPLE = 64
# An adapter checkpoint has each adapter in a folder as PEFT has it, and beside them what is no adapter.
ADAPTERS = (COMPRESSOR, QUERY_REASONER, GENERATOR)
CLARA_WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG = "clara.safetensors", "adapter_model.safetensors", "adapter_config.json"
# Weights of an earlier upload, which a model of another format would be read with, or with which PEFT would go on.
_STALE = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, CLARA_WEIGHTS, *(f"{name}/adapter_*" for name in ADAPTERS))
# Of a release, beside its weights.
NOTICES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE_MODEL", "NOTICE", "ACKNOWLEDGEMENTS")
_WHOLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_LORA_KEY = re.compile(r"decoder\.(.+\.lora_[AB])\.([^.]+)\.weight")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")


def split_adapters(state: dict) -> tuple[dict, dict[str, dict]]:
    """Of an `adapter_state_dict`: what is no adapter, and each adapter's weights under PEFT's names."""
    own, adapters = {}, {}
    for key, value in state.items():
        if found := _LORA_KEY.fullmatch(key):
            adapters.setdefault(found[2], {})[f"base_model.model.{found[1]}.weight"] = value.contiguous()
        else:
            own[key] = value
    return own, adapters


def write_adapters(folder: str, adapters: dict[str, dict], decoder: PreTrainedModel, base: str | None) -> None:
    """Write adapters as PEFT has them into folders of `folder`, whose `model.safetensors` becomes `clara.safetensors`.

    Args:
        adapters: from [`split_adapters`].
        decoder: that carries them, with its `peft_config`.
        base: where its frozen weights come from.
    """
    os.replace(os.path.join(folder, SAFE_WEIGHTS_NAME), os.path.join(folder, CLARA_WEIGHTS))
    for name in ADAPTERS:
        if name not in adapters:
            continue
        place = os.path.join(folder, name)
        os.makedirs(place, exist_ok=True)
        save_file(adapters[name], os.path.join(place, PEFT_WEIGHTS), metadata={"format": "pt"})
        settings = copy.deepcopy(decoder.peft_config[name])
        settings.base_model_name_or_path, settings.task_type, settings.inference_mode = base, "CAUSAL_LM", True
        if isinstance(settings.target_modules, set):
            settings.target_modules = sorted(settings.target_modules)
        settings.save_pretrained(place)
        give_usual_rights(place)


def remove_stale_weights(folder: str, variant: str | None) -> None:
    """Remove weights of an earlier save to `folder`, which would be read in place of those that `save_pretrained` of
    transformers has just written there. Other variants stay."""
    ends = (os.path.splitext(os.path.join(folder, name)) for name in _WHOLE)
    single, index = (f"{stem}.{variant}{end}" if variant else stem + end for stem, end in ends)
    stale = [os.path.join(folder, CLARA_WEIGHTS)]
    if os.path.exists(index):
        # transformers has removed the shards of an earlier save.
        try:
            stale.append(single if all(map(os.path.exists, _shards_of(index, folder))) else index)
        except OSError:
            stale.append(index)
    for path in filter(os.path.exists, stale):
        os.remove(path)
    for name in ADAPTERS:
        if os.path.exists(os.path.join(folder, name, PEFT_CONFIG)):
            shutil.rmtree(os.path.join(folder, name))


def read_adapter_checkpoint(name: str, hub: dict | None = None) -> dict[str, torch.Tensor]:
    """The `adapter_state_dict` that an adapter-only checkpoint holds, in folders or in one file (or its shards).

    Raises:
        OSError: it has no weights.
    """
    hub = hub or {}

    def place_of(file: str, folder: str = "") -> str | None:
        inside = "/".join(part for part in (hub.get("subfolder"), folder) if part)  # for the Hub, too
        return cached_file(name, file, **{**hub, "subfolder": inside}, _raise_exceptions_for_missing_entries=False)

    if path := place_of(CLARA_WEIGHTS):
        state = load_file(path)
        for adapter in ADAPTERS:
            if path := place_of(PEFT_WEIGHTS, adapter):
                for key, value in load_file(path).items():
                    state[_PEFT_KEY.sub(rf"decoder.\1.{adapter}.weight", key)] = value
        return state
    if path := place_of(SAFE_WEIGHTS_NAME):
        return load_file(path)
    if path := place_of(SAFE_WEIGHTS_INDEX_NAME):
        state = {}
        for shard in _shards_of(path):
            if (place := place_of(shard)) is None:
                raise OSError(f"{name} lacks {shard}, which its {SAFE_WEIGHTS_INDEX_NAME} names: fetch it again.")
            state.update(load_file(place))
        return state
    raise OSError(f"{name} has no weights ({CLARA_WEIGHTS} or {SAFE_WEIGHTS_NAME}): save or fetch it again.")


def _shards_of(index: str, folder: str = "") -> list[str]:
    """The files that an index of weights divides them into, in `folder`.

    Raises:
        OSError: it is damaged.
    """
    try:
        with open(index, encoding="utf-8") as file:
            names = {os.path.basename(shard) for shard in json.load(file)["weight_map"].values()}
            return sorted(os.path.join(folder, name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{index} is damaged ({error!r:.80}): save or fetch it again.") from error


def saved_format(name: str, config: CLaRaConfig, hub: dict) -> str:
    """How the weights at `name` were saved, `full`, `adapter` or `flat`: from its own `config.json`, since the field of
    `config` may have been overridden, which says how to save from now on.

    Args:
        hub: arguments of the Hub (`revision`, `token`, ...).
    """
    values = PreTrainedConfig.get_config_dict(name, **hub)[0]
    return values.get("checkpoint_format", "full") if values else config.checkpoint_format


def embedding_keys(decoder: PreTrainedModel) -> tuple[str, str | None]:
    """Names of the input and output embedding matrices in the decoder's state; the latter is `None` if tied."""
    names = {module: name for name, module in decoder.named_modules()}
    inputs, outputs = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight or decoder.config.get_text_config().tie_word_embeddings
    return f"{names[inputs]}.weight", None if tied else f"{names[outputs]}.weight"


def decoder_state(cls, base: PreTrainedModel, config: CLaRaConfig) -> dict[str, torch.Tensor]:
    """The base's weights under the names they have in a CLaRa model, with as many embedding rows as `config` says."""
    with torch.device("meta"):
        names = set(cls(config).state_dict())
    tied_away = set(base.all_tied_weights_keys) if embedding_keys(base)[1] is None else set()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    vocabulary = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    state = {}
    for key, value in base.state_dict().items():
        if key in tied_away:
            continue
        module, _, leaf = key.rpartition(".")
        if module in vocabulary:
            value = fit_rows(value, config.vocab_size)
        wrapped = f"decoder.{module}.base_layer.{leaf}"
        state[wrapped if wrapped in names else f"decoder.{key}"] = value
    return state


def fit_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding matrix with `rows` rows: filled up with zeros, or cut where the base's vocabulary is padded."""
    missing = rows - matrix.shape[0]
    return matrix[:rows] if missing <= 0 else torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])])


def fill_added_rows(state: dict, base: PreTrainedModel, config: CLaRaConfig, first_added: int) -> None:
    """Start added tokens at the mean of the tokenizer's rows, and memory embeddings spread around it; a
    `memory_scale` that names the embeddings becomes the mean of their root mean squares, and a projection keeps states
    as they are."""
    generator = torch.Generator().manual_seed(0)
    for key in embedding_keys(base):
        if key is not None:
            matrix = state[f"decoder.{key}"] = state[f"decoder.{key}"].clone()
            matrix[config.added_token_ids] = matrix[:first_added].float().mean(dim=0).to(matrix.dtype)
    rows = state[f"decoder.{embedding_keys(base)[0]}"]
    known = rows[:first_added].float()
    noise = torch.randn(len(config.memory_token_ids), known.shape[1], generator=generator)
    if config.memory_scale == EMBEDDING_SCALE:
        config.memory_scale = float(known.square().mean(dim=1).sqrt().mean())
    memory = known.mean(dim=0) + MEMORY_EMBEDDING_SPREAD * known.std(dim=0) * noise
    state["memory_embeddings.weight"] = memory.to(rows.dtype)
    if config.memory_projection:
        state["memory_projection.weight"] = torch.eye(memory.shape[1], dtype=rows.dtype)


def sample_base(weights: dict, config: CLaRaConfig) -> torch.Tensor | None:
    """Values `[tensors, 8]` float32 from all over the base, embeddings left out; `None` if no tensor is at hand.

    Args:
        weights: from [`decoder_state`], or the model's parameters by name. Those that are quantized or offloaded are
            left out; where ZeRO-3 spreads them, all processes call this together.
    """
    samples = []
    for key in sorted(weights):
        value = weights[key]
        if not key.startswith("decoder.") or ".lora_" in key or not value.is_floating_point() or value.is_meta:
            continue
        if is_packed(value):
            continue
        with gathered([value]):
            if value.dim() == 2 and len(value) == config.vocab_size:
                continue
            flat = value.detach().flatten()
            positions = torch.linspace(0, len(flat) - 1, SAMPLED_VALUES, dtype=torch.float64).long()
            samples.append(flat[positions.to(flat.device)].float().cpu())
    return torch.stack(samples) if samples else None


def is_packed(value: torch.Tensor) -> bool:
    """Whether a tensor is one of a quantizer's own types (torchao, quanto), which hold codes and scales."""
    return type(value.data) not in (torch.Tensor, torch.nn.Parameter) and "quant" in type(value.data).__module__


def fingerprint(decoder: PreTrainedModel, own: list[torch.Tensor], config: CLaRaConfig) -> str:
    """The `compressor_fingerprint` of a model with this decoder and these weights beside it."""
    geometry = (config.doc_max_length, config.num_memory_tokens, config.keep_end_token, config.document_start)
    geometry += ("split_control_tokens",) if config.split_control_tokens else ()
    # What memories of the usual kind do not have leaves their digest as it was.
    variant = (config.readout, config.layers_that_read, config.memory_scale)
    geometry += () if variant == ("memory_tokens", None, None) else variant
    geometry += () if config.compression_rates == [config.rate_in_use] else (*config.compression_rates,)
    digest = hashlib.sha256(repr((*geometry, float(config.lora_alpha))).encode())
    for key, value in decoder.state_dict().items():
        if ".lora_" not in key:
            flat = (value.dequantize() if is_packed(value) else value).detach().flatten()
            digest.update(key.encode() + repr(list(value.shape)).encode())
            digest.update(_bytes_of(flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLE)]))
    for parameter in [*adapter_parameters(decoder, COMPRESSOR), *own]:
        digest.update(_bytes_of(parameter.detach()))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.float().cpu().contiguous().numpy().tobytes()


def is_other_base(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    """Whether two of [`sample_base`] are certainly not of the same base, whatever the precision of each."""
    if expected is None or found is None or expected.shape != found.shape:
        # A base that is quantized in one of the two has another number of tensors.
        return False
    return not torch.allclose(expected, found, **SAMPLE_TOLERANCE)


def merge_adapters(state: dict, own: dict, path: str, base: PreTrainedModel, config: CLaRaConfig) -> None:
    """Add the weights `own` of the adapter-only checkpoint `path` to the base's, and put the rows of the added tokens
    in place."""
    rows = saved_rows(config)
    for name, key in zip((ADDED_INPUT_ROWS, ADDED_OUTPUT_ROWS), embedding_keys(base), strict=True):
        if (name in own) != (key is not None):
            made_for, found = ("untied", "tied") if name in own else ("tied", "untied")
            raise ValueError(
                f"{path} was made for a decoder with {made_for} embeddings, but the base "
                f"{config.base_model_name_or_path!r} has {found} ones: pass base_model_name_or_path= with its own base."
            )
        if key is not None:
            matrix = state[f"decoder.{key}"] = state[f"decoder.{key}"].clone()
            added = own.pop(name)
            if added.shape[1] != matrix.shape[1]:
                raise ValueError(
                    f"{path} was made for a decoder of hidden size {added.shape[1]}, but the base "
                    f"{config.base_model_name_or_path!r} has {matrix.shape[1]}: pass base_model_name_or_path= with its "
                    "own base."
                )
            matrix[rows] = added.to(matrix.dtype)
    state.update(own)


def saved_rows(config: CLaRaConfig) -> list[int]:
    """Rows of the embedding matrices that an adapter-only checkpoint holds."""
    return config.added_token_ids if config.saved_embedding_rows == "added" else list(range(config.vocab_size))


def is_own_weight(key: str) -> bool:
    """Whether a weight of the model is an adapter's or stands beside the decoder, and so no part of the base."""
    return ".lora_" in key or key.startswith(("memory_embeddings.", "memory_projection."))


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Models that are built in the block have whole weights under ZeRO-3 too: a base is only read, to make the state
    that the model itself is loaded from."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)


def load_base(name: str | None, dtype, **options) -> PreTrainedModel:
    """The causal language model whose weights carry adapters, complete and in full precision.

    Raises:
        OSError: there is none at `name`, or it is damaged.
        ValueError: it is a CLaRa checkpoint, was saved quantized, or lacks weights.
    """
    if name is None:
        raise ValueError("base_model_name_or_path is not set: pass the base's folder or Hub id.")
    try:
        values = PreTrainedConfig.get_config_dict(name, **options)[0]
        if values.get("model_type") in (CLaRaConfig.model_type, ORIGINAL_MODEL_TYPE):
            raise ValueError(f"{name} is a CLaRa checkpoint and no base: from_pretrained loads it.")
        refuse_quantized(values, f"the base model {name!r}")
        with unpartitioned(), quiet_load_report():
            options = {**options, "dtype": dtype, "output_loading_info": True}
            base, info = AutoModelForCausalLM.from_pretrained(name, **options)
        # A base's files may hold more than the model needs.
        check_complete({**info, "unexpected_keys": ()}, f"the base model {name!r}")
        return base
    except OSError as error:
        raise OSError(
            f"the base model {name!r} could not be loaded: pass base_model_name_or_path= with its folder or Hub id "
            f"({_why_absent(name, error)})."
        ) from error
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(f"the base model {name!r} has no sound config.json ({reason}): mend it.") from error


def place_of_base(base: str | None, checkpoint: str) -> str | None:
    """`base`, or where it lies as seen from the checkpoint's folder, so that both can be moved together.

    A name that begins with a dot is meant from there, whatever the working directory holds under that name.
    """
    if not base or (os.path.isdir(base) and not base.startswith(".")):
        return absolute_place(base)
    # Where the checkpoint is reached by links, its base may lie beside one of them, or beside what they lead to.
    places, folder = [], os.path.abspath(checkpoint)
    while folder not in places:
        places.append(folder)
        if os.path.islink(folder):
            folder = os.path.abspath(os.path.join(os.path.dirname(folder), os.readlink(folder)))
    beside = [os.path.normpath(os.path.join(place, base)) for place in places]
    beside.append(os.path.realpath(os.path.join(checkpoint, base)))
    return absolute_place(next((place for place in beside if os.path.isdir(place)), base))


def absolute_place(base: str | None) -> str | None:
    """`base`, if it is a folder as it is reached from everywhere, whatever the working directory is or becomes."""
    return os.path.abspath(base) if base and os.path.isdir(base) else base


def check_has_weights(folder: str) -> None:
    """Raise an `OSError` where a folder (no Hub id) holds no weights at all, or lacks a file that their index names."""
    if os.path.isdir(folder) and not any(file.endswith(".safetensors") for file in os.listdir(folder)):
        raise OSError(
            f"{folder} has no weights ({SAFE_WEIGHTS_NAME}): saving was interrupted, or it is no checkpoint; give "
            "another folder or save the model again."
        )
    for path in glob(os.path.join(escape(folder), "*.safetensors")):
        with open(path, "rb"):  # of a file that this user may not read, safetensors says that it is not there
            pass
    single, index = (os.path.join(folder, name) for name in _WHOLE)
    if os.path.exists(index) and not os.path.exists(single):
        gone = [shard for shard in _shards_of(index, folder) if not os.path.exists(shard)]
        if gone:
            raise OSError(f"{gone[0]} is missing, which {index} names: save or fetch the model again.")


def check_complete(info: dict, name: str) -> None:
    """Raise a `ValueError` if transformers' `loading_info` tells of weights that do not fit the model."""
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    for fault, keys in (
        ("missing", info["missing_keys"]),
        ("of another shape than the configuration says", mismatched),
        ("not in the configuration's decoder", info["unexpected_keys"]),
    ):
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} weights are {fault}, {min(keys)!r} among them; the checkpoint is incomplete or "
                "for another decoder: use config.json, weights and base that belong together."
            )


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Hide transformers' table of weights that do not fit: in a new model they are missing by design, and of a
    checkpoint `check_complete` tells in one sentence."""
    report = logging.get_logger("transformers.modeling_utils")
    other_messages = partial(_is_no_load_report)  # an object of this block's own: blocks may be nested
    report.addFilter(other_messages)
    try:
        yield
    finally:
        report.removeFilter(other_messages)


@contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Say of damaged files whose they are."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(
            f"the weights of {name}, or of its base, are damaged or were not written to their end ({error}): save or "
            "fetch them again."
        ) from error


@contextmanager
def absence_told(name: str) -> Iterator[None]:
    """Say in one sentence that there is no checkpoint at `name`."""
    try:
        yield
    except OSError as error:
        if os.path.exists(name):
            raise
        reason = _why_absent(name, error)
        raise OSError(f"no CLaRa checkpoint at {name!r}: give its folder or Hub id ({reason}).") from error


def _is_no_load_report(record) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _why_absent(name: str, error: OSError) -> str:
    reason = str(error).splitlines()[0].rstrip(". ")
    if os.path.exists(name):
        return reason
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        return "there is no such folder"
    return f"there is no such folder, nor could it be had from the Hub or its local cache: {reason}"


def keep_release(folder: str, config: CLaRaConfig, named: str, source: str, hub: dict) -> None:
    """Copy to `folder` what a converted checkpoint has of the paper's release: licence, notices, and method names.

    Args:
        named: the class with these names in the `auto_map` of the checkpoint at `source`, whose code is there.
        hub: arguments of the Hub (`revision`, `token`, ...).
    """
    named = named.rpartition("--")[2]
    code = f"{named.partition('.')[0]}.py"
    is_kept = named in ("", config.to_dict().get("auto_map", {}).get("AutoModel"))
    for file in NOTICES if is_kept else (*NOTICES, code):
        # Code is at the root of a repository.
        options = hub if file in NOTICES else {name: value for name, value in hub.items() if name != "subfolder"}
        path = cached_file(source, file, **options, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            with open(path, "rb") as kept:
                content = kept.read()
            with open(os.path.join(folder, file), "wb") as copied:
                copied.write(content)
        elif file == code:
            logger.warning(f"{folder} lacks the method names of the paper's release: {source} has no {code}.")
        if path is not None and file == code:
            config.auto_map["AutoModel"] = named
            config.save_pretrained(folder)


def open_repository(repo_id: str, private=None, token=None, revision: str | None = None) -> str:
    """The full name of a model's repository on the Hub, which is made, with its branch, if it is not there."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_folder(folder: str | os.PathLike, repo_id: str, inside: str = "", token=None, **options) -> CommitInfo:
    """Upload `folder` in one commit, without places of this machine, and remove weights that an earlier one has left.

    Args:
        inside: the model's folder in `folder` and in the repository.
        options: of `HfApi.upload_folder`.
    """
    for path in glob(os.path.join(folder, "**", "config.json"), recursive=True):
        forget_places(os.path.dirname(path))
    stale = [f"{inside}/{pattern}".lstrip("/") for pattern in _STALE]
    upload = HfApi(token=token).upload_folder
    return upload(repo_id=repo_id, folder_path=str(folder), delete_patterns=stale, **options)
