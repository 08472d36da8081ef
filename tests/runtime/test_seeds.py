"""The streams of an outer run: distinct, of the Twister's own quality, and the same on every machine."""

import itertools

import numpy as np
import pytest
import torch

from ufom_runtime.coins import draw_coins
from ufom_runtime.problems.quadratic import quadratic
from ufom_runtime.training import seeds
from ufom_runtime.training.seeds import check_seed, generator
from ufom_theory import UfomError


def words(made):
    """The words of a generator's Twister that it uses: one bit of the first, all of the others."""
    found = np.frombuffer(made.get_state().numpy().tobytes()[24 : 24 + 8 * 624], np.uint64).copy()
    assert found.max() < 2**32
    found[0] >>= 31
    return found


def test_seeds_beyond_32_bits_and_neighbours_in_any_argument_are_other_streams():
    of_seed, of_step = (0, 1, 2**32, 2**32 + 1, 2**62), (1, 2, 2**31, 2**32 + 1)
    points = list(itertools.product(of_seed, of_step, seeds.STREAMS))
    states = [words(generator(*point)) for point in points]
    # Philox with one key is a bijection of its counter: the first 256 bits of any two differ
    assert len({state[1:9].tobytes() for state in states}) == len(points)
    draws = torch.stack([torch.rand(8, generator=generator(*point), dtype=torch.float64) for point in points])
    assert len({tuple(row.tolist()) for row in draws}) == len(points)


def test_a_seed_that_torch_would_wrap_is_refused():
    assert torch.equal(
        torch.rand(3, generator=seeds.seeded(7)), torch.rand(3, generator=torch.Generator().manual_seed(7))
    )
    with pytest.raises(UfomError, match=r"must be below 2\^32: torch's CPU generator would take 1 for it"):
        seeds.seeded(2**32 + 1)


def test_no_two_of_many_steps_coincide():
    """What `manual_seed` cannot give: 2·60,000 streams of 32 bits would coincide about twice."""
    raw = [np.random.Philox(key=seeds._KEY, counter=(7 << 192) | (k << 128) | (t << 64)).random_raw(4).tobytes()
           for k in range(60_000) for t in (0, 1)]  # fmt: skip
    assert len(set(raw)) == len(raw)
    assert words(generator(7, 59_999, "coins"))[1:9].astype("<u4").tobytes() == raw[-1]


def test_the_draws_are_those_of_numpys_twister_with_the_same_words():
    made = generator(3, 5, "tasks")
    key = words(made).astype(np.uint32)
    key[0] <<= 31
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    raw = twister.random_raw(2000).astype(object)
    expected = [((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in zip(raw[::2], raw[1::2], strict=True)]
    assert torch.rand(1000, generator=made, dtype=torch.float64).tolist() == expected


def test_the_streams_stay_the_same():
    """Stored checkpoints and tables depend on them."""
    assert torch.randint(10**6, (3,), generator=generator(4, 2, "tasks")).tolist() == [834165, 886277, 745273]
    uniform = torch.rand(20_000, generator=generator(0, 1, "coins"), dtype=torch.float64)
    assert uniform.mean().item() == pytest.approx(0.5, abs=4 / np.sqrt(12 * 20_000))


def test_another_layout_is_refused(monkeypatch):
    fields = [("left", "i4"), ("seeded", "i4"), ("seed", "u8"), ("next", "u8"), ("words", "u8", 624)]
    monkeypatch.setattr(seeds, "_STATE", np.dtype(fields))
    seeds._check_layout.cache_clear()
    with pytest.raises(UfomError, match="in another form"):
        generator(0, 1, "tasks")
    seeds._check_layout.cache_clear()


BAD = [(-1, "at least 0"), (2**63, "below 2"), (0.5, "an integer"), (True, "an integer"), (None, "an integer")]


@pytest.mark.parametrize(("seed", "message"), BAD)
def test_bad_seeds_are_named(seed, message):
    with pytest.raises(UfomError, match=message):
        check_seed(seed)


def test_a_default_device_does_not_move_the_draws():
    problem = quadratic(dim=3, r=2)
    drawn = problem.sample(2, generator(0, 1, "tasks")), draw_coins(4, 0.5, generator(0, 1, "coins"))
    torch.set_default_device("meta")
    try:
        again = draw_coins(4, 0.5, generator(0, 1, "coins"))
    finally:
        torch.set_default_device(None)
    assert torch.equal(again, drawn[1])
