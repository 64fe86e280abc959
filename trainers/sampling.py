"""The order of training rows, from seed and epoch alone."""

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

    The order depends on seed and epoch alone: processes draw alike, and so does a resumed run.

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
