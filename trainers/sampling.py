"""The order of training rows, from seed and epoch alone: processes draw alike, and so does a resumed run."""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator with a stream of its own for every epoch: neighbouring seeds of two runs do not share epochs."""
    generator = torch.Generator().manual_seed(seed)
    return generator.manual_seed(int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1]))


class LengthSampler(Sampler[int]):
    """Rows such that those of a batch are alike in length, in a new order each epoch, with a longest row first.

    Args:
        lengths (`list[int]`): of the rows.
        batch_size (`int`): rows of a global batch, which processes and accumulation divide.
        seed (`int`): of the order.
        epoch: tells the number of the epoch that begins.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = epoch_generator(self.seed, self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class MixSampler(Sampler[int]):
    """Rows of several kinds, in shares that are exact in every epoch, in a new order each.

    An epoch has as many rows as the data have of the kinds that are drawn. A kind with fewer rows than its share is
    gone through again, in another order; of one with more rows, each epoch leaves out others.

    Args:
        kinds (`list[str]`): each row's kind.
        weights (`dict[str, float]`): of each kind to draw; they need not sum to 1.
        seed (`int`): of the order.
        epoch: tells the number of the epoch that begins.

    Raises:
        ValueError: a weight is negative, all are 0, or a kind that has a weight has no row.
    """

    def __init__(self, kinds: list[str], weights: dict[str, float], seed: int, epoch: Callable[[], int]):
        found = Counter(kinds)
        check_weights(weights)
        for kind, weight in weights.items():
            if weight > 0 and kind not in found:
                raise ValueError(f"data_mix draws {kind!r}, but the data have only {sorted(found)}.")
        self.rows = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind, w in weights.items() if w > 0}
        self.counts = exact_shares(sum(map(len, self.rows.values())), {kind: weights[kind] for kind in self.rows})
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        generator = epoch_generator(self.seed, self.epoch())
        drawn: list[int] = []
        for kind, count in self.counts.items():
            rows = self.rows[kind]
            passes = [torch.randperm(len(rows), generator=generator) for _ in range(-(-count // len(rows)))]
            drawn += [rows[place] for place in torch.cat(passes)[:count].tolist()] if passes else []
        order = torch.randperm(len(drawn), generator=generator).tolist()
        return iter([drawn[place] for place in order])


def check_weights(weights: dict[str, float]) -> None:
    """Raise unless `weights` are at least 0 and not all 0.

    Raises:
        ValueError: names the kind and its weight.
    """
    for kind, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"data_mix must give every kind a weight of at least 0, got {weight!r} for {kind!r}.")
    if not any(weights.values()):
        raise ValueError(f"data_mix must give some kind a weight above 0, got {weights}.")


def exact_shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """`total` split in proportion to `weights`; what rounding leaves goes to the largest remainders."""
    shares = {kind: total * weight / sum(weights.values()) for kind, weight in weights.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind])
    for kind in by_remainder[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts
