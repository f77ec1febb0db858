"""The notebook: clean, run whole as a student would, and what the docs promise of the run that it trains."""

import asyncio
import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from configs.digits import get_config
from ftwt_jax.commands.parse import parse
from ftwt_jax.workdir import as_dict, differing_fields
from tests.conftest import ROOT, SLOW_FIXTURE

pytestmark = pytest.mark.long

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
UNKNOWN = 'REPOSITORY = ""  # where the project is published'
PUBLISHED = UNKNOWN.replace('""', '"https://example.org/someone/ftwt_jax"')


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def source(name: str) -> str:
    return next(cell.source for cell in read().cells if cell.id == name)


def text() -> str:
    return "\n".join(cell.source for cell in read().cells)


@dataclasses.dataclass
class Executed:
    """The notebook after it has run, and the folder it ran in."""

    notebook: nbformat.NotebookNode
    folder: pathlib.Path

    def read(self, name: str) -> dict:
        return json.loads((self.folder / "workdirs" / "colab" / name).read_text())

    @property
    def evaluation(self) -> dict:
        return self.read("gated/evaluation.json")

    def outputs(self, name: str) -> list:
        return next(cell.outputs for cell in self.notebook.cells if cell.id == name)

    def printed(self, name: str) -> str:
        return "".join(output.text for output in self.outputs(name) if output.output_type == "stream")

    def shown(self, name: str, kind: str) -> list[str]:
        return [output.data[kind] for output in self.outputs(name) if kind in output.get("data", {})]


