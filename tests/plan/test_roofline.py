"""Slices of TPUs, and the least time of a step on them."""

import pytest

from ftwt_jax.errors import UserError
from ftwt_jax.plan.collectives import Collective
from ftwt_jax.plan.hlo import arrays
from ftwt_jax.plan.roofline import CHIPS, HOP, bound, parse_slice, seconds_of, slices_up_to


def collective(kind="all-reduce", text="f32[1000000]", hidden=False, times=1):
    return Collective(kind, arrays(text), 8, times, hidden, "", "")


@pytest.mark.parametrize(
    ("name", "chips", "links", "fewest", "diameter"),
    [
        ("v5e:1x1", 1, 0, 0, 0),
        ("v5e:2x4", 8, 20, 2, 4),
        ("v5e:4x4", 16, 48, 2, 6),
        # The side of 16 is a ring, the other is not.
        ("v5e:8x16", 128, 256 + 224, 3, 15),
        ("v6e:16x16", 256, 1024, 4, 16),
        ("v4:2x2x1", 4, 8, 2, 2),
        ("v5p:2x2x4", 16, 16 + 16 + 24, 3, 5),
        ("v5p:4x4x4", 64, 384, 6, 6),
    ],
)
def test_how_the_chips_of_a_slice_are_joined(name, chips, links, fewest, diameter):
    where = parse_slice(name)
    assert str(where) == name
    assert (where.size, where.links, where.fewest_links, where.diameter) == (chips, links, fewest, diameter)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5:2x4", "did you mean 'v5"),
        ("2x4", "known: v4, v5e, v5p, v6e"),
        ("v5e", "known are 1x1, 2x2, 2x4"),
        ("v5e:3x5", "--topology=v5e:3x5 is no slice of v5e"),
        ("v5e:32x32", "is no slice"),
        ("v5e:2x2x2", "is no slice"),
        ("v5e:256", "is no slice"),
        ("v4:4x4", "multiples of 4 up to 4096 chips"),
        ("v5p:4x4x6", "is no slice"),
        ("v4:32x32x32", "is no slice"),
    ],
)
def test_a_slice_that_there_is_not_is_refused_with_those_that_there_are(name, says):
    with pytest.raises(UserError) as error:
        parse_slice(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chip", CHIPS)
def test_growth_goes_from_8_to_256_chips_and_the_wanted_slice(chip):
    for name in CHIPS[chip].shapes:
        wanted = parse_slice(f"{chip}:{name}")
        sizes = [one.size for one in slices_up_to(wanted)]
        assert sizes == sorted({8, 16, 32, 64, 128, 256, wanted.size})
        assert wanted in slices_up_to(wanted)


def test_an_all_reduce_takes_as_long_as_its_bytes_and_hops_ask_for():
    where = parse_slice("v5e:16x16")
    # 4 MB, sent 2 x 255 times over 1,024 links of 50 GB/s; and 16 hops.
    assert seconds_of(collective(), where) == pytest.approx(2 * 255 * 4e6 / 1024 / 50e9 + 16 * HOP)
    # In a corner of a slice without rings, 4 MB leave over two links.
    assert seconds_of(collective(), parse_slice("v5e:2x4")) == pytest.approx(14 * 4e6 / 20 / 50e9 + 4 * HOP)
    assert seconds_of(collective(), parse_slice("v5e:1x1")) == 0


def test_a_scattered_sum_and_a_gather_take_together_what_an_all_reduce_takes():
    where = parse_slice("v5e:16x16")
    gather, scatter = collective("all-gather", "f32[256000]"), collective("reduce-scatter", "f32[1000]")
    apart = seconds_of(gather, where) + seconds_of(scatter, where)
    assert apart == pytest.approx(seconds_of(collective(text="f32[256000]"), where) + 16 * HOP)


def test_a_step_takes_the_longest_of_what_goes_on_at_once_and_all_that_is_waited_for():
    where = parse_slice("v5e:2x4")
    waited, hidden = collective(times=3), collective(text="f32[100000000]", hidden=True)
    alone = bound(197e9, 81.9e6, [], where)
    assert (alone.compute, alone.memory) == (pytest.approx(1e-3), pytest.approx(1e-4))
    assert (alone.step, alone.limit, alone.efficiency) == (alone.compute, "compute", 1)

    found = bound(197e9, 81.9e6, [waited], where)
    assert found.step == pytest.approx(1e-3 + 3 * seconds_of(waited, where))
    assert found.efficiency == pytest.approx(1e-3 / found.step)

    found = bound(197e9, 81.9e6, [waited, hidden], where)
    assert found.step == pytest.approx(seconds_of(hidden, where) + 3 * seconds_of(waited, where))
    assert found.limit == "interconnect"
    assert bound(1e9, 81.9e9, [waited], where).limit == "HBM"
