"""What the benchmarks share: a random model of a given shape, documents of natural lengths, and how to measure.

Variants of the same work are timed in turns, so that what else the machine does hits all of them alike; ratios are of
medians within one run. Work is counted in FLOP as executed, padding and output head included, and set against the
rate that the device reaches in a plain matrix multiplication in the same dtype.
"""

import ctypes
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, PreTrainedTokenizerFast, set_seed

from clara_hf.program import UsageError, option, write_json
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaProcessor


# Decoders of Mistral's architecture; the first is the one that the published implementation's cost was measured at.
SHAPES = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
WORDS = 31000
MATMUL_SIZES = {"cpu": 1024}
MATMUL_SIZE = 8192
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


@dataclass
class BenchmarkArguments:
    """What all benchmarks take."""

    shape: str = option("small", f"Decoder: {' or '.join(SHAPES)}; weights are random.")
    device: str = option("auto", "auto: the accelerator if there is one, else the CPU.")
    dtype: str = option("auto", "auto: bfloat16 on an accelerator, float32 on the CPU.")
    repeats: int = option(5, "Timed runs of each variant, in turns, after one to warm up.")
    clock: str = option(
        "wall", "wall, or process: CPU seconds of all threads, for a CPU that others use at the same time."
    )
    output: str | None = option(None, "JSON file for the figures; runs/benchmarks/<benchmark>.json by default.")
    vocab_size: int | None = option(None, "Vocabulary size of the decoder. Default: that of the shape.")
    variants: str | None = option(
        None, "Those to time, with semicolons between, the last of which others are set against."
    )
    variant: str | None = option(None, "Run this variant once and print its peak memory.")

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise UsageError(f"shape is {self.shape!r}; it must be one of {list(SHAPES)}.")
        if self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}; it must be at least 1.")
        if self.clock not in CLOCKS:
            raise UsageError(f"clock is {self.clock!r}; it must be one of {list(CLOCKS)}.")
        if self.device == "auto":
            current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self.device = "cpu" if current is None else current.type
        if self.dtype == "auto":
            self.dtype = "float32" if self.device == "cpu" else "bfloat16"
        if self.clock == "process" and self.device != "cpu":
            raise UsageError(
                f"clock is 'process', which does not see the work of the device {self.device!r}: use wall."
            )


def build_model(args: BenchmarkArguments, **fields) -> CLaRaForRetrievalGeneration:
    """A model with random weights, made on its device, over a vocabulary of made-up words."""
    set_seed(0)
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(WORDS))]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **specials)
    geometry = CLaRaConfig(**fields)
    added = CLaRaProcessor.add_tokens(wrapped, geometry.num_memory_tokens, geometry.distinct_memory_tokens)
    shape = {**SHAPES[args.shape], "vocab_size": args.vocab_size or SHAPES[args.shape]["vocab_size"]}
    decoder = MistralConfig(**shape, sliding_window=None, max_position_embeddings=8192, rope_theta=1e6)
    end, pad = wrapped.eos_token_id, wrapped.pad_token_id
    config = CLaRaConfig(**fields, **added, decoder_config=decoder, eos_token_id=[end], pad_token_id=pad)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = CLaRaForRetrievalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.processor = CLaRaProcessor(wrapped, model.config)
    model.requires_grad_(False)
    return model.eval()


def natural_documents(count: int, shortest: int = 30, longest: int = 256, seed: int = 0) -> list[str]:
    """Documents whose numbers of tokens are log-normal, 119 on average as Wikipedia passages have, within bounds."""
    draw = random.Random(seed)
    lengths = (round(draw.lognormvariate(4.68, 0.48)) for _ in range(count))
    return [sentence(draw, min(max(length, shortest), longest)) for length in lengths]


def sentence(draw: random.Random, tokens: int) -> str:
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(tokens))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(run: Callable[[], object], args: BenchmarkArguments) -> float:
    """Seconds of one run, work that an accelerator still does at its end included."""
    clock = CLOCKS[args.clock]
    synchronize(args.device)
    began = clock()
    run()
    synchronize(args.device)
    return clock() - began


def in_turns(variants: dict[str, Callable[[], object]], args: BenchmarkArguments) -> dict[str, list[float]]:
    """Seconds of each variant's runs, one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, run in variants.items():
            seconds[name].append(timed(run, args))
    return seconds


def count_flops(run: Callable[[], object]) -> int:
    """FLOP of the matrix multiplications and attention that one run executes, backward included; also warms up."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matmul_rate(args: BenchmarkArguments, repeats: int = 7) -> float:
    """FLOP per second of the best of several square matrix multiplications."""
    size = MATMUL_SIZES.get(args.device, MATMUL_SIZE)
    one, other = (torch.randn(size, size, device=args.device).to(getattr(torch, args.dtype)) for _ in range(2))
    timed(lambda: one @ other, args)
    return 2 * size**3 / min(timed(lambda: one @ other, args) for _ in range(repeats))


