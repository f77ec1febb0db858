"""Collectives, floating point operations and traffic of programs compiled for a CPU and for a TPU."""

import collections
import os
import subprocess
import sys

import jax
import pytest

from ftwt_jax import create_model
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.plan import collectives as c
from ftwt_jax.plan import cost, hlo
from tests.conftest import ROOT, needs_libtpu
from tests.helpers.hlo_programs import DEVICES, FILTERS, PARTS, TRIPS

pytestmark = pytest.mark.long

PLATFORMS = ["cpu", pytest.param("tpu", marks=needs_libtpu)]
on_a_tpu = pytest.mark.parametrize("programs", PLATFORMS[1:], indirect=True)


@pytest.fixture(scope="module", params=PLATFORMS)
def programs(request, tmp_path_factory):
    """The platform, and the programs compiled for it."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "tests.helpers.hlo_programs", request.param, str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    return request.param, {path.stem: hlo.parse(path.read_text()) for path in folder.glob("*.txt")}


@pytest.fixture(scope="module")
def parameters():
    """Number of elements of each parameter of the network in the training step."""
    model = create_model("vgg_bn", 10, gates=GateConfig(), plan=(FILTERS[0], "M", FILTERS[1]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    return [leaf.size for leaf in jax.tree.leaves(shapes["params"])]


def bytes_by_content(program, parameters) -> collections.Counter:
    """Bytes of a step's collectives by what they carry."""
    found = collections.Counter()
    for one in c.find_collectives(program):
        for content, arrays in one.carries(parameters).items():
            found[content] += one.times * sum(array.bytes for array in arrays)
    return found


