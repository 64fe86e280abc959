"""What a fitted form learns from a sample: bases by PCA, and how many bits each value gets."""

import torch

from .encoding import WIDTHS, error_of


FEWEST_DOCUMENTS = 1000
DOCUMENTS_PER_DIMENSION = 4


class Moments:
    """Sums of memories and of their products, from which [`fit`] makes a basis."""

    def __init__(self, slots: int, hidden: int, device: torch.device | str = "cpu"):
        dtype = torch.float64 if hidden <= 1024 else torch.float32
        self.count = 0
        self.first = torch.zeros(slots, hidden, dtype=dtype, device=device)
        self.second = torch.zeros(slots, hidden, hidden, dtype=dtype, device=device)

    def add(self, memories: torch.Tensor) -> None:
        """Adds memories `[n, slots, hidden]`."""
        memories = memories.to(self.second).transpose(0, 1)
        self.count += memories.shape[1]
        self.first += memories.sum(1)
        self.second += memories.transpose(1, 2) @ memories


def documents_needed(hidden: int) -> int:
    """How many memories a fitted form must have seen: from too few, the smaller half of a basis is noise."""
    return max(FEWEST_DOCUMENTS, DOCUMENTS_PER_DIMENSION * hidden)


def fit(moments: Moments, bits: float) -> dict[str, torch.Tensor]:
    """The tensors of a [`Fitted`] form with `bits` per value on average.

    Uncentred PCA of each memory token's dimensions; bits go, one upgrade after the other, to where they take away the
    most error, as Lloyd–Max levels of a normal value do.

    Raises:
        ValueError: `moments` are of too few memories.
    """
    slots, hidden = moments.first.shape
    needed = documents_needed(hidden)
    if moments.count < needed:
        raise ValueError(
            f"a fitted form needs at least {needed} documents at hidden size {hidden}, and there are {moments.count}: "
            "add more, or use a rotated form, which needs none"
        )
    # Slot by slot: of a large model, one is a decomposition of minutes and of a hundred megabytes.
    bases = torch.stack([torch.linalg.eigh(second / moments.count)[1].T.flip(0) for second in moments.second])
    mean = torch.einsum("skh,sh->sk", bases, moments.first / moments.count)
    power = torch.einsum("skh,shg,skg->sk", bases, moments.second / moments.count, bases)
    variance = (power - mean**2).clamp(min=1e-12 * power.max()).flatten()
    allotted = _allot(variance, bits)
    kept = allotted > 0
    slot = torch.arange(slots, device=kept.device).repeat_interleave(hidden)
    tensors = {
        "shape": torch.tensor([slots, hidden]),
        "basis": bases.flatten(0, 1)[kept].to(torch.float16),
        "slot": slot[kept].to(torch.int32),
        "bits": allotted[kept].to(torch.uint8),
        "mean": mean.flatten()[kept].float(),
        "deviation": variance[kept].sqrt().float(),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _allot(variance: torch.Tensor, bits: float) -> torch.Tensor:
    """Bits of each value, of [`WIDTHS`] or 0, that average at most `bits`."""
    errors = torch.tensor([1.0, *map(error_of, WIDTHS)], dtype=torch.float64)
    costs = torch.tensor([0, *WIDTHS]).diff()
    # Each further bit takes away less, so that the best upgrades are a prefix of each value's own.
    gains = variance.double().cpu().unsqueeze(1) * (-errors.diff() / costs)
    order = torch.argsort(gains.flatten(), descending=True, stable=True)
    spent = costs.repeat(len(variance))[order].cumsum(0)
    taken = order[spent <= int(bits * len(variance))]
    allotted = torch.zeros(gains.numel(), dtype=torch.int64)
    allotted[taken] = costs.repeat(len(variance))[taken]
    return allotted.view(gains.shape).sum(1).to(variance.device)
