"""Checkpoints that storage has damaged: named in the error, set aside, and training continues from the previous one."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from ftwt_jax.__main__ import main
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir.checkpoints import DAMAGED, set_damaged_aside
from ftwt_jax.workdir.integrity import LIST, damage, write_list
from tests.conftest import TINY, TINY_STEPS, fails
from tests.helpers.processes import assert_ends_like, completed

pytestmark = pytest.mark.long

# Step of the checkpoint before the newest.
BEFORE = 20


def halve(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def blank(path: pathlib.Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# The damage: which part of a checkpoint, what happens to it, and words of the message.
DAMAGES: dict[str, tuple[str, Callable[[pathlib.Path], object], str]] = {
    "numbers of the network cut short": ("network/**/d/*", halve, "bytes long"),
    "numbers of the network with a wrong byte": ("network/**/d/*", flip, "have changed"),
    "numbers of the network zeroed": ("network/**/d/*", blank, "have changed"),
    "numbers of the network gone": ("network/**/d/*", pathlib.Path.unlink, "is missing"),
    "manifest gone": ("network/manifest.ocdbt", pathlib.Path.unlink, "is missing"),
    "manifest of the optimizer empty": ("optimizer/manifest.ocdbt", lambda path: path.write_bytes(b""), "bytes long"),
    "description of the arrays cut short": ("network/_METADATA", halve, "bytes long"),
    "description of the optimizer gone": ("optimizer/_METADATA", pathlib.Path.unlink, "is missing"),
    "accuracy cut short": ("metrics/metrics", halve, "bytes long"),
    "accuracy gone": ("metrics/metrics", pathlib.Path.unlink, "is missing"),
    "the description of the data cut short": ("dataset/metadata", halve, "bytes long"),
    "the description of the data with a wrong byte": ("dataset/metadata", flip, "have changed"),
    "list of files cut short": (LIST, halve, "cannot be read"),
    "list of files empty": (LIST, lambda path: path.write_bytes(b""), "cannot be read"),
    "network gone": ("network", shutil.rmtree, "is missing"),
    "optimizer gone": ("optimizer", shutil.rmtree, "is missing"),
    "everything gone but the folder": ("", empty, "is missing"),
}
# Those after which training is run to its end as well.
TRAINED = (
    "numbers of the network cut short",
    "numbers of the network with a wrong byte",
    "accuracy gone",
    "list of files cut short",
    "network gone",
)


def configure(values: dict[str, object]) -> dict[str, object]:
    """Sets options of JAX's compilation cache; returns their previous values."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    return before