@pytest.fixture(scope="module", params=SLOW_FIXTURE)
def executed(program, tmp_path_factory):
    """Runs every cell, with this interpreter, in a folder with nothing else in it; a cell that fails ends it."""
    kernels, folder = tmp_path_factory.mktemp("kernels"), tmp_path_factory.mktemp("colab")
    write_kernel_spec(kernels / "this_interpreter")
    notebook = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(kernels))
        manager = AsyncKernelManager(
            kernel_name="this_interpreter", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(kernels)])
        )
        client = NotebookClient(notebook, manager, timeout=1200, resources={"metadata": {"path": str(folder)}})
        try:
            # A training of real length is faster with all of the compiler's optimisations.
            settings = {"IPYTHONDIR": str(kernels), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
            client.execute(env=program.environment | settings)
        finally:
            asyncio.run(manager.shutdown_kernel(now=True))
    return Executed(notebook, folder)


def test_the_file_is_valid_and_holds_no_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_where_the_project_is_published_is_one_line_at_the_top():
    first = next(cell for cell in read().cells if cell.cell_type == "code")
    assert (first.id, first.source) == ("repository-code", UNKNOWN)
    addresses = re.findall(r"https?://[^\s)\"']+", text().replace("https://…", ""))
    assert addresses == ["https://arxiv.org/abs/2110.08232"]


def test_every_command_and_every_flag_is_understood():
    whole = text()
    commands = [shlex.split(found) for found in re.findall(r'command\("([^"]*)"\)', whole)]
    assert {"train", "estimate", "evaluate", "benchmark"} <= {name for name, *_ in commands}
    # Flags that stand alone in a sentence are those of a training run.
    alone = re.findall(r"`(--\S+?=[^`\s]+)`", whole)
    default = "--config=configs/digits.py"
    commands += [["train", *([] if flag.startswith("--config=") else [default]), flag] for flag in alone]
    for name, *flags in commands:
        parse(name, flags)
    known = sum(len(re.findall(r"--config", " ".join(flags))) for _, *flags in commands)
    added = sum(1 for flag in alone if not flag.startswith("--config="))
    assert known - added == len(re.findall(r"--config", whole))


def test_no_absolute_path_is_in_it():
    assert not re.findall(r"(?<![\w.])[~]?/\w\S*", re.sub(r"https?://\S+", "", text()))


@pytest.fixture
def stand_ins(tmp_path):
    """Programs that the set-up calls, in place of the real ones: each prints how it was called."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "pip.py").write_text("import sys\nprint('pip', *sys.argv[1:])\n")
    git = folder / "git"
    git.write_text(f"#!{sys.executable}\nimport os, sys\nprint('git', *sys.argv[1:])\nos.mkdir(sys.argv[-1])\n")
    git.chmod(0o755)
    return folder


def run_set_up(cwd, programs, address: str = UNKNOWN) -> subprocess.CompletedProcess:
    """Runs the set-up where no package is installed; it prints the current folder at the end."""
    environment = {"PATH": str(programs), "PYTHONPATH": str(programs)}
    command = [sys.executable, "-S", "-c", f"{address}\n{source('setup-code')}\nprint(os.getcwd())"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def set_up(cwd, programs) -> list[str]:
    """What the set-up prints, once it was said where the project is published."""
    done = run_set_up(cwd, programs, PUBLISHED)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("gpu", [False, True])
def test_without_a_checkout_the_set_up_fetches_one_and_installs_it(tmp_path, stand_ins, gpu):
    if gpu:
        smi = stand_ins / "nvidia-smi"
        smi.write_text(f"#!{sys.executable}\n")
        smi.chmod(0o755)
    empty = tmp_path / "empty"
    empty.mkdir()
    clone, install, folder = set_up(empty, stand_ins)
    assert re.fullmatch(r"git clone .*https://example\.org/someone/ftwt_jax ftwt_jax", clone)
    assert install == f"pip install --quiet ./ftwt_jax{'[cuda]' if gpu else ''}"
    assert folder == str(empty)
    # The second time, the clone is there, and so it is after an installation that failed.
    assert set_up(empty, stand_ins) == [install, folder]


def test_without_an_address_the_set_up_asks_for_it_before_it_fetches_anything(tmp_path, stand_ins):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_set_up(empty, stand_ins)
    assert done.returncode
    assert "write where the project is published into the cell above" in done.stderr
    assert done.stdout == ""


def test_in_a_checkout_the_set_up_needs_no_address_and_installs_nothing(stand_ins):
    done = run_set_up(NOTEBOOK.parent, stand_ins)
    assert done.stdout.splitlines() == [str(ROOT)]


def test_a_command_that_fails_stops_the_notebook(program, tmp_path):
    script = f"{source('setup-code')}\ncommand('evaluate --workdir=missing')\nprint('went on')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=program.environment, capture_output=True, text=True
    )
    assert done.returncode
    assert "ftwt: error: there is no workdir" in done.stdout
    assert "RuntimeError: status 2" in done.stderr
    assert "went on" not in done.stdout


def test_it_trains_the_default_run_and_nothing_else(executed):
    """Gates on another run's baseline are those of the one command, bit for bit, so the README's figures are theirs."""
    default = as_dict(get_config())
    assert differing_fields(default, executed.read("baseline/config.json")) == [
        f"config.gates.epochs: {default['gates']['epochs']} -> 0"
    ]
    (difference,) = differing_fields(default, executed.read("gated/config.json"))
    assert difference.startswith("config.init_from: '' -> ")


def test_dense_accuracy(executed):
    assert executed.evaluation["dense_accuracy"] >= 0.97


def test_gated_accuracy_is_within_half_a_point(executed):
    assert executed.evaluation["accuracy"] >= executed.evaluation["dense_accuracy"] - 0.005


def test_half_of_the_macs_are_saved(executed):
    assert executed.evaluation["macs_reduction"] >= 0.48


def test_gates_are_dynamic(executed):
    result = executed.evaluation
    assert result["gate_accuracy"] >= result["static_gate_accuracy"] + 0.05
    assert result["dynamic_filters"] > 0.5


def test_prediction_is_near_what_was_reached(executed):
    result, printed = executed.evaluation, executed.printed("gates-code")
    assert abs(result["predicted_macs_reduction"] - result["macs_reduction"]) < 0.03
    assert printed.index("predicted MACs reduction") < printed.index("gated ")


def test_plots_and_images_are_shown(executed):
    for name in ("estimate-code", "budgets-code", "images-code"):
        assert executed.shown(name, "image/png"), name


def test_the_table_says_what_was_evaluated(executed):
    (table,) = executed.shown("evaluation-code", "text/markdown")
    assert f"| accuracy of the gated network | {executed.evaluation['accuracy']:.4f} |" in table
    assert f"| MACs reduction, exact | {executed.evaluation['macs_reduction']:.4f} |" in table


def test_one_network_serves_every_budget_asked_for(executed):
    rows = executed.read("gated/budgets.json")["rows"]
    assert [row["budget"] for row in rows] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    for row in rows:
        assert abs(row["macs_reduction"] - row["budget"]) < 0.03


def test_what_images_cost_agrees_with_the_evaluation(executed):
    printed = executed.printed("images-code")
    dense = float(re.search(r"dense: (\d+) k", printed)[1])
    costs = [float(cost) for cost in re.findall(r"^\d: (\d+) k", printed, flags=re.MULTILINE)]
    assert len(costs) == 10
    assert min(costs) < (1 - executed.evaluation["macs_reduction"]) * dense < max(costs)


def test_the_networks_are_timed(executed):
    assert executed.read("gated/benchmark.json")["compact_ms"] > 0


def test_the_ten_lines_predict_a_reduction(executed):
    assert 0 < float(re.search(r"to expect: (\S+)", executed.printed("library-code"))[1]) < 1
