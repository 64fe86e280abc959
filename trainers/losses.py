"""Losses as pure functions of tensors."""

import torch


def contrastive_loss(
    scores: torch.Tensor, is_positive: torch.Tensor, is_candidate: torch.Tensor, temperature: float
) -> torch.Tensor:
    r"""Multi-positive contrastive loss, the mean over questions of

    `logsumexp_{i in candidates}(s_i / τ) - logsumexp_{i in positives}(s_i / τ)`

    the negative log of the probability that a softmax over the candidates gives to the positives together: one positive
    that is found is enough. It is the loss of the supervised twin in arXiv 2511.18659. With one positive it is InfoNCE.

    Args:
        scores (`[B, N]`, floating): similarity of question and candidate; any value, -inf included, where there is no
            candidate.
        is_positive (`[B, N]` bool): relevant candidates, at least one per question.
        is_candidate (`[B, N]` bool): `False` where a question has fewer than N candidates.
        temperature (`float`): τ.

    Returns:
        `[]`, at least 0, in float32, or float64 for float64 scores; infinite if a question has no positive.
    """
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    logits = logits.masked_fill(~is_candidate, float("-inf"))
    positives = logits.masked_fill(~is_positive, float("-inf"))
    return (logits.logsumexp(dim=-1) - positives.logsumexp(dim=-1)).mean()
