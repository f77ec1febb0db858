"""The shape of the code: who may import whom, where a target is computed, and nothing that leans on one machine."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "ftwt_jax"
# What a package, or a file at the top, may import of ours besides itself; what stands further down may be imported by
# more. A new package gets a line here.
METHOD = {"ops", "gating", "models", "weights", "subnets", "inference"}
BASE = {"errors", "files", "printing", "version"}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "ctrl_c": set(),
    "files": {"errors"},
    "printing": set(),
    # The method: it never imports anything of the trainer.
    "ops": BASE,
    "gating": BASE | {"ops"},
    "models": BASE | {"ops", "gating"},
    "weights": BASE | {"ops", "gating", "models"},
    "subnets": BASE | {"ops", "gating"},
    "inference": BASE | {"ops", "gating", "subnets"},
    "__init__": BASE | METHOD | {"ctrl_c"},
    "engines": BASE | {"ops", "gating", "inference"},
    # The trainer.
    "config": BASE | METHOD,
    "parallel": BASE | {"ops"},
    "data": BASE | {"parallel"},
    "workdir": BASE | {"config", "parallel"},
    "training": BASE | METHOD | {"config", "parallel", "data", "workdir"},
    "budget": BASE | METHOD | {"engines", "config", "parallel", "data", "workdir", "training"},
    **dict.fromkeys(
        ("plan", "report", "benchmark"),
        BASE | METHOD | {"engines", "config", "parallel", "data", "workdir", "training", "budget"},
    ),
    "commands": BASE
    | METHOD
    | {"engines", "config", "parallel", "data", "workdir", "training", "budget", "plan", "report", "benchmark"},
    "__main__": BASE | {"ctrl_c", "ops", "parallel", "commands"},
}
# Libraries that the trainer needs and the method does not.
TRAINER = {
    "absl": "flags",
    "grain": "input",
    "ml_collections": "configs",
    "orbax.checkpoint": "checkpoints",
    "rich.progress": "the progress bar",
    "cv2": "images",
    "safetensors": "files of weights",
    "torch": "checkpoints",
    "simplejpeg": "images",
    "sklearn": "the bundled data",
    "tensorflow_datasets": "data sets",
    "tensorboardX": "event files",
    "matplotlib": "plots",
    "jinja2": "the report",
    **{f"ftwt_jax.{name}": "the trainer" for name in ALLOWED if name not in {*BASE, *METHOD, "__init__", "ctrl_c"}},
}
MOST_FILES_AT_THE_TOP = 8


@functools.cache
def imports() -> dict[str, set[str]]:
    """For each of our modules, those of ours that it imports, wherever in the file the import stands."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports by a relative name"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {one if one in modules else str(node.module) for one in whole}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] = {one for one in found[name] if one.partition(".")[0] == "ftwt_jax"}
    return found


def part(module: str) -> str:
    """The package, or the file at the top, that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def modules_after(code: str) -> set[str]:
    """Names of the modules that are loaded once `code` has run in a process of its own."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sorted({path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}))
def test_each_part_imports_only_what_it_may(name):
    assert name in ALLOWED, f"ftwt_jax/{name} is new: say in ALLOWED what it may import"
    for module, imported in imports().items():
        if part(module) == name:
            assert {part(one) for one in imported} <= ALLOWED[name] | {name}, module


def test_what_may_be_imported_has_no_loop():
    seen: set[str] = set()
    while len(seen) < len(ALLOWED):
        free = {name for name in ALLOWED if name not in seen and ALLOWED[name] <= seen}
        assert free, f"{sorted(set(ALLOWED) - seen)} may import each other in a loop"
        seen |= free


def test_no_two_files_import_each_other_in_a_loop():
    left = {name: imported - {name, "ftwt_jax"} for name, imported in imports().items() if name != "ftwt_jax"}
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"in a loop, or above one: {sorted(left)}"
        for name in free:
            del left[name]


def test_every_command_is_a_module_of_its_name():
    from ftwt_jax.commands import COMMANDS
    from ftwt_jax.commands.parse import load_command

    files = {path.stem for path in (PACKAGE / "commands").iterdir()} - {"__init__", "__pycache__", "command", "parse"}
    assert files == set(COMMANDS)
    for name in COMMANDS:
        assert load_command(name).run


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_the_method_imports_nothing_of_the_trainer():
    # Flax itself loads Orbax, and Orbax absl: only what we add to Flax and Optax counts.
    allowed = modules_after("import flax.linen, optax, jaxtyping")
    loaded = modules_after("import ftwt_jax")
    assert "ftwt_jax.gating.ranking" in loaded
    for name, purpose in TRAINER.items():
        assert name not in loaded - allowed, f"import ftwt_jax loads {name} ({purpose})"


def test_event_files_need_no_pytorch(tmp_path):
    code = f"""
import pathlib, sys
from ftwt_jax.workdir.metrics import EventFile
events = EventFile(pathlib.Path({str(tmp_path)!r}))
events.write(1, {{"loss": 0.5}})
events.close()
assert "torch" not in sys.modules, "loading it takes seconds"
import torch"""
    assert {"tensorboardX", "torch"} <= modules_after(code)


def test_a_target_is_computed_in_one_place():
    users = [path for path in PACKAGE.rglob("*.py") if "topk_mass_mask(" in path.read_text()]
    assert {path.name for path in users} == {"ranking.py", "units.py"}
    sorts = [path for path in PACKAGE.rglob("*.py") if "jnp.sort" in path.read_text()]
    assert [path.name for path in sorts] == ["ranking.py"]


def test_nothing_in_the_repository_leans_on_one_machine():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    binary = {".npz", ".xz"}
    files = [path for name in done.stdout.split() if (path := pathlib.Path(ROOT, name)).suffix not in binary]
    home = str(ROOT.parent)
    for file in files:
        text = file.read_text()
        assert home in ("/", "/tmp") or f"{home}/" not in text, file
        assert file.stat().st_size < 100_000, file
