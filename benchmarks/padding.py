"""How much memories differ between padding to the full length, as the published code does, and to the longest document.

    python benchmarks/padding.py CHECKPOINT --documents FILE

FILE has one document per line. Positions of attended tokens differ by a constant under the two, which rotary
embeddings do not see but for rounding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from clara_hf.program import option, parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR
from modeling_clara.processing_clara import ENCODER_MARKERS


@dataclass
class PaddingArguments:
    checkpoint: str = option(help="Folder or Hub id.", positional=True)
    documents: str = option(help="File with one document per line.")


def memories_of(model: CLaRaForRetrievalGeneration, documents: list[str], width: int | None) -> torch.Tensor:
    """Memories `[N, l, H]` in float32, each document alone, padded to `width` tokens or not at all."""
    rows = []
    for ids in model.processor.encode_documents(documents):
        batch = model.processor.pad_encodings([ids], width=width)
        rows.append(model.encode(COMPRESSOR, batch["input_ids"], batch["attention_mask"])[0])
    return torch.cat(rows).float()


def main(arguments: list[str] | None = None) -> None:
    options = parse(PaddingArguments, arguments, description=__doc__)
    documents = [line for line in Path(options.documents).read_text(encoding="utf-8").splitlines() if line.strip()]
    print("| type | largest difference | of the largest value | lowest cosine | full, to float32 | none, to float32 |")
    print("|---|---|---|---|---|---|")
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        model = CLaRaForRetrievalGeneration.from_pretrained(options.checkpoint, dtype=dtype)
        with torch.no_grad():
            full = memories_of(model, documents, model.config.doc_max_length + ENCODER_MARKERS)
            none = memories_of(model, documents, None)
        exact = full if exact is None else exact
        difference, *rounding = (
            (one - other).abs().max() for one, other in ((full, none), (full, exact), (none, exact))
        )
        cosine = torch.nn.functional.cosine_similarity(full.flatten(1), none.flatten(1)).min()
        shares = f"{difference:.1e} | {difference / exact.abs().max():.1e} | {cosine:.6f}"
        print(f"| {str(dtype).split('.')[1]} | {shares} | {rounding[0]:.1e} | {rounding[1]:.1e} |", flush=True)


if __name__ == "__main__":
    run_program(main)
