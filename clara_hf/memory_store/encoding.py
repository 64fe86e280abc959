"""Stored forms of a memory: as it is, or in codes of 8 to 1 bits per value that can be searched without decoding.

A form turns a memory's values into a *code space* by an orthonormal map and stores one of a few levels for each value
there, with one least-squares scale per memory. A question turned into the same space has the same products with codes
as with decoded memories, so that `turn` and `cosines` give exact scores of what is stored:
`q · (basis · levels) = (q · basis) · levels`.

| form | bits per value | needs | how |
|---|---|---|---|
| `none` | 16 or 32 | nothing | the model's values |
| `rotated8`, `rotated4`, `rotated2` | 8, 4, 2 | nothing | random signs and Hadamard transform, Lloyd–Max levels |
| `fitted2`, `fitted1.5`, `fitted1` | 2, 1.5, 1 on average | a sample | PCA per memory token, bits by variance |
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save


ROTATED = {"rotated8": 8, "rotated4": 4, "rotated2": 2}
FITTED = {"fitted2": 2.0, "fitted1.5": 1.5, "fitted1": 1.0}
FORMS = ("none", *ROTATED, *FITTED)
# A value takes one of these numbers of bits, so that values do not straddle bytes; or none, and is then its mean.
WIDTHS = (1, 2, 4, 8)
SCALE_BYTES = 4  # a float32 before the codes
PIECE_BYTES = 2**20  # of levels, which then stay in a processor's cache
CELLS, REACH = 128, 8  # for each unit, and so many units on both sides: levels of 8 bits are at least .017 apart
TINY = torch.finfo(torch.float32).tiny


@cache
def levels_of(bits: int) -> torch.Tensor:
    """The Lloyd–Max levels of a standard normal value, float64 `[2**bits]`, ascending."""
    half = 2 ** (bits - 1)
    # From levels spaced as the best ones are where there are many, by Lloyd's iteration, on the negative half alone.
    shares = (torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half)
    levels = torch.special.ndtri(shares) * 3**0.5
    for _ in range(3000):
        edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.zeros(1, dtype=torch.float64)])
        density = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp(-(edges**2) / 2) / (2 * torch.pi) ** 0.5])
        mass = torch.special.ndtr(edges).diff(prepend=torch.zeros(1, dtype=torch.float64))
        levels = (density[:-1] - density[1:]) / mass
    return torch.cat([levels, -levels.flip(0)])


@cache
def error_of(bits: int) -> float:
    """Mean squared error of a standard normal value at its level."""
    levels = levels_of(bits)
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf], dtype=torch.float64)])
    mass = torch.special.ndtr(edges).diff(prepend=torch.zeros(1, dtype=torch.float64))
    return float(1 - (mass * levels**2).sum())


def packed_size(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The number of each value's level, uint8, of the shape of `values`, which are about standard normal."""
    below, edges = _cells(bits, values.dtype, values.device)
    cell = (values * CELLS).floor_().clamp_(-CELLS * REACH, CELLS * REACH - 1).int().flatten() + CELLS * REACH
    code = below.index_select(0, cell)
    return (code + (values.flatten() > edges.index_select(0, code.int()))).to(torch.uint8).view(values.shape)


