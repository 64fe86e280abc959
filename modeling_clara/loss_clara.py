"""The answer's cross entropy, and how to have it without the logits of all its tokens at once."""

import importlib
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from .adapters_clara import checkpoint_under_adapter
from .decoding_clara import use_forward
from .processing_clara import IGNORE_INDEX


# Logits that a training step holds at once; more are computed in chunks of so many.
MOST_LOGITS = 2**24


def follows_tokens(labels: torch.Tensor, attention_mask: torch.Tensor) -> bool:
    """Whether every label stands behind an attended position, and so none is predicted from padding."""
    return bool(attention_mask[:, :-1][labels[:, 1:] != IGNORE_INDEX].all())


def packed_targets(labels: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of prompts `[B, L]` whose attended positions stand in one row: the places `[n]` in it that predict a label, and
    these labels `[n]`."""
    place = attention_mask.bool().flatten().cumsum(0).view_as(labels) - 1
    predicts = labels[:, 1:] != IGNORE_INDEX
    return place[:, :-1][predicts], labels[:, 1:][predicts]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross entropy of position t predicting label t+1, over the positions that `logits` `[B, T, vocab]` hold."""
    targets = labels[:, labels.shape[1] - logits.shape[1] :][:, 1:]
    return target_loss(logits[:, :-1], targets, num_items)


def target_loss(logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross entropy of `logits` `[..., vocab]` and the ids `[...]` that they predict, -100 for none: their sum over
    `num_items`, else their mean."""
    total = nn.functional.cross_entropy(
        logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten().long(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return _share(total, targets, num_items)


def _share(total: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(total.device)
    return total / num_items


def wants_chunks(decoder: PreTrainedModel, labels: torch.Tensor) -> bool:
    """Whether the logits that predict `labels` are too many to hold, and [`chunked_loss`] can do without.

    It runs the head by itself, outside of the decoder's forward pass, which needs weights that are whole at any time:
    not those that ZeRO-3, FSDP or tensor parallelism spread, or that are offloaded.
    """
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    if count * decoder.config.get_text_config().vocab_size <= MOST_LOGITS:
        return False
    if is_deepspeed_zero3_enabled() or torch.compiler.is_compiling():
        return False
    kinds = {type(weight.data) for weight in decoder.parameters()}
    return kinds == {torch.Tensor} and not any(weight.is_meta for weight in decoder.parameters())


def chunked_loss(
    decoder: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """[`target_loss`] of the logits that `decoder` makes of last hidden states, under its active adapter.

    Logits come from the decoder's own forward pass behind its base, with whatever it does to them: bias, scale, cap or
    an adapter on the head. On CUDA, where liger-kernel is installed and the head is a linear layer and nothing else,
    the loss is that package's.

    Args:
        hidden (`[n, H]`): behind the base's last norm.
        targets (`[n]` int64): the ids that they predict.
    """
    fused = liger_loss(decoder, hidden)
    if fused is not None:
        head = decoder.get_output_embeddings()
        return _share(fused(hidden, head.weight, targets, bias=head.bias, reduction="sum"), targets, num_items)
    size = max(MOST_LOGITS // decoder.config.get_text_config().vocab_size, 1)
    if any(weight.requires_grad for weight in decoder.get_output_embeddings().parameters()):
        again = checkpoint_under_adapter(decoder, checkpoint)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        losses = [again(_chunk_loss, decoder, *part, use_reentrant=False) for part in parts]
        return _share(torch.stack(losses).sum(), targets, num_items)
    return _share(ChunkedLoss.apply(hidden, targets, decoder, size), targets, num_items)


class _States(tuple):
    """What a head reads of its base's output: the last hidden states. All else there is `None`."""

    def __getattr__(self, name: str):
        return self[0] if name == "last_hidden_state" else None


def head_logits(decoder: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[n, vocab]` that `decoder` makes of the last hidden states `[n, H]` of its base, which does not run."""
    states = _States([hidden.unsqueeze(0)])
    with use_forward(decoder.base_model, lambda *_, **__: states):
        return decoder(inputs_embeds=states[0], use_cache=False).logits[0]


def _chunk_loss(decoder: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return target_loss(head_logits(decoder, hidden), targets, 1)


class ChunkedLoss(torch.autograd.Function):
    """The sum of the cross entropies of hidden states `[n, H]` and the ids `[n]` that they predict, by a head whose
    weights are frozen.

    The gradient of `hidden` is computed chunk by chunk along with the loss, so that no logits wait for backward, and
    none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, targets, decoder, size):
        wants_gradient = ctx.needs_input_grad[0]
        gradient, total = torch.empty_like(hidden) if wants_gradient else None, None
        for start in range(0, len(hidden), size):
            own, ids = hidden[start : start + size].detach(), targets[start : start + size].long().unsqueeze(1)
            own.requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                logits = head_logits(decoder, own)
            found = logits.detach().log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            loss = -found.gather(1, ids).sum()
            total = loss if total is None else total + loss
            if wants_gradient:
                slope = found.exp_().scatter_add_(1, ids, found.new_full(ids.shape, -1.0)).to(logits.dtype)
                (gradient[start : start + size],) = torch.autograd.grad(logits, own, slope)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (slope,) = ctx.saved_tensors
        return (slope * gradient).to(slope.dtype), None, None, None


def liger_loss(decoder: PreTrainedModel, hidden: torch.Tensor) -> Callable | None:
    """Liger's fused linear cross entropy, where it computes what `decoder` does of `hidden` `[n, H]`."""
    if hidden.device.type != "cuda" or not is_liger_kernel_available() or not is_plain_head(decoder, hidden):
        return None
    # An import statement would be demanded of everybody who loads a checkpoint with its code.
    return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy


@torch.no_grad()
def is_plain_head(decoder: PreTrainedModel, hidden: torch.Tensor) -> bool:
    """Whether a decoder's logits are those of a linear layer, to which nothing is done: no cap, no scale."""
    head = decoder.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype != hidden.dtype:
        return False
    # So large that a cap shows, whatever its value.
    large = 1000 * hidden[:1]
    return torch.equal(head_logits(decoder, large), head(large.unsqueeze(0))[0])
