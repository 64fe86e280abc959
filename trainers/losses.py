"""Losses, and what training measures of outputs, as pure functions of tensors and arrays."""

from collections.abc import Callable

import numpy as np
import torch

from clara_hf.metrics.answer_f1.answer_f1 import score_answer
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking
from modeling_clara.functional_clara import slot_softmax
from modeling_clara.processing_clara import IGNORE_INDEX


# Cut-offs of Recall@k in evaluation during training; as many candidates are ranked, even where fewer are selected.
RECALL_KS = (1, 3, 5)


def contrastive_loss(
    scores: torch.Tensor,
    is_positive: torch.Tensor,
    is_candidate: torch.Tensor,
    temperature: float,
    positives: str = "one",
) -> torch.Tensor:
    r"""Contrastive loss of questions with one or several positives; with one, InfoNCE either way.

    `"one"`, the loss of Sup-, the supervised baseline of arXiv 2511.18659, is the mean over questions of

    `logsumexp_{i in candidates}(s_i / τ) - logsumexp_{i in positives}(s_i / τ)`

    the negative log of the probability that a softmax over the candidates gives to the positives together: one positive
    that is found is enough. `"all"` asks for each of them: the mean over a question's positives p of

    `logsumexp_{i in negatives and p}(s_i / τ) - s_p / τ`

    Args:
        scores (`[B, N]`, floating): similarity of question and candidate; any value, -inf included, where there is no
            candidate.
        is_positive (`[B, N]` bool): relevant candidates, at least one per question.
        is_candidate (`[B, N]` bool): `False` where a question has fewer than N candidates.
        temperature (`float`): τ.
        positives (`"one"` or `"all"`): whether one that is found is enough, or all are asked for.

    Returns:
        `[]`, at least 0, in float32, or float64 for float64 scores; infinite if a question has no positive.
    """
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    logits = logits.masked_fill(~is_candidate, float("-inf"))
    if positives == "one":
        found = logits.masked_fill(~is_positive, float("-inf"))
        return (logits.logsumexp(dim=-1) - found.logsumexp(dim=-1)).mean()
    negatives = logits.masked_fill(is_positive, float("-inf")).logsumexp(dim=-1, keepdim=True)
    each = logits.masked_fill(~is_positive, 0.0)
    each = (torch.logaddexp(negatives, each) - each).masked_fill(~is_positive, 0.0)
    counts = is_positive.sum(dim=-1)
    return (each.sum(dim=-1) / counts).masked_fill(counts == 0, float("inf")).mean()


def ranking_of(scores: torch.Tensor, depth: int) -> torch.Tensor:
    """The best candidates `[B, min(depth, N)]` by `scores` `[B, N]`, the first of equals first; -1 where a question has
    fewer, which its scores of -inf tell."""
    best = scores.detach().sort(dim=-1, descending=True, stable=True)
    return best.indices.masked_fill(best.values.isneginf(), -1)[:, :depth]


