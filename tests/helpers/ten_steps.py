"""Ten steps, and the programs of steps, on several devices: python -m tests.helpers.ten_steps numbers|programs DIR."""

import contextlib
import io
import itertools
import json
import pathlib
import sys
from unittest import mock

import jax
import numpy as np

from tests.conftest import random_like

DEVICES, STEPS, PARTS, R = 8, 10, 4, 0.86
# Rounding changes the sign of a ReLU's input near zero; a small learning rate keeps the effect small.
SLOW = ("--config.baseline.lr=0.01", "--config.gates.lr=0.01", "--config.gates.head_lr=0.01")
TEN_STEPS = ("--config=configs/digits.py", "--config.model.plan=(8,'M',16)", "--config.batch_size=64", *SLOW)
VARIANTS = {"at once": {}, "parts": {"accumulate": PARTS}, "divided": {"shard_optimizer": True}}
PLACES = {"whole": False, "split": True}
# A multiple of the devices, and not of the devices times the parts.
REFUSED = (*TEN_STEPS, f"--config.accumulate={PARTS}", "--config.batch_size=72")

IMAGES = 64
# Filters such that no map and no mask has as many elements as a parameter.
NETWORKS = {
    "vgg": ("--config=configs/digits.py", "--config.model.plan=(24,24,'M',40,40,'M',40)"),
    "resnet": ("--config=configs/digits.py:resnet8", "--config.data.image_size=16", "--config.model.width=0.8"),
    "mobilenet": (
        *("--config=configs/digits.py:mobilenet_v1", "--config.data.image_size=16", "--config.model.width=0.3"),
    ),
}
PROGRAMS = {
    **{f"{network} {stage}": (network, stage, {}) for network in NETWORKS for stage in ("baseline", "gated")},
    "vgg in parts": ("vgg", "gated", {"accumulate": 2}),
    "vgg divided": ("vgg", "gated", {"shard_optimizer": True}),
}


def make(flags=TEN_STEPS, **changes):
    """A run on all devices that there are."""
    from ftwt_jax.config import read
    from ftwt_jax.training.run import make_run

    config = read(flags)
    config.update(changes)
    return make_run(config)


@contextlib.contextmanager
def short_networks():
    """MobileNet with its first two pairs; the rest only repeats them."""
    from ftwt_jax.models import mobilenet

    with mock.patch.object(mobilenet, "V1_PAIRS", mobilenet.V1_PAIRS[:2]):
        yield


def start(run, name):
    """A stage, its state before the first step, its batches, and r as control; gates differ from image to image."""
    from ftwt_jax.data.pipeline import train_batches
    from ftwt_jax.gating.gates import GateControl
    from ftwt_jax.parallel.sharding import put_batch, put_whole
    from ftwt_jax.training.stage import make_stage
    from ftwt_jax.training.step import create_state

    stage = make_stage(run, name)
    state = put_whole(create_state(random_like(run.abstract_variables(name)), stage.optimizer), stage.shardings)
    batches = train_batches(run.dataset, run.config.batch_size, stage.seed, 0, STEPS)
    control = put_whole(GateControl(r=np.float32(R), offset=np.float32(0)), stage.control.r.sharding)
    return stage, state, (put_batch(batch, run.mesh) for batch in batches), control


def ten_steps(run, name):
    """Result of ten steps: arrays by name, of metrics one value per step; the step; the state."""
    stage, state, batches, control = start(run, name)
    seen = []
    for batch in batches:
        state, metrics = stage.step(state, batch, control)
        seen.append(metrics)
    rows = jax.device_get(seen)
    numbers = {metric: np.array([row[metric] for row in rows]) for metric in rows[0]}
    return numbers | named(state), stage.step, state


