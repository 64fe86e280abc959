"""Under what a trained model is asked: how many candidates, memories in which form; and what its queries say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.analysis.latents import logit_lens
from clara_hf.evaluation.cache import digest
from clara_hf.evaluation.systems.loading import load_clara
from clara_hf.program import read_json, write_json
from clara_hf.program.models import ModelSource


ALL = "all"


def with_candidates(examples: Sequence[QAExample], count: int | str, seed: int = 0) -> list[QAExample]:
    """The same questions among another number of candidates.

    Fewer: the gold documents, then the others in their order. More: documents of other questions join at random, among
    which one may answer a question as well as its gold documents do. A larger number holds all candidates of a smaller
    one.

    Args:
        count: candidates of a question, or `"all"` documents of all `examples`; never fewer than the gold ones.
        seed: of the documents that join.
    """
    corpus = list(dict.fromkeys(document for one in examples for document in one.docs))
    found = []
    for one in examples:
        gold, chance = set(one.gold), np.random.default_rng([seed, int(digest(one.id), 16) % 2**32])
        docs = list(dict.fromkeys([*one.gold, *one.docs]))
        if isinstance(count, str) or count > len(docs):
            docs = list(dict.fromkeys([*docs, *(corpus[place] for place in chance.permutation(len(corpus)))]))
        docs = docs if isinstance(count, str) else docs[: max(count, len(gold))]
        docs = [docs[place] for place in chance.permutation(len(docs))]
        places = [place for place, document in enumerate(docs) if document in gold]
        found.append(replace(one, docs=docs, pos_index=places or None))
    return found


def lens_records(model: str, examples: list[QAExample], kept: Path) -> list[dict]:
    """Per question, the share of its query's strongest words that the gold documents have and the question has not, and
    the same of as many other candidates: scores `lens_gold`, `lens_other` and `lens_excess`, their difference; see
    [`~clara_hf.evaluation.analysis.latents.logit_lens`].

    Args:
        model: folder of a CLaRa checkpoint.
        kept: file that keeps the scores.
    """
    if not kept.is_file():
        rows = logit_lens(load_clara(ModelSource(model)), [one for one in examples if one.pos_index], seed=0)
        found = [{"lens_gold": row.gold, "lens_other": row.other} for row in rows]
        write_json(kept, [{**one, "lens_excess": one["lens_gold"] - one["lens_other"]} for one in found])
    scores = iter(read_json(kept))
    return [{"scores": next(scores) if one.pos_index else {}} for one in examples]


def store_in_form(model: str, form: str, folder: Path) -> str:
    """A new or existing store in `folder` for the memories of `model` in a stored form that needs no data; every
    compressor has its own. Returns where it is."""
    from clara_hf.memory_store.store import MemoryStore

    clara = load_clara(ModelSource(model))
    place = folder / f"{form}-{clara.compressor_fingerprint()[:10]}"
    MemoryStore.open(place, clara, form=form)
    return str(place)