def batch_recall(indices: torch.Tensor, is_positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall of a batch: gold candidates found among all gold ones.

    Args:
        indices (`[B, k]` int64): ranked candidates, -1 where there are fewer.
        is_positive (`[B, N]` bool): gold candidates; a question without any does not count.

    Returns:
        the sum over questions, and their number.
    """
    found = is_positive.gather(1, indices.clamp(min=0)) & (indices >= 0)
    gold = is_positive.sum(dim=1)
    return (found.sum(dim=1) / gold.clamp(min=1)).sum(), (gold > 0).sum()


def chosen_mass(scores: torch.Tensor, indices: torch.Tensor, temperature: float, taken_mask: str) -> torch.Tensor:
    """Soft weight of the document in each filled slot `[slots]`.

    Args:
        scores (`[B, N]`), indices (`[B, k]`): as in [`~modeling_clara.CLaRaOutput`].
        temperature, taken_mask: as in [`~modeling_clara.straight_through_topk`].
    """
    is_filled = indices >= 0
    hard = torch.nn.functional.one_hot(indices.clamp(min=0), scores.shape[1])
    soft = slot_softmax(scores.float() / temperature, hard, is_filled, taken_mask)
    return (soft * hard).sum(dim=-1)[is_filled]


def token_accuracy(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of supervised tokens that are the most likely one given those before."""
    return {"token_accuracy": float((guesses == labels)[labels != IGNORE_INDEX].mean())}


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy `[B]` of every row, the mean over its supervised tokens; arguments as of the model's loss."""
    targets = labels[:, 1 - logits.shape[1] :]
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.sum(dim=1) / (targets != IGNORE_INDEX).sum(dim=1)


def memory_gaps(losses: np.ndarray) -> dict[str, float]:
    """What the right memory is worth: mean cross entropies, and how much is lost without it, each with half of its 95%
    interval over rows (normal approximation, pairs of one row).

    Args:
        losses (`[rows, 3]`): of each row with the right, no and the wrong memory; NaN where there is none.
    """
    found = {}
    for name, column in (("no", 1), ("wrong", 2)):
        gaps = losses[:, column] - losses[:, 0]
        gaps = gaps[~np.isnan(gaps)]
        found[f"ce_{name}_memory"] = float(np.nanmean(losses[:, column])) if len(gaps) else float("nan")
        found[f"{name}_memory_gap"] = float(gaps.mean()) if len(gaps) else float("nan")
        spread = gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        found[f"{name}_memory_gap_ci95"] = float(1.96 * spread)
    return {"ce_right_memory": float(losses[:, 0].mean()), **found}


def score_names(generates: bool, retrieves: bool) -> list[str]:
    """Names of what evaluation gives where answers are generated and candidates ranked."""
    if not (generates or retrieves):
        return ["token_accuracy"]
    answers = list(answer_scores(["a"], [["a"]])[0]) if generates else []
    return answers + [f"recall@{k}" for k in RECALL_KS if retrieves]


def answer_scores(texts: list[str], answers: list[list[str]]) -> list[dict[str, float]]:
    """F1, EM and cover-EM of every answer against the accepted ones."""
    return [score_answer(text.strip(), accepted) for text, accepted in zip(texts, answers, strict=True)]


def recall_scores(rankings: np.ndarray, golds: list[list[int]]) -> list[dict[str, float]]:
    """Recall@k of every question, for the cut-offs that `rankings` `[B, k]` allow; none where no gold is known."""
    ks = [k for k in RECALL_KS if k <= rankings.shape[1]]
    scores = []
    for ranking, gold in zip(rankings, golds, strict=True):
        found = score_ranking([int(index) for index in ranking if index >= 0], gold, ks) if gold else {}
        scores.append({name: value for name, value in found.items() if name.startswith("recall")})
    return scores


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every score over the questions that have it."""
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}


def selection_log_probs(logits: torch.Tensor, picks: torch.Tensor, is_candidate: torch.Tensor) -> torch.Tensor:
    """Log probability of lists that are written identifier by identifier, never one twice (DRO, arXiv 2505.03075).

    Args:
        logits (`[R, k, N]`): of the candidates' identifiers at each step of a list.
        picks (`[R, k]` int64): the lists; -1 after their end.
        is_candidate (`[R, N]` bool): `False` where a question has fewer than N candidates.

    Returns:
        `[R]`, in float32, or float64 for float64 logits: sums over the steps, each a softmax over what is not used yet.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_listed = picks >= 0
    taken = torch.nn.functional.one_hot(picks.clamp(min=0), logits.shape[2]).bool() & is_listed.unsqueeze(-1)
    is_used = taken.cumsum(dim=1) - taken.long() > 0
    is_free = is_candidate.unsqueeze(1) & ~is_used
    # After a list's end nothing may be free: all stay, and the step is left out of the sum.
    logits = logits.masked_fill(~is_free & is_listed.unsqueeze(-1), float("-inf"))
    steps = logits.log_softmax(dim=-1).gather(2, picks.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return steps.masked_fill(~is_listed, 0.0).sum(dim=1)


def draw_lists(
    next_logits: Callable[[torch.Tensor], torch.Tensor], is_candidate: torch.Tensor, k: int, greedy: bool = False
) -> torch.Tensor:
    """Lists `[R, k]` of distinct candidates drawn step by step, or the most likely candidate at every step; -1 where a
    question has no candidate left.

    Args:
        next_logits: gives, from the lists so far `[R, j]`, the logits `[R, N]` of their next candidate.
        is_candidate (`[R, N]` bool): as in [`selection_log_probs`].
    """
    is_free = is_candidate.clone()
    picks = torch.empty((len(is_free), 0), dtype=torch.long, device=is_free.device)
    for _ in range(k):
        logits = next_logits(picks).masked_fill(~is_free, float("-inf"))
        is_over = ~is_free.any(dim=1, keepdim=True)
        logits = logits.masked_fill(is_over, 0.0)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.argmax(dim=-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(dim=-1), 1)
        is_free = is_free.scatter(1, chosen, False)
        picks = torch.cat([picks, chosen.masked_fill(is_over, -1)], dim=1)
    return picks


def reweighted_loss(list_log_probs: torch.Tensor, answer_log_probs: torch.Tensor) -> torch.Tensor:
    """DRO's objective with its sign changed, the mean over questions of

    `-sum_i w_i (log p(z_i | x) + log p(y | x, z_i))`, where `w_i` is proportional to `p(y | x, z_i)`

    over the lists z_i that were drawn from p(z | x). Weights come from log space and have no gradient; as the number of
    lists grows, the gradient becomes that of `-log p(y | x)`, the likelihood over all lists.

    Args:
        list_log_probs, answer_log_probs (`[B, m]`): of the lists, and of the answer after each of them.
    """
    weights = answer_log_probs.detach().softmax(dim=-1)
    return -(weights * (list_log_probs + answer_log_probs)).sum(dim=-1).mean()