@cache
def _cells(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many edges between levels lie below each of many narrow cells, uint8, and all edges, with one behind them.

    A cell holds at most one edge, so that one comparison decides: four times as fast as to search among all edges.
    """
    levels = levels_of(bits)
    edges = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    starts = torch.arange(-CELLS * REACH, CELLS * REACH).to(dtype) / CELLS
    below = torch.bucketize(starts, edges).to(torch.uint8)
    return below.to(device), torch.cat([edges, edges.new_tensor([torch.inf])]).to(device)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[n, count]` codes in bytes, the first in the lowest bits: uint8 `[n, packed_size(count, bits)]`."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    return (codes << shifts).sum(-1, dtype=torch.uint8)


@cache
def _levels_by_byte(bits: int, device: torch.device) -> torch.Tensor:
    numbers = torch.arange(256).unsqueeze(1) >> (torch.arange(8 // bits) * bits)
    return levels_of(bits)[numbers & (2**bits - 1)].float().to(device)


def unpack(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The levels of packed codes: float32 `[n, count]`."""
    levels = F.embedding(stored.int(), _levels_by_byte(bits, stored.device))
    return levels.flatten(1)[:, :count]


class _Form:
    """What forms have in common."""

    size: int

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """Memories in code space, float32 `[n, any]`, whose products with turned questions are exact."""
        raise NotImplementedError

    def cosines(self, turned: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Cosine similarities `[B, n]` of turned questions of length 1 with stored memories; 0 with one of zeros."""
        values = self.values(stored)
        return turned @ values.T / values.norm(dim=1).clamp(min=TINY)


class Plain(_Form):
    """Memories as they are, in a dtype: form `none`."""

    name = "none"

    def __init__(self, width: int, dtype: torch.dtype):
        self.size = self.width = width
        self.dtype = dtype
        # Arrow and NumPy have no bfloat16: its bits are kept as uint16.
        self.numpy_type = np.dtype(np.uint16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))

    def encode(self, memories: torch.Tensor) -> torch.Tensor:
        """Memories `[n, width]` as they are stored, `[n, size]`."""
        memories = memories.to(self.dtype)
        return memories.view(torch.uint16) if self.dtype == torch.bfloat16 else memories

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """Memories `[n, width]` from what is stored."""
        return stored.view(self.dtype)

    def turn(self, queries: torch.Tensor) -> torch.Tensor:
        """Questions `[n, width]` in the space of `values`, float32."""
        return queries.float()

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.view(self.dtype).float()


class _Coded(_Form):
    """What codes have in common: a scale, and bytes of levels."""

    numpy_type = np.dtype(np.uint8)

    def _store(self, turned: torch.Tensor, levels: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        """A scale before the codes: the one with which `levels` are nearest to `turned`."""
        length = (levels * levels).sum(1, keepdim=True).clamp(min=TINY)
        scale = (turned * levels).sum(1, keepdim=True) / length
        return torch.cat([scale.float().contiguous().view(torch.uint8), *packed], dim=1)

    def _scale(self, stored: torch.Tensor) -> torch.Tensor:
        return stored[:, :SCALE_BYTES].flatten().clone().view(torch.float32).unsqueeze(1)


class Rotated(_Coded):
    """Codes of one number of bits for every value, after a fixed rotation that makes values alike and near normal.

    The rotation flips signs and applies the orthonormal Hadamard transform to the largest power of two of values; a
    width that is no power of two takes both twice, first from its front and then from its end.
    """

    def __init__(self, name: str, width: int):
        self.name = name
        self.bits = ROTATED[name]
        self.width = width
        self.size = SCALE_BYTES + packed_size(width, self.bits)
        span = 2 ** (width.bit_length() - 1)
        self._rounds = [(slice(0, span), _signs(width, 0))]
        if span < width:
            self._rounds.append((slice(width - span, width), _signs(width, 1)))

    def turn(self, queries: torch.Tensor) -> torch.Tensor:
        values = queries.float()
        for span, signs in self._rounds:
            values = values * signs.to(values.device)
            values[:, span] = hadamard(values[:, span])
        return values

    def _turn_back(self, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        for span, signs in reversed(self._rounds):
            values[:, span] = hadamard(values[:, span])
            values = values * signs.to(values.device)
        return values

    def encode(self, memories: torch.Tensor) -> torch.Tensor:
        turned = self.turn(memories)
        spread = turned.square().mean(1, keepdim=True).sqrt().clamp(min=TINY)
        packed = pack(quantize(turned / spread, self.bits), self.bits)
        return self._store(turned, unpack(packed, self.bits, self.width), packed)

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        return unpack(stored[:, SCALE_BYTES:], self.bits, self.width) * self._scale(stored)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        return self._turn_back(self.values(stored))


class Fitted(_Coded):
    """Codes after a PCA per memory token that was fitted on a sample: more bits where memories vary more.

    Args:
        name: of the form.
        tensors: what `fitting.fit` gives.
    """

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]):
        self.name = name
        slots, hidden = (int(number) for number in tensors["shape"])
        self._shape = (slots, hidden)
        self.width = slots * hidden
        slot = tensors["slot"].long()
        # Bases lie slot by slot; codes lie by their number of bits.
        order = torch.sort(tensors["bits"].long(), stable=True, descending=True).indices
        self._counts = torch.bincount(slot, minlength=slots).tolist()
        bits = tensors["bits"].long()[order]
        self._groups = [(number, int((bits == number).sum())) for number in reversed(WIDTHS)]
        self.size = SCALE_BYTES + sum(packed_size(count, number) for number, count in self._groups)
        self._tensors = {
            "basis": tensors["basis"].float(),  # in float16, its conversion is the work of a single question
            "order": order,
            "back": torch.argsort(order),
            "mean": tensors["mean"][order],
            "deviation": tensors["deviation"][order],
        }

    def _on(self, device: torch.device) -> dict[str, torch.Tensor]:
        if self._tensors["basis"].device != device:
            self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self._tensors

    def turn(self, queries: torch.Tensor) -> torch.Tensor:
        tensors, queries = self._on(queries.device), queries.float().unflatten(1, self._shape)
        bases = tensors["basis"].split(self._counts)
        return torch.cat([queries[:, slot] @ basis.T for slot, basis in enumerate(bases)], dim=1)[:, tensors["order"]]

    def encode(self, memories: torch.Tensor) -> torch.Tensor:
        turned = self.turn(memories)
        tensors = self._on(memories.device)
        normal = (turned - tensors["mean"]) / tensors["deviation"]
        packed, start = [], 0
        for bits, count in self._groups:
            packed.append(pack(quantize(normal[:, start : start + count], bits), bits))
            start += count
        return self._store(turned, self._levels(torch.cat(packed, dim=1)), *packed)

    def _levels(self, packed: torch.Tensor) -> torch.Tensor:
        tensors = self._on(packed.device)
        levels = torch.cat([levels for _, _, levels in self._unpacked(packed)], dim=1)
        return levels * tensors["deviation"] + tensors["mean"]

    def _unpacked(self, packed: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Levels of standard normal values, group by group, with their number of bits and their places."""
        start = first = 0
        for bits, count in self._groups:
            size = packed_size(count, bits)
            yield bits, slice(start, start + count), unpack(packed[:, first : first + size], bits, count)
            start, first = start + count, first + size

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        return self._levels(stored[:, SCALE_BYTES:]) * self._scale(stored)

    def cosines(self, turned: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        # With q · (mean + deviation ∘ levels) = q · mean + (q ∘ deviation) · levels, and the length alike, levels are
        # used as they are unpacked: the other passes over them take most of the time of `values`.
        tensors = self._on(stored.device)
        mean, deviation = tensors["mean"], tensors["deviation"]
        weights, power = torch.cat([turned, 2 * mean.unsqueeze(0)]) * deviation, deviation.square()
        rows = max(1, PIECE_BYTES // (4 * len(mean)))
        found = []
        for some in stored.split(rows):
            products, squares = weights.new_zeros(len(weights), len(some)), mean @ mean
            for bits, part, levels in self._unpacked(some[:, SCALE_BYTES:]):
                products += weights[:, part] @ levels.T
                if bits == 1:  # both levels have one square
                    squares = squares + levels_of(1)[1].square().float() * power[part].sum()
                else:
                    squares = squares + levels.square_() @ power[part]
            lengths = (products[-1] + squares).clamp(min=TINY).sqrt()
            # The scale has no say in a cosine but for its sign.
            found.append((products[:-1] + (turned @ mean).unsqueeze(1)) / lengths * self._scale(some).sign().T)
        return torch.cat(found, dim=1)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        tensors = self._on(stored.device)
        values = self.values(stored)[:, tensors["back"]].split(self._counts, dim=1)
        bases = tensors["basis"].split(self._counts)
        return torch.cat([part @ basis for part, basis in zip(values, bases, strict=True)], dim=1)


Form = Plain | Rotated | Fitted


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh–Hadamard transform of the last dimension, a power of two wide."""
    width = values.shape[-1]
    rows = 2 ** ((width.bit_length() - 1) // 2)
    # As the Kronecker product of two small ones: two matrix products in place of log2(width) passes over memory.
    left, right = _hadamard_matrix(rows).to(values), _hadamard_matrix(width // rows).to(values)
    return (left @ values.unflatten(-1, (rows, -1)) @ right).flatten(-2)


@cache
def _hadamard_matrix(width: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def _signs(width: int, number: int) -> torch.Tensor:
    # From a hash, so that they stay the same whatever becomes of random generators.
    digest = hashlib.shake_256(f"clara rotation {width} {number}".encode()).digest(packed_size(width, 1))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:width]
    return torch.from_numpy(bits * 2.0 - 1.0).float()


def to_file(tensors: dict[str, torch.Tensor]) -> tuple[str, bytes]:
    """The hash, 16 hexadecimal digits, and the content of a safetensors file."""
    content = save(tensors)
    return digest_of(content), content


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def from_file(path: Path, digest: str) -> dict[str, torch.Tensor]:
    """The tensors in the file whose hash is `digest`.

    Raises:
        OSError: the file is gone, damaged, or another one.
    """
    try:
        content = path.read_bytes()
        if digest_of(content) == digest:
            return load(content)
        reason = "its content is not what the store recorded: it is damaged, or another store's"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise OSError(f"{path} cannot be used ({reason}): copy it from where the store came from")
