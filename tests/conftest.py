"""Tiny random bases of several architectures, and CLaRa models over them."""

import copy
import os
import signal
import tempfile
from pathlib import Path


# One thread, here and in the processes that tests start: results that must be equal bit for bit then do not depend on
# how a sum was split, and tiny models are faster so.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Rows and examples that tests write are read by no later run. Processes that tests start have the same folder.
if "HF_DATASETS_CACHE" not in os.environ:
    ROWS = tempfile.TemporaryDirectory(prefix="clara-rows-", ignore_cleanup_errors=True)
    os.environ["HF_DATASETS_CACHE"] = ROWS.name
# Else DeepSpeed, which transformers imports where it is installed, tells every process's stdout that there is no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# What a shell starts in the background ignores interrupts, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    set_seed,
)


# Reference data that is no part of the repository; what needs it is skipped without.
SHARED = Path(os.environ.get("CLARA_SHARED", Path(__file__).parents[1].parent / "shared"))
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
ARCHITECTURES = {
    "mistral": (MistralConfig, {}),
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "phi3": (Phi3Config, {}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {}),
    "qwen2": (Qwen2Config, {}),
    "smollm3": (SmolLM3Config, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
TEXTS = [
    "The glassblower Mara Brandel lives in Velholm and keeps bees on the roof of her workshop.",
    "Halvex Works was founded by two sisters and sells copper lanterns to sailors.",
    "Velholm is a town on the river Aum; its market is held on Thursdays.",
    "The Long Winter is a novel by Oren Tasil about a lighthouse keeper.",
    "Where does the glassblower live? In Velholm. What does the company sell? Copper lanterns.",
]


def build_tokenizer(vocab_size: int = 400, beginning: bool = True, system_role: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>"] + (["<s>"] if beginning else [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    options = {"bos_token": "<s>"} if beginning else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **options)
    wrapped.chat_template = CHAT_TEMPLATE if system_role else NO_SYSTEM + CHAT_TEMPLATE
    return wrapped


def build_base(folder, architecture: str = "llama", padded_rows: int = 0, seed: int = 0) -> str:
    """Write a tiny random causal language model and its tokenizer to `folder`; returns the folder's name."""
    tokenizer = build_tokenizer(beginning=architecture != "qwen3", system_role=architecture != "gemma")
    config_class, extra = ARCHITECTURES[architecture]
    config = config_class(
        **SHAPE,
        **extra,
        vocab_size=len(tokenizer) + padded_rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_clara(base: str, seed: int = 0, **fields):
    """A CLaRa model over `base` whose adapters are random, none of them zero."""
    from modeling_clara import CLaRaForRetrievalGeneration

    set_seed(seed)
    settings = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 8, "top_k": 2, **fields}
    model = CLaRaForRetrievalGeneration.from_base(base, **settings)
    if settings.get("query_reasoner") is None:
        model.add_query_reasoner()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    return model


class Bases(dict):
    """Folders of tiny bases by architecture, each written on first use."""

    def __init__(self, tmp_path_factory):
        self.tmp_path_factory = tmp_path_factory

    def __missing__(self, architecture: str) -> str:
        self[architecture] = build_base(self.tmp_path_factory.mktemp(architecture), architecture)
        return self[architecture]


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory)


@pytest.fixture(scope="session")
def base(bases) -> str:
    return bases["llama"]


@pytest.fixture(scope="session")
def untouched_clara(base):
    return build_clara(base)


@pytest.fixture
def clara(untouched_clara):
    """A model over `base` of the test's own."""
    return copy.deepcopy(untouched_clara)


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)


@pytest.fixture(scope="session")
def forkserver():
    """For tests whose data-loader workers come from it: they then start with everything imported."""
    from processes import start_server

    start_server()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture
def path(tmp_path):
    """Where a test's memory store is."""
    return tmp_path / "memories"


@pytest.fixture
def store(path):
    """A store in float32 with a model that needs no weights."""
    from memory_fakes import FakeModel

    from clara_hf.memory_store.store import MemoryStore

    return MemoryStore.open(path, FakeModel(), dtype="float32")
