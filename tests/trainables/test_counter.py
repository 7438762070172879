"""Counter-based random numbers. Run: python -m pytest tests/trainables/test_counter.py"""

import pytest
import torch

from trainables import counter

BITS = 2**64


def splitmix(state: int) -> int:
    """SplitMix64's mixer on Python's integers, which neither overflow nor have a sign."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % BITS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % BITS
    return state ^ (state >> 31)


def test_the_mixer_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    # The generator's first outputs from state 0, as published with it
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = [golden * number % BITS for number in (1, 2, 3)]
    assert [splitmix(state) for state in states] == known
    as_int64 = torch.tensor([state - BITS if state >= 2**63 else state for state in states])
    assert [value % BITS for value in counter._mix(as_int64).tolist()] == known


def test_a_number_depends_on_seed_stream_step_sample_and_place():
    samples = torch.arange(2)
    numbers = torch.cat(
        [
            counter.uniform(0, "mask", 0, samples, 3),
            counter.uniform(1, "mask", 0, samples, 3),
            counter.uniform(0, "flip", 0, samples, 3),
            counter.uniform(0, "mask", 1, samples, 3),
        ]
    )
    assert len(numbers.flatten().unique()) == numbers.numel()


def test_numbers_are_the_same_each_time_and_for_more_places():
    samples = torch.arange(5)
    numbers = counter.uniform(3, "mask", 7, samples, 4)
    assert torch.equal(numbers, counter.uniform(3, "mask", 7, samples, 4))
    assert torch.equal(numbers, counter.uniform(3, "mask", 7, samples, 9)[:, :4])
    assert numbers.dtype == torch.float32


def test_the_halves_of_a_batch_equal_the_whole():
    whole = counter.uniform(0, "mask", 5, torch.arange(8), 6)
    halves = [counter.uniform(0, "mask", 5, torch.arange(a, a + 4), 6) for a in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))


def test_numbers_are_uniform_in_the_half_open_unit_interval():
    numbers = counter.uniform(0, "mask", 0, torch.arange(1000), 100).flatten().double()
    assert numbers.min() >= 0 and numbers.max() < 1
    # Ten equal bins of 100 000 draws: each within five standard deviations (95) of 10 000
    assert (torch.histc(numbers, 10, 0, 1) - 10_000).abs().max() < 5 * 95
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)


def test_the_largest_bits_stay_below_one():
    assert counter._shift(torch.tensor([-1]), 40).float().mul(2.0**-24).item() < 1


def test_neighbours_are_not_correlated():
    numbers = counter.uniform(0, "mask", 0, torch.arange(300), 300).double() - 0.5
    for axis in (0, 1):
        product = (numbers * numbers.roll(1, axis)).mean() * 12
        assert abs(product) < 5 / 300


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_holds_each_number_once(count):
    order = counter.permutation(0, "data", 0, count)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(count))


def test_permutations_depend_on_seed_and_epoch_and_on_nothing_else():
    order = counter.permutation(0, "data", 0, 50)
    torch.rand(3)
    assert torch.equal(order, counter.permutation(0, "data", 0, 50))
    assert not torch.equal(order, counter.permutation(0, "data", 1, 50))
    assert not torch.equal(order, counter.permutation(1, "data", 0, 50))
    assert not torch.equal(order, torch.arange(50))
