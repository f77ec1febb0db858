"""Slices of TPUs, and lower bounds on the time of a step on them."""

import pytest

from ftwt_jax.errors import UserError
from ftwt_jax.plan.collectives import Collective
from ftwt_jax.plan.hlo import parse_arrays
from ftwt_jax.plan.roofline import CHIPS, HOP, compute_bound, compute_seconds, list_slices, parse_slice


def collective(kind="all-reduce", text="f32[1000000]", hidden=False, times=1):
    return Collective(kind, parse_arrays(text), 8, times, hidden, "", "")


@pytest.mark.parametrize(
    ("name", "chips", "links", "fewest", "diameter"),
    [
        ("v5e:1x1", 1, 0, 0, 0),
        ("v5e:2x4", 8, 20, 2, 4),
        ("v5e:4x4", 16, 48, 2, 6),
        # The axis of 16 forms a ring, the other does not.
        ("v5e:8x16", 128, 256 + 224, 3, 15),
        ("v6e:16x16", 256, 1024, 4, 16),
        ("v4:2x2x1", 4, 8, 2, 2),
        ("v5p:2x2x4", 16, 16 + 16 + 24, 3, 5),
        ("v5p:4x4x4", 64, 384, 6, 6),
    ],
)
def test_how_the_chips_of_a_slice_are_connected(name, chips, links, fewest, diameter):
    tpu_slice = parse_slice(name)
    assert str(tpu_slice) == name
    assert (tpu_slice.size, tpu_slice.links, tpu_slice.fewest_links, tpu_slice.diameter) == (
        chips,
        links,
        fewest,
        diameter,
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5:2x4", "did you mean 'v5"),
        ("2x4", "known: v4, v5e, v5p, v6e"),
        ("v5e", "--topology=v5e names no slice size; for v5e use 1x1, 2x2, 2x4"),
        ("v5e:3x5", "--topology=v5e:3x5: v5e has no slice of size 3x5; use 1x1, 2x2, 2x4"),
        ("v5e:32x32", "has no slice of size"),
        ("v5e:2x2x2", "has no slice of size"),
        ("v5e:256", "has no slice of size"),
        ("v4:4x4", "or a multiple of 4 along each axis, up to 4096 chips"),
        ("v5p:4x4x6", "has no slice of size"),
        ("v4:32x32x32", "has no slice of size"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(name, says):
    with pytest.raises(UserError) as error:
        parse_slice(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chip", CHIPS)
def test_slices_of_8_to_256_chips_and_the_wanted_one_are_listed(chip):
    for name in CHIPS[chip].shapes:
        wanted = parse_slice(f"{chip}:{name}")
        sizes = [one.size for one in list_slices(wanted)]
        assert sizes == sorted({8, 16, 32, 64, 128, 256, wanted.size})
        assert wanted in list_slices(wanted)


def test_an_all_reduce_takes_the_time_of_its_bytes_and_hops():
    tpu_slice = parse_slice("v5e:16x16")
    # 4 MB, sent 2 x 255 times over 1,024 links of 50 GB/s; and 16 hops.
    assert compute_seconds(collective(), tpu_slice) == pytest.approx(2 * 255 * 4e6 / 1024 / 50e9 + 16 * HOP)
    # Without rings, a corner chip sends its 4 MB over two links.
    assert compute_seconds(collective(), parse_slice("v5e:2x4")) == pytest.approx(14 * 4e6 / 20 / 50e9 + 4 * HOP)
    assert compute_seconds(collective(), parse_slice("v5e:1x1")) == 0


def test_a_reduce_scatter_and_an_all_gather_together_take_as_long_as_an_all_reduce():
    tpu_slice = parse_slice("v5e:16x16")
    gather, scatter = collective("all-gather", "f32[256000]"), collective("reduce-scatter", "f32[1000]")
    apart = compute_seconds(gather, tpu_slice) + compute_seconds(scatter, tpu_slice)
    assert apart == pytest.approx(compute_seconds(collective(text="f32[256000]"), tpu_slice) + 16 * HOP)


def test_a_step_takes_its_longest_concurrent_part_and_all_waiting():
    tpu_slice = parse_slice("v5e:2x4")
    waited, hidden = collective(times=3), collective(text="f32[100000000]", hidden=True)
    alone = compute_bound(197e9, 81.9e6, [], tpu_slice)
    assert (alone.compute, alone.memory) == (pytest.approx(1e-3), pytest.approx(1e-4))
    assert (alone.step, alone.limit, alone.efficiency) == (alone.compute, "compute", 1)

    found = compute_bound(197e9, 81.9e6, [waited], tpu_slice)
    assert found.step == pytest.approx(1e-3 + 3 * compute_seconds(waited, tpu_slice))
    assert found.efficiency == pytest.approx(1e-3 / found.step)

    found = compute_bound(197e9, 81.9e6, [waited, hidden], tpu_slice)
    assert found.step == pytest.approx(compute_seconds(hidden, tpu_slice) + 3 * compute_seconds(waited, tpu_slice))
    assert found.limit == "interconnect"
    assert compute_bound(1e9, 81.9e9, [waited], tpu_slice).limit == "HBM"