def named(tree):
    """The arrays of a tree by their paths."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(ours, theirs, tolerance):
    """Equal up to rounding relative to the largest number of each array."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        # Batch norm removes the mean, so a bias before it, and its momentum, change only by rounding. It divides by the
        # deviation, so the scale before it of the single filter that a very small router begins with hardly changes.
        least = 0.1 if "['conv']['bias']" in name or "['router']['conv0']['bn']['scale']" in name else 0
        # A momentum is a sum of gradients that cancel each other.
        factor = 10 if ".trace[" in name else 1
        bound = factor * tolerance * max(least, np.abs(wanted).max())
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=bound, err_msg=name)


def results(variants):
    """Name, numbers, step and last state of the baseline, then of the gates in these variants."""
    from ftwt_jax.training.settings import BASELINE, GATED

    yield BASELINE, *ten_steps(make(), BASELINE)
    for variant in variants:
        yield variant, *ten_steps(make(**VARIANTS[variant]), GATED)


def from_devices(shard):
    """The same of gates on images that are on the devices, whole on each or split over them, four steps in a call."""
    from ftwt_jax.data import resident
    from ftwt_jax.training.feed import DeviceFeed
    from ftwt_jax.training.settings import GATED

    run = make()
    stage, state, _, _ = start(run, GATED)
    feed = DeviceFeed(run, stage, resident.put(run.dataset.train, run.mesh, shard), most=4, in_loop=True)
    rows = []
    for step in range(0, STEPS, 4):
        count = min(4, STEPS - step)
        state, [(metrics, _)] = feed.run(state, feed.inputs(step, count), R, [0.0] * count)
        rows.append({name: values[:count] for name, values in jax.device_get(metrics).items()})
    numbers = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return numbers | named(state), feed._program, state


def write_numbers(folder):
    """`NAME.npz` of the baseline, each variant and each place of the images, and `facts.json`."""
    from ftwt_jax.__main__ import main

    facts = {"devices": jax.device_count(), "compiled": {}}
    places = ((name, *from_devices(shard)) for name, shard in PLACES.items())
    for name, numbers, step, state in itertools.chain(results(VARIANTS), places):
        np.savez(folder / f"{name}.npz", **numbers)
        facts["compiled"][name] = step._cache_size()
        # Of each array of the optimizer: its shape, and the part on each device.
        facts[name] = [
            {"shape": leaf.shape, "held": [(str(shard.index), shard.data.shape) for shard in leaf.addressable_shards]}
            for leaf in jax.tree.leaves(state.opt_state)
            if leaf.ndim
        ]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        facts["status"] = main(["train", *REFUSED, f"--workdir={folder / 'refused'}"])
    facts["error"] = error.getvalue()
    (folder / "facts.json").write_text(json.dumps(facts))


def write_programs(folder):
    """`NAME.txt`: the text of training steps, and of two programs that exchange what no step may."""
    from ftwt_jax.training.stage import make_stage

    def step(network, stage, changes):
        made = make_stage(make(NETWORKS[network], batch_size=IMAGES, **changes), stage)
        return made.step.lower(made.state, made.batch, made.control)

    with short_networks():
        lowered = {name: step(*program) for name, program in PROGRAMS.items()}
    # A step unaware of the devices hands its maps to a kernel for one device, which asks for those of all images.
    with mock.patch("ftwt_jax.parallel.sharding.traced_on", lambda mesh, fn: fn):
        lowered["maps"] = step("vgg", "baseline", {})
    for name, program in {**lowered, "masks": everyones_masks()}.items():
        (folder / f"{name}.txt").write_text(program.compile().as_text())


def everyones_masks():
    """Masks [N, C] of the VGG's first unit that every device receives."""
    import jax.numpy as jnp

    from ftwt_jax.parallel.sharding import data_mesh, replicated, split

    mesh = data_mesh()
    maps = jax.ShapeDtypeStruct((IMAGES, 8, 8, 24), jnp.float32, sharding=split(mesh))
    return jax.jit(lambda maps: jnp.max(maps, axis=(1, 2)) > 0, out_shardings=replicated(mesh)).lower(maps)


if __name__ == "__main__":
    {"numbers": write_numbers, "programs": write_programs}[sys.argv[1]](pathlib.Path(sys.argv[2]))
