"""Time and memory of answering: from memories, batched, against the raw text of the same documents.

    python benchmarks/generate.py
    python benchmarks/generate.py --shape mistral-7b --batch_size 32

Every variant answers the same questions from as many documents, with answers of the same number of tokens, which are
forced since the weights are random. Memories were made before; reading the question with the query reasoner and ranking
are left out, as both kinds would do them alike.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import BenchmarkArguments, build_model, natural_documents, run_benchmark, sentence

from clara_hf.program import option, parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import GENERATOR, use_adapter


@dataclass
class GenerateArguments(BenchmarkArguments):
    """What is answered."""

    batch_size: int = option(8, "Questions, answered together unless a variant says other.")
    documents: int = option(5, "Documents per question.")
    new_tokens: int = option(8, "Tokens of every answer.")
    compression_rate: int = option(16, "Document budget of 256 tokens over memory tokens.")


def from_memories(
    model: CLaRaForRetrievalGeneration, questions: list[str], memories: torch.Tensor, batch_size: int, options: dict
) -> None:
    """Answers from memories `[questions, k, l, H]`."""
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        model.generate(questions=questions[rows], memories=list(memories[rows]), rerank=False, **options)


def from_text(
    model: CLaRaForRetrievalGeneration, questions: list[str], documents: list[list[str]], batch_size: int, options: dict
) -> None:
    """Answers from the documents' own tokens, with the same adapter over the same base."""
    processor = model.processor
    for start in range(0, len(questions), batch_size):
        pairs = zip(questions[start : start + batch_size], documents[start : start + batch_size], strict=True)
        prompts = [processor.answer_prompt(question, documents=docs) for question, docs in pairs]
        rows = processor.tokenize(prompts)
        batch = processor.pad_prompts(rows).to(model.device)
        with torch.no_grad(), use_adapter(model.decoder, GENERATOR):
            model.decoder.generate(**batch, pad_token_id=model.config.pad_token_id, **options)


def make_variants(args: GenerateArguments) -> dict[str, Callable[[], None]]:
    model = build_model(args, compression_rate=args.compression_rate)
    draw = random.Random(1)
    questions = [sentence(draw, 20) for _ in range(args.batch_size)]
    texts = natural_documents(args.batch_size * args.documents)
    documents = [texts[start : start + args.documents] for start in range(0, len(texts), args.documents)]
    memories = model.compress(texts).view(args.batch_size, args.documents, *model._memory_shape)
    options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    static = {**options, "cache_implementation": "static"}
    return {
        "memories, static cache": partial(from_memories, model, questions, memories, args.batch_size, static),
        "memories": partial(from_memories, model, questions, memories, args.batch_size, options),
        "memories, one by one": partial(from_memories, model, questions, memories, 1, options),
        "raw text": partial(from_text, model, questions, documents, args.batch_size, options),
        "raw text, one by one": partial(from_text, model, questions, documents, 1, options),
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(GenerateArguments, arguments, description=__doc__)
    variants = make_variants(args)
    run_benchmark(__file__, args, arguments, variants, items=args.batch_size, unit="answers", reference="raw text")


if __name__ == "__main__":
    run_program(main)
