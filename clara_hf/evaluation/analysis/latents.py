"""What a model's vectors hold: words of the query reasoner, and document means beside memory means."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from clara_hf.data.schema import QAExample
from modeling_clara.adapters_clara import COMPRESSOR


# Where a token of the query reasoner occurs; the first that holds.
QUESTION, GOLD, NEITHER = "question", "gold document", "neither"


@dataclass(frozen=True)
class LensRow:
    """The logit lens of one question.

    Attributes:
        question: its text.
        tokens: the query's strongest tokens, strongest first, with `question`, `gold document` or `neither`.
        gold: share of the tokens that the gold documents have and the question has not.
        other: the same share for as many candidates that are not gold: what chance and topic give.
    """

    question: str
    tokens: list[tuple[str, str]]
    gold: float
    other: float


class Lens:
    """Reads words off query vectors by the output head (arXiv 2511.18659, logit lens).

    A token's strength is its highest logit over the l query vectors. Tokens that the tokenizer marks as special, and
    those without a letter or digit, are passed over; " Owl" and "owl" are one word.
    """

    def __init__(self, model):
        tokenizer = model.processor.tokenizer
        self._head = model.get_output_embeddings()
        self._words = [_plain(tokenizer.decode([token])) for token in range(model.config.vocab_size)]
        special = {*tokenizer.all_special_ids, *model.config.added_token_ids}
        hidden = [token in special or not any(map(str.isalnum, word)) for token, word in enumerate(self._words)]
        self._hidden = torch.tensor(hidden)

    @torch.no_grad()
    def words(self, queries: torch.Tensor, count: int) -> list[list[str]]:
        """The `count` strongest words of each of the queries `[B, l, H]`, strongest first."""
        logits = self._head(queries).amax(dim=1).float().cpu()[:, : len(self._words)]
        best = logits.masked_fill(self._hidden, float("-inf")).topk(min(8 * count, len(self._words))).indices
        return [list(dict.fromkeys(self._words[token] for token in tokens))[:count] for tokens in best.tolist()]


def logit_lens(model, examples: list[QAExample], seed: int, count: int = 10, batch_size: int = 32) -> list[LensRow]:
    """Applies [`Lens`] to what the query reasoner makes of each question; texts are compared token by token, without
    case and spaces.

    Args:
        model: a `CLaRaForRetrievalGeneration`.
        examples: questions; those without known gold documents are left out.
        seed: of the choice of candidates that are not gold.
        count: tokens per question.
    """
    lens = Lens(model)
    chance = np.random.default_rng(seed)
    examples = [one for one in examples if one.pos_index]
    rows = []
    for start in tqdm(range(0, len(examples), batch_size), desc="Logit lens", leave=False):
        batch = examples[start : start + batch_size]
        queries = model.encode_questions([one.question for one in batch], batch_size=batch_size)
        for one, words in zip(batch, lens.words(queries, count), strict=True):
            rows.append(_lens_row(one, words, model.processor.tokenizer, chance))
    return rows


def _lens_row(one: QAExample, chosen: list[str], tokenizer, chance: np.random.Generator) -> LensRow:
    asked = _words([one.question], tokenizer)
    gold = _words(one.gold, tokenizer) - asked
    rest = [document for place, document in enumerate(one.docs) if place not in (one.pos_index or [])]
    picked = chance.permutation(len(rest))[: len(one.gold)]
    other = _words([rest[place] for place in picked], tokenizer) - asked
    kinds = [QUESTION if word in asked else GOLD if word in gold else NEITHER for word in chosen]
    shares = [sum(word in found for word in chosen) / len(chosen) for found in (gold, other)]
    return LensRow(one.question, list(zip(chosen, kinds, strict=True)), *shares)


def _words(texts: list[str], tokenizer) -> set[str]:
    if not texts:
        return set()
    # A space in front, so that the first word is cut into the tokens that it has inside a sentence.
    rows = tokenizer([form for text in texts for form in (text, " " + text)], add_special_tokens=False)["input_ids"]
    return {_plain(tokenizer.decode([token])) for token in {token for row in rows for token in row}}


def _plain(text: str) -> str:
    return text.strip().lower()


@torch.no_grad()
def mean_states(model, documents: list[str], batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden state of each document's tokens, and mean of its memory vectors; `[documents, H]` float32 each.

    These are the two sides of the MSE term of SCP (arXiv 2511.18659, equation 5), before any `memory_scale`.
    """
    rows = model.processor.encode_documents(documents)
    texts, memories = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="Means", leave=False):
        batch = model.processor.pad_encodings(rows[start : start + batch_size]).to(model.device)
        states, gap = model.read_states(COMPRESSOR, batch["input_ids"], batch["attention_mask"])
        center = states.mean(dim=1)
        memories.append(center.float().cpu().numpy())
        texts.append((center + gap).float().cpu().numpy())
    return np.concatenate(texts), np.concatenate(memories)


def project(points: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Points `[n, H]` in the plane, `[n, 2]`, by `pca` or `tsne` (scikit-learn).

    Raises:
        ImportError: t-SNE without scikit-learn.
    """
    centered = points - points.mean(axis=0)
    if method == "pca":
        _, _, axes = np.linalg.svd(centered, full_matrices=False)
        return centered @ axes[:2].T
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(centered)