@pytest.fixture(scope="module")
def compiled_by_the_program(program, quick_compilation):
    """Uses what the program has compiled, in the way in which it compiles, instead of compiling it again."""
    folder = program.environment["JAX_COMPILATION_CACHE_DIR"]
    before = configure({"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0})
    yield
    configure(before)


@pytest.fixture
def damaged(tiny_run, tmp_path) -> Callable[[str], tuple[pathlib.Path, pathlib.Path, str]]:
    """Damages the newest checkpoint of a copy of the tiny run; returns copy, checkpoint and damaged part."""

    def make(name: str) -> tuple[pathlib.Path, pathlib.Path, str]:
        workdir = tmp_path / "run"
        shutil.copytree(tiny_run[0], workdir)
        assert completed(workdir, GATED)[-2:] == [BEFORE, TINY_STEPS]
        checkpoint = workdir / "checkpoints" / GATED / str(TINY_STEPS)
        pattern, change, _ = DAMAGES[name]
        victim = max(checkpoint.glob(pattern), key=lambda path: path.stat().st_size) if pattern else checkpoint
        change(victim)
        return workdir, checkpoint, str(victim.relative_to(checkpoint)) if victim != checkpoint else "network"

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_evaluate_and_export_refuse_a_damaged_checkpoint_by_name(damaged, capsys, tmp_path, name):
    workdir, checkpoint, part = damaged(name)
    out = tmp_path / "network.safetensors"
    for command in (["evaluate"], ["export", f"--out={out}"]):
        error = fails(capsys, *command, f"--workdir={workdir}")
        for word in (str(checkpoint), part, DAMAGES[name][2], "`train`"):
            assert word in error
    assert not out.exists()
    assert checkpoint.exists(), "only training renames it"


def test_an_incomplete_checkpoint_beside_a_damaged_one_changes_nothing(damaged, capsys):
    workdir, checkpoint, part = damaged("accuracy cut short")
    checkpoint.with_name(f"{TINY_STEPS + 2}.orbax-checkpoint-tmp").mkdir()
    checkpoint.with_name(f"{BEFORE - 2}.orbax-checkpoint-tmp").mkdir()
    error = fails(capsys, "evaluate", f"--workdir={workdir}")
    assert str(checkpoint) in error
    assert part in error


def test_the_remains_of_a_checkpoint_whose_deletion_was_cut_off_are_deleted(tmp_path):
    stage = tmp_path / "checkpoints" / BASELINE
    for step in (8, 12, 16):
        for part in ("network", "dataset"):
            (stage / str(step) / part).mkdir(parents=True)
            (stage / str(step) / part / "file").write_text(part)
        write_list(stage / str(step))
    (stage / "8" / "network" / "file").unlink()
    assert set_damaged_aside(tmp_path, BASELINE) == []
    assert sorted(path.name for path in stage.iterdir()) == ["12", "16"]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_is_the_newest(damaged, name):
    workdir, checkpoint, part = damaged(name)
    kept = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    (note,) = set_damaged_aside(workdir, GATED)
    aside = checkpoint.with_name(f"{DAMAGED}{TINY_STEPS}")
    for word in (str(checkpoint), part, DAMAGES[name][2], aside.name):
        assert word in note
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == kept
    assert completed(workdir, GATED)[-1] == BEFORE
    assert set_damaged_aside(workdir, BASELINE) == []


@pytest.mark.parametrize("name", TRAINED)
def test_training_continues_from_the_checkpoint_before_a_damaged_one(
    damaged, tiny_run, compiled_by_the_program, capsys, name
):
    workdir, checkpoint, part = damaged(name)
    assert main(["train", *TINY, f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr().out
    (note,) = [line for line in printed.splitlines() if "damaged" in line]
    for word in (str(checkpoint), part, DAMAGES[name][2]):
        assert word in note
    assert f"{GATED}: resuming from step {BEFORE} of {TINY_STEPS}" in printed
    assert_ends_like(workdir, tiny_run[0])
    assert checkpoint.with_name(f"{DAMAGED}{TINY_STEPS}").is_dir()
    assert damage(checkpoint) is None


def test_a_checkpoint_damaged_again_is_set_aside_beside_the_first(damaged, tiny_run, compiled_by_the_program, capsys):
    workdir, checkpoint, _ = damaged("network gone")
    for _ in range(2):
        assert main(["train", *TINY, f"--workdir={workdir}"]) == 0
        assert f"{GATED}: resuming from step {BEFORE} of {TINY_STEPS}" in capsys.readouterr().out
        flip(max(checkpoint.glob("network/**/d/*")))
    set_damaged_aside(workdir, GATED)
    names = {path.name for path in checkpoint.parent.glob(f"{DAMAGED}*")}
    assert names == {f"{DAMAGED}{TINY_STEPS}{suffix}" for suffix in ("", "-2", "-3")}


def test_a_stage_without_an_intact_checkpoint_starts_over(tiny_run, compiled_by_the_program, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    steps = completed(workdir, GATED)
    for step in steps:
        flip(max((workdir / "checkpoints" / GATED / str(step)).glob("optimizer/**/d/*")))
    assert main(["train", *TINY, f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is damaged") == len(steps)
    assert "resuming" not in printed
    assert_ends_like(workdir, tiny_run[0])


FILES = st.dictionaries(
    st.sampled_from(["metadata", "d/1f", "d/2e", "network/d/07", "network/manifest", "dataset/metadata", "ä b"]),
    st.binary(max_size=40),
    min_size=1,
)


@contextlib.contextmanager
def written(files: dict[str, bytes]) -> Iterator[pathlib.Path]:
    """A checkpoint that consists of these files and their list."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(folder)
        for name, content in files.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(content)
        write_list(checkpoint)
        yield checkpoint


@given(FILES, st.data())
@settings(deadline=None, max_examples=60)
def test_a_lost_cut_or_changed_file_is_found_and_an_untouched_one_is_not(files, data):
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    cut = st.integers(0, len(content)).map(lambda length: content[:length])
    now = data.draw(st.none() | st.binary(max_size=50) | cut | st.just(content))
    with written(files) as checkpoint:
        if now is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(now)
        found = damage(checkpoint)
    assert (found is None) == (now == content)
    assert found is None or name in found


@given(FILES.filter(lambda files: any(files.values())), st.data())
@settings(deadline=None, max_examples=60)
def test_a_wrong_byte_anywhere_is_found(files, data):
    with written(files) as checkpoint:
        name = data.draw(st.sampled_from([name for name, content in sorted(files.items()) if content]))
        content = bytearray(files[name])
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (checkpoint / name).write_bytes(content)
        assert name in (damage(checkpoint) or "")


def test_a_list_with_any_wrong_byte_or_cut_short_anywhere_is_found():
    with written({"d/1f": b"network"}) as checkpoint:
        content = (checkpoint / LIST).read_bytes()
        wrong = [
            content[:index] + bytes([byte]) + content[index + 1 :]
            for index in range(len(content))
            for byte in range(256)
            if byte != content[index]
        ]
        for changed in (*wrong, *(content[:length] for length in range(len(content)))):
            (checkpoint / LIST).write_bytes(changed)
            assert damage(checkpoint) or json.loads(changed) == json.loads(content), "only white space may differ"
