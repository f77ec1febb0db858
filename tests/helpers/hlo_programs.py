"""Programs for eight devices whose work is known: python -m tests.helpers.hlo_programs cpu|tpu FOLDER."""

import os
import pathlib
import sys

DEVICES, TRIPS = 8, 5
# Of the training step: parts of its batch, images per device, filters of its two units.
PARTS, SHARE, FILTERS = 4, 16, (8, 16)
# Changes of its config.
STEPS = {"step": {}, "parts": {"accumulate": PARTS}, "divided": {"shard_optimizer": True}}


def main(platform: str, folder: pathlib.Path) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    import jax

    from ftwt_jax.plan.compile import find_devices
    from ftwt_jax.plan.roofline import parse_slice

    devices = jax.devices() if platform == "cpu" else find_devices(parse_slice("v5e:2x4"))
    # A CPU's compiler is asked for less: nobody plans for one.
    wanted = STEPS if platform == "tpu" else ("step",)
    for name, lowered in {**exchanges(devices), **convolutions(devices), **steps(devices, wanted)}.items():
        (folder / f"{name}.txt").write_text(lowered.compile().as_text())


def exchanges(devices):
    """A sum over four devices in a loop, a gather over all eight, and a scattered sum over two."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(devices).reshape(2, 4), ("rows", "columns"))

    def run(x):
        looped = lax.fori_loop(0, TRIPS, lambda i, y: jnp.sin(lax.psum(y, "columns")), x)
        gathered = lax.all_gather(jnp.cos(x), ("rows", "columns"), tiled=True)
        scattered = lax.psum_scatter(jnp.tan(x), "rows", tiled=True)
        return looped, gathered, scattered

    whole, split = P(), P(("rows", "columns"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=(split, whole, split), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 16, 128), jnp.float32, sharding=NamedSharding(mesh, split))
    return {"exchanges": jax.jit(mapped).lower(x)}


def convolutions(devices):
    """Two convolutions, one of them in groups, and a matrix product, with their gradients, on one device."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import SingleDeviceSharding

    def loss(kernels, images):
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(images, kernels[0], (2, 2), "SAME", dimension_numbers=layout)
        y = lax.conv_general_dilated(
            jnp.sin(y), kernels[1], (1, 1), "VALID", dimension_numbers=layout, feature_group_count=4
        )
        return jnp.sum(jnp.sin(jnp.sin(y).reshape(len(images), -1) @ kernels[2]))

    shapes = [(3, 3, 8, 16), (3, 3, 4, 32), (6 * 6 * 32, 10)], (4, 16, 16, 8)
    place = SingleDeviceSharding(devices[0])
    example = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int),
    )
    return {"convolutions": jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*example)}


def steps(devices, wanted):
    """The gated training step of a small VGG; the same in parts, and with the optimizer's state divided."""
    from ftwt_jax.config import read
    from ftwt_jax.parallel.sharding import data_mesh
    from ftwt_jax.training.run import make_run
    from ftwt_jax.training.settings import GATED
    from ftwt_jax.training.stage import make_stage

    found = {}
    for name in wanted:
        config = read(["--config=configs/digits.py"])
        config.model.plan = (FILTERS[0], "M", FILTERS[1])
        config.batch_size = SHARE * DEVICES
        config.update(STEPS[name])
        run = make_run(config, mesh=data_mesh(devices))
        stage = make_stage(run, GATED)
        found[name] = stage.step.lower(stage.state, stage.batch, stage.control)
    return found


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
