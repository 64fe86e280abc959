"""Memory, time and checkpoint size that a recipe needs, computed from shapes. Nothing is downloaded or measured.

    clara cost recipes/mistral-7b/joint.yaml
    clara cost recipes/mistral-7b/joint.yaml --gpus 4 --tflops 150 --zero 3

The model is built on the meta device, which has shapes and no values, so that its weights are counted exactly. Lengths
of texts and the share of a GPU's arithmetic that training reaches are assumptions, named where they stand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from clara_hf.program import UsageError, option, parse
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS
from modeling_clara.weights_clara import SAMPLED_VALUES, saved_rows


# Shapes of the bases that the recipes name, as their config.json has them.
SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
BASES = {
    "mistralai/Mistral-7B-Instruct-v0.2": ("mistral", 32000, 4096, 14336, 32, 32, 8, 128, False),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "microsoft/Phi-4-mini-instruct": ("phi3", 200064, 3072, 8192, 32, 24, 8, 128, True),
}
TRAINED = {
    "scp": (COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS),
    "instruct": (COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS),
    "joint": (QUERY_REASONER, GENERATOR),
}
# Assumed tokens: of the words around the memories in a prompt, of a question, and of a target by stage.
PROMPT_TOKENS, QUESTION_TOKENS = 60, 30
TARGET_TOKENS = {"scp": 200, "instruct": 60, "joint": 15}
# Documents that a row of the stage compresses, and those that its prompt holds.
COMPRESSED = {"scp": 1, "instruct": 5, "joint": 0}
# Assumed for a GPU of the H100 class in bfloat16: two fifths of its peak.
ACHIEVED_TFLOPS = 400
# Documents per forward pass when the memory store is filled, where a recipe does not say.
MEMORY_BATCH = 64
# CUDA context, libraries' workspaces and fragmentation, assumed.
OVERHEAD_BYTES = 3 * 10**9
GPUS = 8


@dataclass
class Cost:
    """What a recipe needs on every GPU, in bytes; FLOPs of a row of data; bytes of a checkpoint.

    Attributes:
        weights: the base in bfloat16 and what trains in float32, with gradients and AdamW's two moments.
        activations: kept for backward, with activation checkpointing, and the logits.
        overhead: assumed, see `OVERHEAD_BYTES`.
        row_flops: forward, recomputation and backward; no gradients for the frozen weights.
        document_flops: of compressing a document of full length.
        checkpoint: of a `checkpoint-N` folder: own weights and optimizer states.
        compression: the whole model, which every GPU holds while the memory store is filled, with ZeRO-3 and FSDP too,
            and one layer's activations; 0 for stages without a store.
        host: main memory of every process while it loads the base, whole in any way of training.
    """

    weights: float
    activations: float
    row_flops: float
    document_flops: float
    checkpoint: float
    compression: float
    host: float
    overhead: float = OVERHEAD_BYTES

    @property
    def training_memory(self) -> float:
        return self.weights + self.activations + self.overhead

    @property
    def compression_memory(self) -> float:
        return self.compression + self.overhead if self.compression else 0.0

    @property
    def memory(self) -> float:
        """The peak: the two come one after the other."""
        return max(self.training_memory, self.compression_memory)


def base_config(name: str) -> PreTrainedConfig:
    """Configuration of a base of `BASES`, or of another one in a folder or on the Hub."""
    if name not in BASES:
        return AutoConfig.from_pretrained(name)
    # Tokens that an architecture has by default may lie beyond the vocabulary.
    values: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    values |= zip(SHAPE, BASES[name], strict=True)
    return AutoConfig.for_model(**values)


def meta_model(decoder: PreTrainedConfig, stage: str, **fields) -> CLaRaForRetrievalGeneration:
    """A CLaRa model over `decoder`, without values; added tokens take the ids behind the vocabulary."""
    config = CLaRaConfig(decoder_config=decoder, query_reasoner=stage == "joint", pad_token_id=0, **fields)
    first, count = decoder.vocab_size, config.most_memory_tokens
    config.memory_token_ids = list(range(first, first + count))
    config.ae_token_id, config.enc_token_id, config.sep_token_id = first + count, first + count + 1, first + count + 2
    decoder.vocab_size = first + count + 3
    with torch.device("meta"):
        return CLaRaForRetrievalGeneration(config)


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def checkpoint_bytes(
    model: CLaRaForRetrievalGeneration, stage: str, frozen_bytes: int = 2, deepspeed: bool = False
) -> int:
    """Size of a training checkpoint's weights and AdamW states: what trains in float32, twice more for the moments.

    Args:
        frozen_bytes (`int`): per value of adapters and embedding rows that do not train; 2 for bfloat16.
        deepspeed (`bool`): whether what trains is there in bfloat16 too, beside DeepSpeed's copy in float32.
    """
    trained = sum(count(model.part_parameters(part)) for part in TRAINED[stage])
    own = count(value for name, value in model.named_parameters() if ".lora_" in name)
    own += count(model.memory_embeddings.parameters())
    own += model.config.hidden_size**2 if model.config.memory_projection else 0
    matrices = 1 if model.config.get_text_config().tie_word_embeddings else 2
    rows = matrices * len(saved_rows(model.config)) * model.config.hidden_size
    base = [value for name, value in model.decoder.named_parameters() if ".lora_" not in name]
    sampled = sum(value.dim() != 2 or len(value) != model.config.vocab_size for value in base)
    return (14 if deepspeed else 12) * trained + frozen_bytes * (own - trained + rows) + 4 * SAMPLED_VALUES * sampled


def row_tokens(config: CLaRaConfig, stage: str, top_k: int) -> tuple[int, int]:
    """Assumed tokens of an example: those that are compressed or ranked with, memory tokens among them, and the prompt
    with its target. Both count towards `max_tokens_per_batch`."""
    behind = config.encoder_memory_tokens
    encoded = COMPRESSED[stage] * (config.doc_max_length + behind)
    if stage == "joint":
        encoded = QUESTION_TOKENS + behind
    slots = {"scp": 1, "instruct": 5, "joint": top_k}[stage]
    prompt = PROMPT_TOKENS + QUESTION_TOKENS + slots * (config.num_memory_tokens + 1) + TARGET_TOKENS[stage]
    return encoded, prompt


def rows_of(path: str | Path, values: dict, tokens: int) -> int:
    """Rows of a GPU's batch by a recipe's values, where a row has so many tokens.

    Raises:
        UsageError: it gives both or none of `per_device_train_batch_size` and `max_tokens_per_batch`, or the latter is
            no number, or too small for one row.
    """
    rows, most = (values.get(name) for name in ("per_device_train_batch_size", "max_tokens_per_batch"))
    if rows is not None and most is None:
        return rows
    if rows is not None or most is None:
        found = "neither" if rows is None else "both"
        raise UsageError(
            f"{path} has {found} of per_device_train_batch_size and max_tokens_per_batch: give one of them."
        )
    if not isinstance(most, int) or most < tokens:
        raise UsageError(
            f"{path} has max_tokens_per_batch {most!r:.80}, but a row has about {tokens} tokens: raise it."
        )
    return most // tokens


def cost(
    model: CLaRaForRetrievalGeneration,
    stage: str,
    rows: int,
    top_k: int,
    gpus: int = GPUS,
    zero: int = 0,
    memory_batch: int = MEMORY_BATCH,
) -> Cost:
    """What training needs with `rows` examples per GPU and forward pass, and activation checkpointing.

    Args:
        memory_batch (`int`): documents per forward pass when the memory store is filled.
        zero (`int`): ZeRO stage; from 1 the optimizer's states, from 2 gradients, and in 3 weights too are divided.
    """
    config = model.config
    text, behind = config.get_text_config(), config.encoder_memory_tokens
    read = 1.0 if config.layers_that_read is None else config.layers_that_read / text.num_hidden_layers
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    frozen = [value for name, value in model.decoder.named_parameters() if ".lora_" not in name]
    linear = count(value for value in frozen if id(value) not in ends)
    trained = sum(count(model.part_parameters(part)) for part in TRAINED[stage])
    adapters = count(value for name, value in model.named_parameters() if ".lora_" in name)
    idle = adapters + count(model.memory_embeddings.parameters()) - trained

    def share(stage: int) -> int:
        return gpus if zero >= stage else 1

    weights = (2 * (count(frozen) + idle) + 4 * trained) / share(3) + 4 * trained / share(2) + 8 * trained / share(1)

    encoded, prompt = row_tokens(config, stage, top_k)
    tokens = read * encoded + prompt
    head = 2 * config.hidden_size * config.vocab_size * TARGET_TOKENS[stage]
    # Forward, recomputation, gradient of the inputs; the adapters' weights have gradients of their own.
    row_flops = 3 * 2 * tokens * linear + 4 * 2 * tokens * adapters / len(model.adapter_names) + 2 * head

    kept = 2 * rows * tokens * config.hidden_size * text.num_hidden_layers
    # One layer at a time in full: about ten vectors of the hidden and four of the inner width per token.
    layer = 2 * rows * max(encoded, prompt) * (10 * config.hidden_size + 4 * text.intermediate_size)
    # Logits in bfloat16, in float32, and their gradient.
    logits = 10 * rows * TARGET_TOKENS[stage] * config.vocab_size
    document_flops = 2 * (config.doc_max_length + behind) * linear * read
    compression, host = 0, 2 * count(frozen)
    if stage == "joint":
        # Nothing is kept for backward: about two vectors of the hidden and four of the inner width per token.
        layer_width = 2 * config.hidden_size + 4 * text.intermediate_size
        compression = host + 2 * idle + 4 * trained
        compression += 2 * memory_batch * (config.doc_max_length + behind) * layer_width
    checkpoint = checkpoint_bytes(model, stage)
    return Cost(weights, kept + layer + logits, row_flops, document_flops, checkpoint, compression, host)


def recipe_cost(path: str | Path, gpus: int = GPUS, zero: int = 0) -> tuple[Cost, dict]:
    """Cost of a recipe, by the name of its file (`scp`, `instruct`, `joint`), and its values, the rows of a batch of
    `max_tokens_per_batch` as `per_device_train_batch_size` among them."""
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    stage = Path(path).stem
    # Later stages start from a checkpoint in a run's folder: their base stands in the first stage's recipe.
    first = yaml.safe_load(Path(path).with_name("scp.yaml").read_text(encoding="utf-8"))
    name = first["model_name_or_path"]
    model = meta_model(base_config(name), stage, **first["clara_config"])
    top_k = values.get("top_k") or model.config.top_k
    rows = rows_of(path, values, sum(row_tokens(model.config, stage, top_k)))
    memory_batch = values.get("memory_batch_size", MEMORY_BATCH)
    needed = cost(model, stage, rows, top_k, gpus, zero, memory_batch)
    return needed, {**values, "per_device_train_batch_size": rows}


def report(path: str | Path, gpus: int = GPUS, tflops: float = ACHIEVED_TFLOPS, zero: int = 0) -> list[str]:
    """The lines that stand at the head of a recipe."""
    needed, values = recipe_cost(path, gpus, zero)
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * gpus
    tokens, gigabyte = values.get("max_tokens_per_batch"), 1e9

    def minutes(flops: float) -> str:
        return f"{flops / (gpus * tflops * 1e12) / 60:.0f} min at {tflops:.0f} TFLOP/s per GPU"

    lines = [
        f"Global batch {batch} on {gpus} GPUs."
        if tokens is None
        else f"Global batch of about {batch} rows on {gpus} GPUs, {tokens} tokens on each at a time.",
        f"Memory per GPU: {needed.training_memory / gigabyte:.0f} GB in training (weights and optimizer "
        f"{needed.weights / gigabyte:.1f}, activations {needed.activations / gigabyte:.1f}, overhead "
        f"{needed.overhead / gigabyte:.0f}).",
        f"Host memory: {needed.host / gigabyte:.1f} GB per process while it loads the base, "
        f"{gpus * needed.host / gigabyte:.0f} GB for {gpus}.",
        f"Time per 100,000 rows: {minutes(1e5 * needed.row_flops)}.",
        f"Size of a checkpoint: {needed.checkpoint / gigabyte:.2f} GB.",
    ]
    if Path(path).stem == "joint":
        lines.insert(
            2,
            f"Memory per GPU: {needed.compression_memory / gigabyte:.0f} GB while documents are compressed, once, with "
            "the whole base on each, under ZeRO-3 and FSDP too.",
        )
        lines.insert(-1, f"Time to compress 1,000,000 documents, once: {minutes(1e6 * needed.document_flops)}.")
    return lines


@dataclass
class CostArguments:
    """What `clara cost` computes."""

    recipe: str = option(help="YAML file of a stage, with that stage's name.", positional=True)
    gpus: int = option(GPUS, "GPUs of the run.")
    tflops: float = option(ACHIEVED_TFLOPS, "Reached per GPU, in 10^12 FLOP/s.")
    zero: int = option(0, "ZeRO stage.", choices=tuple(range(4)))

    def __post_init__(self):
        if Path(self.recipe).stem not in TRAINED:
            raise UsageError(f"recipe {self.recipe}: its name tells the stage, which is one of {', '.join(TRAINED)}.")
        if self.gpus < 1 or self.tflops <= 0:
            raise UsageError(f"gpus is {self.gpus} and tflops {self.tflops:g}: both must be above 0.")


def main(arguments: list[str] | None = None) -> None:
    options = parse(CostArguments, arguments, description=__doc__)
    print("\n".join(report(options.recipe, options.gpus, options.tflops, options.zero)))
