"""Memory, time and size of converting a published checkpoint of Mistral-7B's shape, with random weights.

    python benchmarks/convert_7b.py --folder FOLDER [--full true] [--layers 32]

Writes a base and a checkpoint to FOLDER file by file (1 GB; with `--full`, the base's 14.5 GB and as much output),
converts it there and back in processes of their own, and prints what they took. Removes what it wrote.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from clara_hf.program import option, parse, run_program


HIDDEN, MIDDLE, KEYS, VOCABULARY, RANK = 4096, 14336, 1024, 32000, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
# What runs in the measured process: the command line, then its peak of resident memory in KiB, from Linux, since
# getrusage would count this process' own peak, which a child inherits.
MEASURED = (
    "import re, sys; from clara_hf.original.convert import main; code = main(sys.argv[1:]); "
    "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
    "sys.stderr.write(f'\\n{peak}'); sys.exit(code)"
)


@dataclass
class ConversionArguments:
    folder: str | None = option(None, "Where to write; a temporary folder by default.")
    layers: int = option(32, "Layers of the base.")
    full: bool = option(False, "Measure --full as well; needs 32 GB of disk.")


def random(*shape: int) -> torch.Tensor:
    """Random bfloat16 values, repeated after 2^20: drawing each of seven billion would take longer than the rest."""
    count = torch.Size(shape).numel()
    block = (torch.randn(2**20) * 0.02).to(torch.bfloat16)
    return block.repeat(-(-count // len(block)))[:count].view(shape).clone()


def write_base(folder: Path, layers: int, with_layers: bool) -> dict[str, torch.Tensor]:
    """Write a base, with or without the files of its layers, and return its embedding matrices."""
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=1e6,
        sliding_window=None,
        dtype="bfloat16",
        architectures=["MistralForCausalLM"],
    )
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    vocabulary = {word: i for i, word in enumerate(words + [f"t{i}" for i in range(len(words), VOCABULARY)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **specials)
    wrapped.save_pretrained(folder)
    index = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    embeddings = {name: random(VOCABULARY, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write("model-embeddings.safetensors", {**embeddings, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    for layer in range(layers if with_layers else 0):
        name = f"model.layers.{layer}"
        norms = [f"{name}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        tensors = {f"{name}.{module}.weight": random(*shape) for module, shape in LINEAR.items()}
        write(f"model-{layer:02d}.safetensors", tensors | {norm: torch.ones(HIDDEN).bfloat16() for norm in norms})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return embeddings


def write_checkpoint(folder: Path, layers: int, embeddings: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    adapters = {}
    for adapter in ("decoder_adapter", "encoder_adapter", "query_reasoner_adapter"):
        adapters[adapter] = {}
        for layer in range(layers):
            for module, (rows, columns) in LINEAR.items():
                name = f"model.layers.{layer}.{module}"
                adapters[adapter][f"{name}.lora_A.weight"] = random(RANK, columns)
                adapters[adapter][f"{name}.lora_B.weight"] = random(rows, RANK)
    torch.save(adapters, folder / "adapters.pth")
    added = {name: torch.cat([matrix, random(19, HIDDEN)]) for name, matrix in embeddings.items()}
    torch.save(added, folder / "decoder_first_last_layers.pth")
    config = {
        "model_type": "CLaRa",
        "decoder_model_name": "base",
        "doc_max_length": 256,
        "compr_rate": 16,
        "different_mem_tokens": True,
        "sep": True,
        "lora": True,
        "lora_r": RANK,
        "generation_top_k": 5,
        "training_stage": "stage2",
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(name: str, source: Path, out: Path, *options: str) -> None:
    """Convert in a process of its own and print its peak memory, its time and the size of its output."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEASURED, str(source), str(out), *options]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, peak = time.perf_counter() - start, int(done.stderr.split("\n")[-1]) * 1024
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{name:<16}{peak / 1e9:>8.2f} GB peak memory{seconds:>8.0f} s{size / 1e6:>10.1f} MB output", flush=True)


def same_tensors(one: Path, other: Path) -> bool:
    for name in ("adapters.pth", "decoder_first_last_layers.pth"):
        ours, theirs = (torch.load(path / name, weights_only=True) for path in (one, other))
        for key in theirs:
            pairs = (
                [(ours[key], theirs[key])]
                if name != "adapters.pth"
                else [(ours[key][inner], theirs[key][inner]) for inner in theirs[key]]
            )
            if not all(torch.equal(a, b) for a, b in pairs):
                return False
    return True


def main(arguments: list[str] | None = None) -> None:
    options = parse(ConversionArguments, arguments, description=__doc__)
    home = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (home / "base").mkdir()
        embeddings = write_base(home / "base", options.layers, options.full)
        write_checkpoint(home / "checkpoint", options.layers, embeddings)
        del embeddings
        measure("adapter-only", home / "checkpoint", home / "ours")
        measure("--to_original", home / "ours", home / "back", "--to_original")
        same = same_tensors(home / "back", home / "checkpoint")
        print(f"tensors after the way back are {'the same' if same else 'OTHERS'}")
        hidden = home / "base" / "model-embeddings.safetensors"
        hidden.rename(home / "hidden")
        measure("all embeddings", home / "checkpoint", home / "all")
        (home / "hidden").rename(hidden)
        if options.full:
            measure("--full", home / "checkpoint", home / "full", "--full")
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    run_program(main)
