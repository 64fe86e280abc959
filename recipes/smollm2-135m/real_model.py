"""A trained checkpoint over real text: whether its memories are read, and whether every way to run it says the same.

    python recipes/smollm2-135m/real_model.py --model runs/smollm2/scp --data runs/smollm2/data/scp_validation.jsonl
    python recipes/smollm2-135m/real_model.py --model runs/smollm2/scp --data ... --variants reference --limit 200

For each kind of row, the cross entropy of its target with the right memory, with none, and with another row's; the gaps
are paired, with half of their 95% intervals. Then the same rows in other precisions, attention kernels and batches:
the largest difference of a row's loss from the reference, float32 through SDPA, the least cosine of a document's
memory, and how many greedy answers are the same.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from clara_hf.data.schema import load_scp
from clara_hf.program import UsageError, option, parse, run_program, write_json
from clara_hf.program.models import ModelSource, load_trained
from modeling_clara import CLaRaForRetrievalGeneration
from trainers.batches import CompressionCollator
from trainers.losses import memory_gaps
from trainers.scp import SCPRows, losses_by_memory


REFERENCE = "float32 sdpa"
# How a variant's model is loaded, and how many rows it reads together. Attention that is not SDPA pads batches.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    REFERENCE: ({"dtype": "float32", "attn_implementation": "sdpa"}, 8),
    "float32 unbatched": ({"dtype": "float32", "attn_implementation": "sdpa"}, 1),
    "float32 eager": ({"dtype": "float32", "attn_implementation": "eager"}, 8),
    "bfloat16 sdpa": ({"dtype": "bfloat16", "attn_implementation": "sdpa"}, 8),
    "bfloat16 eager": ({"dtype": "bfloat16", "attn_implementation": "eager"}, 8),
    "bfloat16 flash": ({"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}, 8),
    "4 bits": ({"dtype": "float32", "attn_implementation": "sdpa", "load_in_4bit": True}, 8),
}
# What the model reads of a batch.
READ = (
    "input_ids",
    "attention_mask",
    "labels",
    "document_input_ids",
    "document_attention_mask",
    "document_index",
)


@dataclass
class RealModelArguments:
    """What is compared."""

    model: str = option(help="CLaRa checkpoint.")
    data: str = option(help="Rows of the first stage (JSONL).")
    limit: int = option(32, "Rows of each kind.")
    variants: list[str] = option(
        help=f"Beside the reference, or reference for it alone: {'; '.join(VARIANTS)}.",
        default_factory=lambda: ["float32 unbatched", "float32 eager", "bfloat16 sdpa"],
    )
    answers: int = option(16, "Questions that are answered in every variant.")
    max_new_tokens: int = option(12, "Maximum number of tokens per answer.")
    max_length: int = option(256, "Maximum number of tokens of a prompt with its target.")
    output_file: str = option("runs/benchmarks/real_model.json", "For the figures.")

    def __post_init__(self):
        self.variants = [] if self.variants == ["reference"] else self.variants
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise UsageError(f"--variants {unknown[0]!r} is none of {'; '.join(VARIANTS)}.")


class Found(NamedTuple):
    """Of one variant: losses `[rows, 3]` with the right, no and the wrong memory, memories `[rows, l, H]`, answers."""

    losses: np.ndarray
    memories: torch.Tensor
    answers: list[str]


@torch.no_grad()
def losses_of(model: CLaRaForRetrievalGeneration, rows: list[dict], batch_size: int, max_length: int) -> np.ndarray:
    """Losses `[rows, 3]`, see [`losses_by_memory`]."""
    encode, collator = SCPRows(model.processor, 0, max_length), CompressionCollator(model.processor)
    examples, found = [encode(row, number) for number, row in enumerate(rows)], []
    for start in range(0, len(rows), batch_size):
        batch = collator(examples[start : start + batch_size])
        inputs = {name: value.to(model.device) for name, value in batch.items() if name in READ}
        found.append(losses_by_memory(model, inputs, model(**inputs)).cpu())
    return torch.cat(found).numpy()


def find(name: str, args: RealModelArguments, rows: list[dict]) -> Found:
    """What a variant makes of the rows."""
    options, batch_size = VARIANTS[name]
    model = load_trained(ModelSource(args.model, **options))
    texts = [row["docs"][0] for row in rows]
    memories = model.compress(texts, batch_size=batch_size)
    losses = losses_of(model, rows, batch_size, args.max_length)
    asked = [number for number, row in enumerate(rows) if row["data_type"] == "qa"][: args.answers]
    answers = []
    for start in range(0, len(asked), batch_size):
        chosen = asked[start : start + batch_size]
        given = {
            "questions": [rows[number]["question"][0] for number in chosen],
            "memories": list(memories[chosen, None]),
        }
        answers += model.generate(**given, rerank=False, max_new_tokens=args.max_new_tokens, do_sample=False).texts
    return Found(losses, memories.float().cpu(), answers)


def main(arguments: list[str] | None = None) -> None:
    args = parse(RealModelArguments, sys.argv[1:] if arguments is None else arguments, description=__doc__)
    rows, kinds = [], {}
    for row in load_scp(args.data):
        kind = kinds.setdefault(row["data_type"], [])
        if len(row["docs"]) == 1 and len(kind) < args.limit:
            kind.append(len(rows))
            rows.append(row)
    if len({row["docs"][0] for row in rows}) < 2:
        raise UsageError(f"--data {args.data} has no two rows over one document each, so that none could be swapped.")
    reference = find(REFERENCE, args, rows)
    figures = {"read": {}, "variants": {}}
    print(f"{args.model}: cross entropy, {REFERENCE}\n")
    print("| rows | right memory | no memory | another row's | no - right | another's - right |")
    print("|---|---|---|---|---|---|")
    for kind, numbers in kinds.items():
        gaps = figures["read"][kind] = {"rows": len(numbers), **memory_gaps(reference.losses[numbers])}
        values = [f"{gaps[f'ce_{name}_memory']:.3f}" for name in ("right", "no", "wrong")]
        values += [
            f"{gaps[f'{name}_memory_gap']:.3f} ± {gaps[f'{name}_memory_gap_ci95']:.3f}" for name in ("no", "wrong")
        ]
        print(f"| {len(numbers)} {kind} | {' | '.join(values)} |")
    if args.variants:
        print("\n| variant | mean loss | largest difference of a row | least cosine of a memory | same answers |")
        print(f"|---|---|---|---|---|\n| {REFERENCE} | {reference.losses[:, 0].mean():.4f} | | | |")
    for name in args.variants:
        found = find(name, args, rows)
        difference = np.abs(found.losses[:, 0] - reference.losses[:, 0])
        cosine = cosine_similarity(found.memories.flatten(1), reference.memories.flatten(1)).min()
        same = sum(map(str.__eq__, found.answers, reference.answers))
        figures["variants"][name] = {
            "mean_loss": float(found.losses[:, 0].mean()),
            "largest_difference": float(difference.max()),
            "least_cosine": float(cosine),
            "same_answers": [same, len(found.answers)],
        }
        print(
            f"| {name} | {found.losses[:, 0].mean():.4f} | {difference.max():.1e} | {cosine:.6f} | "
            f"{same} of {len(found.answers)} |",
            flush=True,
        )
    write_json(args.output_file, figures)


if __name__ == "__main__":
    run_program(main)