def peak_memory(run: Callable[[], object], device: str) -> dict[str, int]:
    """Bytes in use before a run and at its peak: of the device, or on the CPU resident ones of this process."""
    if device != "cpu":
        module = torch.get_device_module(device)
        synchronize(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        run()
        return {"before": before, "peak": module.max_memory_allocated()}
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # freed memory that malloc has kept would be used again, unseen
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak so far, of building and preparing, is forgotten
    before = _resident("VmRSS")
    run()
    return {"before": before, "peak": _resident("VmHWM")}


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        # No Linux: the peak, for both. macOS counts in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) * 1024


def peak_memories(script: str, variants: list[str], arguments: list[str]) -> dict[str, dict[str, int]]:
    """`peak_memory` of each variant in a process of its own, since a process' peak never falls."""
    found = {}
    for variant in variants:
        command = [sys.executable, script, *arguments, "--variant", variant]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {variant!r} failed: {done.stderr.strip()[-2000:]}")
        found[variant] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(
    script: str,
    args: BenchmarkArguments,
    arguments: list[str],
    variants: dict[str, Callable[[], object]],
    items: int,
    unit: str,
    reference: str,
) -> dict:
    """Times the variants, counts their work, measures their memory, each in a process of its own, on the same items;
    prints a table and writes the JSON file.

    Args:
        script, arguments: the benchmark's file and command line, to run it again for each variant's memory.
        variants: name -> one run over `items` items.
        unit: what is counted in throughput, in the plural.
        reference: the variant that others are set against.
    """
    flops = {name: count_flops(run) for name, run in variants.items()}
    rates = [matmul_rate(args)]
    seconds = in_turns(variants, args)
    rates.append(matmul_rate(args))
    rate = max(rates)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = peak_memories(script, list(variants), arguments)
    rows = {
        name: {
            "seconds": {"median": medians[name], "all": seconds[name]},
            f"{unit}_per_second": items / medians[name],
            "speed_over_reference": medians[reference] / medians[name],
            "flop": flops[name],
            "flop_per_second": flops[name] / medians[name],
            "share_of_matmul_rate": flops[name] / medians[name] / rate,
            "memory_before_bytes": memory[name]["before"],
            "peak_memory_bytes": memory[name]["peak"],
            "peak_memory_over_reference": memory[name]["peak"] / memory[reference]["peak"],
        }
        for name in variants
    }
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "variant")}
    figures = {
        "variants": rows,
        "reference": reference,
        "matmul_flop_per_second": rate,
        "settings": settings,
        "machine": {
            "device": args.device if args.device == "cpu" else torch.get_device_module(args.device).get_device_name(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "torch": torch.__version__,
        },
    }
    print(table(rows, unit))
    spread = max(max(values) / min(values) for values in seconds.values())
    print(
        f"Medians of {args.repeats} runs in turns (largest spread within a variant: {spread:.1f} times); {args.shape}, "
        f"{args.dtype} on {figures['machine']['device']}, {torch.get_num_threads()} threads, {args.clock} clock, load "
        f"{os.getloadavg()[0]:.1f}; matrix multiplication at {rate / 1e12:.3g} TFLOP/s."
    )
    path = args.output or f"runs/benchmarks/{Path(script).stem}.json"
    write_json(path, figures)
    print(f"Figures in {path}.")
    return figures


def table(rows: dict[str, dict], unit: str) -> str:
    head = ("variant", "seconds", f"{unit}/s", "speed", "GFLOP/s", "of matmul", "peak GiB", "relative")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds']['median']:.3g} | {row[f'{unit}_per_second']:.3g} "
            f"| {row['speed_over_reference']:.2f} | {row['flop_per_second'] / 1e9:.3g} "
            f"| {row['share_of_matmul_rate']:.0%} | {row['peak_memory_bytes'] / 2**30:.2f} "
            f"| {row['peak_memory_over_reference']:.2f} |"
        )
    return "\n".join(lines)


def run_benchmark(
    script: str,
    args: BenchmarkArguments,
    arguments: list[str],
    variants: dict[str, Callable[[], object]],
    **options,
) -> dict | None:
    """All of `measure`, or the one variant whose memory another process asks for."""
    chosen = [name.strip() for name in args.variants.split(";")] if args.variants else list(variants)
    for name in [args.variant] if args.variant is not None else chosen:
        if name not in variants:
            raise UsageError(f"variant is {name!r}; it must be one of {list(variants)}.")
    if args.variant is None:
        if args.variants:
            variants, options = {name: variants[name] for name in chosen}, {**options, "reference": chosen[-1]}
        return measure(script, args, arguments, variants, **options)
    print(json.dumps(peak_memory(variants[args.variant], args.device)))
    return None


def against(figures: dict, one: str, other: str) -> str:
    """A sentence: how a variant compares with another one of the same run."""
    speed, peak = (
        [figures["variants"][name][key] for name in (one, other)]
        for key in ("speed_over_reference", "peak_memory_bytes")
    )
    return (
        f"{one} against {other}: {speed[0] / speed[1]:.1f} times the speed, {peak[0] / peak[1]:.2f} of the peak memory."
    )
