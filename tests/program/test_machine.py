"""Threads are chosen by measuring."""

import pytest
import torch

from clara_hf.program import machine


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("seconds", "chosen"), [({2: [1, 1, 1], 1: [2, 2, 2]}, 2), ({2: [4, 4, 1], 1: [2, 2, 2]}, 1)])
def test_as_many_threads_as_are_fastest_in_most_rounds(seconds, chosen, threads, monkeypatch):
    left = {count: iter(each) for count, each in seconds.items()}
    monkeypatch.setattr(machine, "step_seconds", lambda count: next(left[count]))
    said = machine.choose_threads()
    assert torch.get_num_threads() == chosen and f"{chosen} of 2" in said


def test_one_slow_round_does_not_decide(threads, monkeypatch):
    left = {2: iter([40, 1, 1]), 1: iter([2, 2, 2])}
    monkeypatch.setattr(machine, "step_seconds", lambda count: next(left[count]))
    machine.choose_threads()
    assert torch.get_num_threads() == 2


def test_a_choice_of_the_user_s_is_left_alone(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(machine, "step_seconds", lambda count: 1 / 0)
    assert machine.choose_threads() is None and torch.get_num_threads() == 2


def test_steps_are_timed_under_the_given_threads(threads):
    assert machine.step_seconds(1, steps=1) > 0 and torch.get_num_threads() == 1
