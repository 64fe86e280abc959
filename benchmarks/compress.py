"""Documents per second of compression, against the way of the paper's release.

    python benchmarks/compress.py
    python benchmarks/compress.py --shape mistral-7b --documents 512 --batch_size 64

The release pads every document to the whole budget, computes logits over the vocabulary at all positions, and keeps the
hidden states of all layers. Here this is re-created by flags on the same model, one after the other, so that each
one's cost can be told; its code is not used. Documents have natural lengths, 30 to 256 tokens.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from common import BenchmarkArguments, build_model, natural_documents, run_benchmark

from clara_hf.program import option, parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration, adapters_clara, decoding_clara, modeling_clara
from modeling_clara.adapters_clara import COMPRESSOR, use_adapter
from modeling_clara.functional_clara import position_ids
from modeling_clara.processing_clara import ENCODER_MARKERS


@dataclass
class CompressArguments(BenchmarkArguments):
    """What is compressed."""

    documents: int = option(64, "Documents per run.")
    batch_size: int = option(8, "Documents per forward pass, in all variants.")
    compression_rate: int = option(16, "Document budget of 256 tokens over memory tokens.")


def read_padded(
    model: CLaRaForRetrievalGeneration, rows: list[list[int]], head: bool, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states `[N, L, H]` of encoded documents, all padded to the budget, and their attention mask.

    Args:
        head: whether logits of all positions are computed.
        all_layers: whether the hidden states of all layers are kept.
    """
    count, width = model.config.num_memory_tokens, model.config.doc_max_length + ENCODER_MARKERS
    batch = model.processor.pad_encodings(rows, width=width).to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    own = model.memory_embeddings(torch.arange(count, device=ids.device).expand(len(ids), -1))
    embeddings = torch.cat([model.get_input_embeddings()(ids[:, :-count]), own], dim=1)
    options = {"attention_mask": mask, "position_ids": position_ids(mask), "use_cache": False}
    with values(UNFUSED), use_adapter(model.decoder, COMPRESSOR):
        decoder = model.decoder if head else model.decoder.base_model
        output = decoder(inputs_embeds=embeddings, output_hidden_states=all_layers, **options)
    return output.hidden_states[-1] if all_layers else output.last_hidden_state, mask


@torch.no_grad()
def compress_padded(
    model: CLaRaForRetrievalGeneration, documents: list[str], batch_size: int, head: bool, all_layers: bool
) -> torch.Tensor:
    """Memories `[N, l, H]` in batches of the given order, by [`read_padded`]."""
    rows, count = model.processor.encode_documents(documents), model.config.num_memory_tokens
    starts = range(0, len(rows), batch_size)
    parts = [read_padded(model, rows[start : start + batch_size], head, all_layers)[0] for start in starts]
    return torch.cat([hidden[:, -count:] for hidden in parts])


@contextmanager
def values(*changes: tuple[ModuleType, str, object]) -> Iterator[None]:
    """Parts of the model's code set otherwise: modules, names and values."""
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


UNPACKED = (modeling_clara, "can_pack", lambda *_, **__: False)
UNFUSED = (adapters_clara, "can_fuse", lambda *_: False)
UNMERGED = (adapters_clara, "MERGE_FROM", math.inf)
WHOLE_LAST_LAYER = (decoding_clara, "READS_UP_TO", 0)


def changed(run: Callable, *changes: tuple[ModuleType, str, object]):
    with values(*changes):
        return run()


def make_variants(model: CLaRaForRetrievalGeneration, args: CompressArguments) -> dict[str, Callable[[], torch.Tensor]]:
    documents = natural_documents(args.documents)
    padded = partial(compress_padded, model, documents, args.batch_size)
    compress = partial(model.compress, documents, batch_size=args.batch_size)
    return {
        "compress": compress,
        "last layer whole": partial(changed, compress, WHOLE_LAST_LAYER),
        "adapter applied to every token": partial(changed, compress, UNMERGED),
        "padded to the longest": partial(changed, compress, UNPACKED),
        "padded to the budget": lambda: padded(head=False, all_layers=False),
        "padded, head, all layers": lambda: padded(head=True, all_layers=True),
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(CompressArguments, arguments, description=__doc__)
    model = build_model(args, compression_rate=args.compression_rate)
    variants = make_variants(model, args)
    reference = "padded, head, all layers"
    run_benchmark(__file__, args, arguments, variants, items=args.documents, unit="documents", reference=reference)


if __name__ == "__main__":
    run_program(main)