def test_kinds_sizes_groups_and_loops_are_found(programs):
    platform, texts = programs
    found = {(one.kind, one.arrays[0].bytes, one.devices, one.times) for one in c.find_collectives(texts["exchanges"])}
    share = 16 * 128 * 4
    assert {("all-reduce", share, 4, TRIPS), ("all-gather", DEVICES * share, 8, 1)} <= found
    # For so few numbers, a TPU uses an all-reduce.
    scattered = ("reduce-scatter", share // 2, 2, 1) if platform == "cpu" else ("all-reduce", share, 2, 1)
    assert scattered in found
    assert len(found) == 3


def test_the_line_of_python_behind_a_collective_is_found(programs):
    gather = next(one for one in c.find_collectives(programs[1]["exchanges"]) if one.kind == "all-gather")
    file, _, line = gather.source.rpartition(":")
    assert "all_gather" in (ROOT / "tests" / "helpers" / "hlo_programs.py").read_text().splitlines()[int(line) - 1]
    assert file.endswith("hlo_programs.py")
    assert "all_gather" in gather.op_name


def test_a_training_step_exchanges_only_gradients_statistics_and_metrics(programs, parameters):
    found = bytes_by_content(programs[1]["step"], parameters)
    assert set(found) == {c.GRADIENTS, c.STATISTICS, c.METRICS}
    # Four numbers per filter: sum and sum of squares, and in the backward pass two for the gradients of scale and bias.
    gradients, statistics = 4 * sum(parameters), 4 * 4 * sum(FILTERS)
    assert gradients <= found[c.GRADIENTS] + found[c.STATISTICS] <= gradients + statistics
    assert found[c.METRICS] < 100


@on_a_tpu
def test_on_a_tpu_a_step_in_parts_exchanges_its_gradients_once(parameters, programs):
    whole, parts = (bytes_by_content(programs[1][name], parameters) for name in ("step", "parts"))
    assert whole[c.GRADIENTS] == parts[c.GRADIENTS]
    assert PARTS * whole[c.STATISTICS] == parts[c.STATISTICS]


@on_a_tpu
def test_a_sharded_optimizer_also_gathers_parameters(programs, parameters):
    found = bytes_by_content(programs[1]["divided"], parameters)
    assert set(found) == {c.GRADIENTS, c.STATISTICS, c.METRICS, c.PARAMETERS}
    assert 0 < found[c.PARAMETERS] <= 4 * sum(parameters)


def test_operations_are_counted_without_padding(programs):
    """A strided convolution, a grouped one and a matrix product; each gradient costs as much again."""
    platform, texts = programs
    strided, grouped, dense = 4 * 23**2 * 8 * 16, 4 * 6**2 * 3**2 * 4 * 32, 4 * 1152 * 10
    expected = 2 * 3 * (strided + grouped + dense)
    found = cost.count_flops(texts["convolutions"])
    # A TPU's compiler may choose to compute more than necessary.
    assert found == expected if platform == "cpu" else expected <= found < 1.5 * expected


@on_a_tpu
def test_a_step_in_parts_costs_the_same(programs):
    whole, parts = (cost.count_flops(programs[1][name]) for name in ("step", "parts"))
    assert parts == pytest.approx(whole, rel=0.02)


def test_traffic_counts_reads_and_writes_of_memory(programs):
    platform, texts = programs
    share = 16 * 128 * 4
    # At least three results, of which the gathered one is the largest, and one argument.
    least = share + share + DEVICES * share + share // 2
    memory, whole = (cost.count_traffic(texts["exchanges"], on_chip) for on_chip in (False, True))
    assert least <= memory <= whole
    assert memory < whole if platform == "tpu" else memory == whole


@pytest.mark.parametrize(
    ("text", "size", "padded", "on_chip"),
    [
        ("f32[3,3,64,64]{3,2,1,0:T(8,128)}", 147_456, 294_912, False),
        ("bf16[4,1024,512]{2,1,0:T(8,128)(2,1)S(1)}", 2**22, 2**22, True),
        ("f32[128,28,28,64]{0,3,2,1:T(8,128)}", 25_690_112, 25_690_112, False),
        ("f32[]{:T(128)}", 4, 4, False),
        ("u8[5]", 5, 5, False),
        ("pred[3,5]{1,0}", 15, 15, False),
    ],
)
def test_arrays_are_padded_to_whole_tiles_in_memory(text, size, padded, on_chip):
    (array,) = hlo.parse_arrays(text)
    assert (array.bytes, array.padded_bytes, array.on_chip) == (size, padded, on_chip)


METADATA = 'op_name="jit(step)/sum" source_file="step.py" source_line=7'
ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true, num_partitions=4

%body (p.1: f32[4]) -> f32[8] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %gather = f32[8]{0} all-gather(%p.1), replica_groups=[2,2]<=[4], dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %start = (f32[4]{0}, f32[4]{0}) all-reduce-start(%p), replica_groups={{0,1},{2,3}}, metadata={METADATA}
  %done = f32[4]{0} all-reduce-done(%start)
  %wrapped = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%done), calls=%body
  %permuted = f32[4]{0} collective-permute(%done), source_target_pairs={{0,1},{1,0}}
  ROOT %end = f32[8]{0} async-done(%wrapped)
}
""".replace("METADATA", METADATA)


def test_asynchronous_collectives_are_hidden_and_others_are_not():
    found = {one.kind: one for one in c.find_collectives(hlo.parse(ASYNCHRONOUS))}
    assert {kind: one.hidden for kind, one in found.items()} == {
        "all-reduce": True,
        "all-gather": True,
        "collective-permute": False,
    }
    assert {kind: one.arrays[0].bytes for kind, one in found.items()} == {
        "all-reduce": 16,
        "all-gather": 32,
        "collective-permute": 16,
    }
    assert (found["all-reduce"].devices, found["all-gather"].devices) == (2, 2)
    assert (found["all-reduce"].op_name, found["all-reduce"].source) == ("jit(step)/sum", "step.py:7")


def test_an_exchange_of_feature_maps_is_unexpected():
    maps = hlo.parse_arrays("f32[8,16,16,64]")
    for name in ("jit(step)/jvp(VGG)/unit0/bn/reduce_sum", "jit(step)/transpose(jvp(VGG))/unit0/conv"):
        one = c.Collective("all-reduce", maps, 8, 1, False, name, "")
        assert one.carries([64, 1024]) == {c.OTHER: maps}


SLICED = """HloModule jit_step, is_scheduled=true

%fused (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: f32[100,8], j: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %row = f32[1,8]{1,0} fusion(%x, %j), kind=kLoop, calls=%fused
  ROOT %changed = f32[100,8]{1,0} dynamic-update-slice(%x, %row, %j, %zero.1)
}
"""


def test_only_the_slice_of_an_array_that_is_read_or_changed_counts():
    row, index = 8 * 4, 4
    assert cost.count_traffic(hlo.parse(SLICED)) == (row + index + row) + (row + 2 * index + row)
