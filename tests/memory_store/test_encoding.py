import math

import numpy as np
import pytest
import torch

from clara_hf.memory_store.encoding import (
    CELLS,
    FITTED,
    REACH,
    ROTATED,
    WIDTHS,
    Fitted,
    Plain,
    Rotated,
    _signs,
    error_of,
    levels_of,
    pack,
    quantize,
    unpack,
)
from clara_hf.memory_store.fitting import Moments, _allot, fit


SLOTS, HIDDEN = 3, 16


def memories(count=3000, seed=0):
    """With outlier dimensions, a mean, and dimensions that depend on one another, differently in each slot."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(1, -2, HIDDEN)
    mixing = torch.randn(SLOTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)) * spread
    hidden = torch.randn(count, SLOTS, HIDDEN, generator=generator)
    return torch.einsum("nsk,shk->nsh", hidden, mixing) + torch.arange(HIDDEN)


def moments(count=3000):
    found = Moments(SLOTS, HIDDEN)
    for part in memories(count).split(700):
        found.add(part)
    return found


# Obvious versions, value by value in float64


def slow_levels(value, levels):
    return min(range(len(levels)), key=lambda index: abs(levels[index] - value))


def slow_bytes(codes, bits):
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8][::-1], 2) for start in range(0, len(text), 8)]


def slow_hadamard(values):
    if len(values) == 1:
        return values
    left, right = slow_hadamard(values[: len(values) // 2]), slow_hadamard(values[len(values) // 2 :])
    sums = [a + b for a, b in zip(left, right, strict=True)] + [a - b for a, b in zip(left, right, strict=True)]
    return [value / math.sqrt(2) for value in sums]


def slow_rotated(memory, bits):
    width, values = len(memory), [float(value) for value in memory]
    span = 2 ** int(math.log2(width))
    for number, start in enumerate([0] if span == width else [0, width - span]):
        values = [value * sign for value, sign in zip(values, _signs(width, number).tolist(), strict=True)]
        values[start : start + span] = slow_hadamard(values[start : start + span])
    spread = math.sqrt(sum(value**2 for value in values) / width)
    levels = levels_of(bits).tolist()
    codes = [slow_levels(value / spread, levels) for value in values]
    chosen = [levels[code] for code in codes]
    scale = sum(a * b for a, b in zip(values, chosen, strict=True)) / sum(value**2 for value in chosen)
    return scale, codes, values, [scale * value for value in chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_value_gets_the_level_that_a_search_among_all_edges_gives(bits, dtype):
    levels = levels_of(bits)
    edges = ((levels[1:] + levels[:-1]) / 2).to(dtype)
    assert (edges * CELLS).floor().unique().numel() == edges.numel()  # at most one in a cell
    assert edges.abs().max() < REACH
    around = [edges, *(torch.nextafter(edges, edges.new_tensor(far)) for far in (-torch.inf, torch.inf))]
    starts = torch.arange(-2 * CELLS * REACH, 2 * CELLS * REACH).to(dtype) / CELLS
    drawn = 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(bits), dtype=dtype)
    values = torch.cat([*around, starts, starts - 1e-7, drawn, edges.new_tensor([torch.inf, -torch.inf, 1e30])])
    assert torch.equal(quantize(values, bits), torch.bucketize(values, edges).to(torch.uint8))


@pytest.mark.parametrize("width", [48, 64, 7])
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_codes_are_those_of_the_obvious_version(name, width):
    form = Rotated(name, width)
    rows = memories(20).flatten(1).repeat(1, 2)[:, :width]
    stored, turned = form.encode(rows), form.turn(rows)
    for row in range(len(rows)):
        scale, codes, values, decoded = slow_rotated(rows[row].tolist(), form.bits)
        assert stored[row, :4].numpy().view(np.float32)[0] == pytest.approx(scale, rel=1e-5)
        found = unpack(stored[row : row + 1, 4:], form.bits, width)
        different = (found[0] != levels_of(form.bits).float()[codes]).sum()
        assert different <= 1  # a value at the edge between two levels
        if different == 0:
            assert stored[row, 4:].tolist() == slow_bytes(codes, form.bits)
            assert torch.allclose(
                form.values(stored[row : row + 1])[0].double(), torch.tensor(decoded).double(), rtol=1e-4
            )
        assert torch.allclose(turned[row].double(), torch.tensor(values).double(), atol=1e-4)


@pytest.mark.parametrize(("name", "most"), [("rotated8", 1e-4), ("rotated4", 0.011), ("rotated2", 0.13)])
def test_rotation_loses_what_a_normal_values_levels_do_also_with_outliers(name, most):
    form, rows = Rotated(name, 48), memories(200).flatten(1)
    rows[:, 5] *= 30
    error = (form.decode(form.encode(rows)) - rows).square().sum() / rows.square().sum()
    assert error < most


def test_levels_are_where_no_level_can_be_moved_for_a_smaller_error():
    assert levels_of(1).tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])
    assert levels_of(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-4)
    assert [error_of(bits) for bits in (1, 2, 4)] == pytest.approx([0.36338, 0.11748, 0.009497], rel=1e-3)
    values = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for bits in WIDTHS:
        error = (levels_of(bits)[quantize(values, bits).long()] - values).square().mean()
        assert error == pytest.approx(error_of(bits), rel=0.05)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 16])
def test_packing_is_that_of_the_obvious_version_and_is_undone(bits, count):
    codes = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert [row.tolist() for row in packed] == [slow_bytes(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack(packed, bits, count), levels_of(bits).float()[codes.long()])


def test_bits_go_where_they_take_away_the_most_error():
    variance = torch.logspace(3, -3, 64, dtype=torch.float64)
    errors = {0: 1.0, **{bits: error_of(bits) for bits in WIDTHS}}
    steps = dict(zip((0, *WIDTHS), WIDTHS, strict=False))
    for bits in (1.0, 1.5, 2.0):
        allotted = _allot(variance, bits).tolist()
        assert 64 * bits - max(WIDTHS) < sum(allotted) <= 64 * bits and allotted == sorted(allotted, reverse=True)
        # No upgrade that was not made gains more for each bit than one that was.
        gain = {
            low: [float(value) * (errors[low] - errors[high]) / (high - low) for value in variance]
            for low, high in steps.items()
        }
        made = [gain[low][place] for place, number in enumerate(allotted) for low in steps if steps[low] <= number]
        left = [gain[number][place] for place, number in enumerate(allotted) if number in steps]
        assert min(made) >= max(left)


@pytest.mark.parametrize(("name", "most"), [("fitted2", 0.01), ("fitted1.5", 0.02), ("fitted1", 0.05)])
def test_fitted_codes_are_small_and_near_and_give_the_products_of_what_they_decode_to(name, most):
    form = Fitted(name, fit(moments(), FITTED[name]))
    assert form.size <= 4 + SLOTS * HIDDEN * FITTED[name] / 8 + len(WIDTHS)
    rows = memories(500, seed=1).flatten(1)
    stored = form.encode(rows)
    decoded = form.decode(stored)
    assert stored.shape == (500, form.size) and stored.dtype == torch.uint8
    assert (decoded - rows).square().sum() / rows.square().sum() < most
    questions = torch.randn(9, SLOTS * HIDDEN, generator=torch.Generator().manual_seed(2))
    exact = questions.double() @ decoded.double().T
    assert torch.allclose((form.turn(questions) @ form.values(stored).T).double(), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("form", [*ROTATED, *FITTED, "none"])
def test_cosines_are_those_of_values_piece_by_piece_too(form, monkeypatch):
    monkeypatch.setattr("clara_hf.memory_store.encoding.PIECE_BYTES", 4 * 7 * SLOTS * HIDDEN)
    if form in FITTED:
        form = Fitted(form, fit(moments(), FITTED[form]))
    else:
        form = Rotated(form, SLOTS * HIDDEN) if form in ROTATED else Plain(SLOTS * HIDDEN, torch.float32)
    rows = memories(40, seed=1).flatten(1)
    rows[3] *= -1
    stored = form.encode(rows)
    questions = torch.nn.functional.normalize(torch.randn(9, SLOTS * HIDDEN), dim=1)
    turned, values = form.turn(questions), form.values(stored).double()
    exact = turned.double() @ torch.nn.functional.normalize(values, dim=1).T
    assert torch.allclose(form.cosines(turned, stored).double(), exact, atol=1e-6)


def test_fitted_codes_are_those_of_the_obvious_version():
    tensors = fit(moments(), 2.0)
    form, rows = Fitted("fitted2", tensors), memories(20, seed=1).double()
    stored = form.encode(rows.float().flatten(1))
    order = sorted(range(len(tensors["bits"])), key=lambda place: -int(tensors["bits"][place]))
    for row, memory in enumerate(rows):
        values, decoded, near_edge = [], [], 0
        for place in order:
            value = float(memory[tensors["slot"][place]] @ tensors["basis"][place].double())
            mean, deviation = (float(tensors[name][place]) for name in ("mean", "deviation"))
            levels = levels_of(int(tensors["bits"][place])).tolist()
            gaps = sorted(abs(level - (value - mean) / deviation) for level in levels)
            near_edge += gaps[1] - gaps[0] < 1e-4
            values.append(value)
            decoded.append(mean + deviation * levels[slow_levels((value - mean) / deviation, levels)])
        scale = sum(a * b for a, b in zip(values, decoded, strict=True)) / sum(value**2 for value in decoded)
        found = form.values(stored[row : row + 1])[0].double()
        wrong = ~torch.isclose(found, scale * torch.tensor(decoded, dtype=torch.float64), rtol=1e-3, atol=1e-4)
        assert wrong.sum() <= near_edge


def test_a_form_is_not_fitted_to_too_few_memories():
    with pytest.raises(ValueError, match="at least 1000 documents at hidden size 16, and there are 900"):
        fit(moments(900), 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_memories_come_back_bit_for_bit(dtype):
    form, rows = Plain(48, dtype), memories(5).flatten(1).to(dtype)
    stored = form.encode(rows).numpy()
    assert stored.dtype == form.numpy_type and torch.equal(form.decode(torch.from_numpy(stored)), rows)


@pytest.mark.parametrize("form", [Rotated("rotated2", 48), Plain(48, torch.float32)])
def test_a_memory_of_zeros_stays_one(form):
    rows = torch.zeros(2, 48)
    assert torch.equal(form.decode(form.encode(rows)).float(), rows)
    assert torch.equal(form.cosines(form.turn(rows + 1), form.encode(rows)), torch.zeros(2, 2))
