"""Straight-through top-k selection: a hard choice forward, the gradient of a softmax backward."""

import torch


TAKEN_MASKS = ("exact", "published")
ESTIMATORS = ("straight_through", "soft", "gumbel")
PUBLISHED_EPSILON = 1e-8
MIN_TEMPERATURE = 1e-6


def straight_through_topk(
    scores: torch.Tensor,
    k: int,
    temperature: float = 0.02,
    candidate_mask: torch.Tensor | None = None,
    taken_mask: str = "exact",
    estimator: str = "straight_through",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Select the `k` best candidates of every row without cutting the gradient (arXiv 2511.18659, section 3).

    Slot `j` holds the one-hot row of the `j`-th best candidate. Its gradient is that of
    `softmax(scores / temperature + log(mask_j))`, where `mask_j` removes the candidates that slots `1 … j-1` took and
    is a constant: `Z = Z_hard + Z_soft - stop_gradient(Z_soft)`. The forward value is exactly the hard choice.

    Args:
        scores (`torch.Tensor` of shape `[batch, candidates]`, floating): similarity of every candidate.
        k (`int`): number of slots, `1 <= k <= candidates`.
        temperature (`float`): divides the scores before the softmax; values under 1e-6 count as 1e-6.
        candidate_mask (`torch.BoolTensor` of shape `[batch, candidates]`, *optional*): `False` where a row has no such
            candidate. Slots beyond a row's number of candidates are all zero and their index is -1.
        taken_mask (`"exact"` or `"published"`): how a taken candidate leaves the softmax of later slots. `"exact"` adds
            -inf. `"published"` adds log(1e-8) = -18.4 as the published model does; a taken candidate that leads by more
            than `18.4 * temperature` keeps the mass of later slots.
        estimator (`"straight_through"`, `"soft"` or `"gumbel"`): what slots hold, for ablations. `"soft"`: the softmax
            rows themselves, so that each slot reads a mixture. `"gumbel"`: as `"straight_through"`, after
            Gumbel(0, 1) noise on the logits, which draws the slots from the softmax without replacement
            (arXiv 1903.06059); other draws in every call.

    Returns:
        `weights` `[batch, k, candidates]` in the dtype of `scores`, and `indices` `[batch, k]` int64, best first. Equal
        scores are taken in the order of the candidates. A row with a NaN among its candidates' scores has NaN weights,
        so that the loss shows it, and indices that mean nothing.

    Raises:
        ValueError: `k`, `taken_mask` or `estimator` out of range, or `scores` not two-dimensional.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have the shape [batch, candidates], got {list(scores.shape)}.")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and the number of candidates ({scores.shape[1]}), got {k}.")
    if taken_mask not in TAKEN_MASKS:
        raise ValueError(f"taken_mask must be one of {TAKEN_MASKS}, got {taken_mask!r:.80}.")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r:.80}.")

    logits = scores / max(temperature, MIN_TEMPERATURE)
    if candidate_mask is None:
        candidate_mask = torch.ones_like(scores, dtype=torch.bool)
    if estimator == "gumbel":
        logits = logits - torch.empty_like(logits).exponential_().log()
    logits = logits.masked_fill(~candidate_mask, float("-inf"))

    indices = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    slot_is_filled = candidate_mask.gather(1, indices)
    hard = torch.nn.functional.one_hot(indices, scores.shape[1])
    soft = slot_softmax(logits, hard, slot_is_filled, taken_mask)
    held = soft if estimator == "soft" else hard + (soft - soft.detach())
    weights = held * slot_is_filled.unsqueeze(-1)
    return weights, indices.masked_fill(~slot_is_filled, -1)


def slot_softmax(
    logits: torch.Tensor, hard: torch.Tensor, slot_is_filled: torch.Tensor, taken_mask: str
) -> torch.Tensor:
    """The soft rows `[batch, k, candidates]` behind slots that hold the one-hot rows `hard`, best first.

    Args:
        logits (`[batch, candidates]`, floating): scores divided by the temperature, -inf where there is no candidate.
        hard (`[batch, k, candidates]` int64): what each slot holds.
        slot_is_filled (`[batch, k]` bool): where it holds anything; the soft rows of others mean nothing.
        taken_mask: as in [`straight_through_topk`].
    """
    taken = hard.cumsum(dim=1) - hard
    slot_logits = logits.unsqueeze(1).expand(-1, hard.shape[1], -1)
    if taken_mask == "exact":
        slot_logits = slot_logits.masked_fill(taken.bool(), float("-inf"))
    else:
        slot_logits = slot_logits + torch.log((1 - taken).to(logits.dtype) + PUBLISHED_EPSILON)
    # A slot without a candidate has nothing but -inf: give it finite logits, and no weight afterwards.
    slot_logits = slot_logits.masked_fill(~slot_is_filled.unsqueeze(-1), 0.0)
    return slot_logits.softmax(dim=-1)
