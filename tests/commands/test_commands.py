"""The command line used wrongly: one line that names the remedy, exit status 2, nothing written."""

import dataclasses
import io
import json
import shutil
import types

import jax.numpy as jnp
import pytest
from rich.console import Console

from ftwt_jax.__main__ import main
from ftwt_jax.commands.evaluate import COMMAND as EVALUATE
from ftwt_jax.commands.evaluate.held_out import unit_table
from ftwt_jax.commands.parse import parse
from ftwt_jax.printing import shorten_data
from ftwt_jax.training.evaluator import Evaluation, LayerWork
from ftwt_jax.training.optim import cooldown_step
from ftwt_jax.version import __version__
from ftwt_jax.workdir import load
from tests.conftest import ROOT, TINY_STEPS, config_of, fails, read_metrics

pytestmark = pytest.mark.long

DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "--workdir=w"], "--config is missing"),
        (["train", "--confg=x"], "unknown flag --confg; did you mean --config?"),
        (["train", "--config=configs/digit.py"], "did you mean 'configs/digits.py'"),
        (["train", "--config=digts"], "did you mean 'digits'"),
        (["train", DIGITS], "--workdir is missing"),
        (["train", DIGITS, "more"], "takes flags only; got 'more'"),
        (["train", DIGITS, "--config.gats.r=1"], "did you mean 'gates'"),
        (["train", DIGITS, "--config.gates.moed=joint"], "did you mean 'mode'"),
        (["train", DIGITS, "--config.gates.r=abc"], "--config.gates.r takes a number in (0, 1]; got 'abc'"),
        (
            ["train", DIGITS, "--config.gates.epochs=1.5"],
            "--config.gates.epochs takes a whole number, at least 0; got '1.5'",
        ),
        (["train", DIGITS, "--config.gates.static=si"], "--config.gates.static takes True or False; got 'si'"),
        (["train", DIGITS, "--config.gates=1"], "--config.gates is a section: set its fields, such as --config.gates."),
        (
            ["train", DIGITS, "--config.gates.r", "--workdir=w"],
            "--config.gates.r lacks its value: --config.gates.r=VALUE",
        ),
        (
            ["train", DIGITS, "--workdir", "--distributed"],
            "--workdir lacks its value: --workdir=VALUE, and not --distr",
        ),
        (
            ["train", DIGITS, "--noconfig.gates.statc", "--workdir=w"],
            "unknown config field 'statc': did you mean 'static'",
        ),
        (["train", DIGITS, "--noconfig.gates.r", "--workdir=w"], "set the field, --config.gates.r=VALUE"),
        (["train", DIGITS, "--batch_size=8"], "unknown flag --batch_size; did you mean --config.batch_size?"),
        (["train", DIGITS, "--gates.r=0.8"], "unknown flag --gates.r; did you mean --config.gates.r?"),
        (["benchmark", "--arch=resnet20", "--budget=x"], "--budget takes a number; got 'x'"),
        (["benchmark", "--arch=resnet20", "--batch=1.5"], "--batch takes a whole number; got '1.5'"),
        (
            ["export", "--workdir=w", "--format=pickle"],
            "--format takes one of safetensors, stablehlo, onnx; got 'pickle'",
        ),
        (["evaluate"], "--workdir is missing"),
        (["evaluate", "--workdir="], "--workdir is missing"),
        (["evaluate", "--r=0.5", "--workdir=w"], "unknown flag --r; known: --best, --budgets"),
        (["evaluate", "--workdir=missing"], "there is no workdir"),
        (
            ["train", DIGITS, "--workdir=s3://bucket/run"],
            "s3://bucket/run is neither a folder nor in a bucket of Google",
        ),
        (["estimate", "--workdir=missing", "--r=0.5,x"], "--r takes numbers in (0, 1], such as 0.8,0.9,1; got '0.5,x'"),
        (["estimate", "--workdir=missing", "--r=0"], "--r takes numbers in (0, 1], such as 0.8,0.9,1; got '0'"),
        (["estimate", "--workdir=missing", "--r=0.5", "--budget=0.5"], "--r or --budget, not both"),
    ],
)
def test_wrong_flags(capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (":resnet57", "did you mean 'resnet56'"),
        (" --config.gates.r=0", "config.gates.r takes a number in (0, 1]; got 0.0"),
        (" --config.gates.r=1.01", "config.gates.r takes a number in (0, 1]; got 1.01"),
        (" --config.gates.mode=decopled", "did you mean 'decoupled'"),
        (" --config.gates.pool=avg", "known: max, mean"),
        (" --config.gates.budget=2.", "between 0 and 1; got 2.0"),
        (" --config.gates.cooldown=0.", "config.gates.cooldown takes a number in (0, 1]; got 0.0"),
        (" --config.gates.schedule=cosin", "did you mean 'cosine'"),
        (" --config.gates.loss_reduction=avg", "known: mean, sum"),
        (" --config.baseline.lr=0.", "config.baseline.lr takes a number above 0; got 0.0"),
        (" --config.baseline.epochs=0", "config.init_from"),
        (" --config.baseline.epochs=-3", "config.baseline.epochs takes a whole number, at least 0; got -3"),
        (" --config.gates.epochs=-3", "config.gates.epochs takes a whole number, at least 0; got -3"),
        (" --config.gates.lr=nan", "config.gates.lr takes a number above 0; got nan"),
        (" --config.gates.momentum=1.", "config.gates.momentum takes a number in [0, 1); got 1.0"),
        (" --config.gates.loss_weight=-1.", "config.gates.loss_weight takes a number, at least 0; got -1.0"),
        (" --config.init_from=missing", "no trained baseline network in"),
        (":vgg16_bn --config.data.image_size=31", "too small"),
        (" --config.model.stem=imagenet", "unknown vgg_bn option 'stem'"),
        (" --config.model.name=vgg16_bn", "choose the network by --config=FILE:vgg16_bn"),
        (" --config.model.plan=(8,'P')", "'M' for a pool; got 'P'"),
        (" --config.model.dtype=float16", "known: float32, bfloat16"),
        (" --config.data.name=digit", "did you mean 'digits'"),
        (" --config.seed=-1", "config.seed takes a whole number between 0 and 2147483647; got -1"),
        (" --config.gates.r 1.5", "config.gates.r takes a number in (0, 1]; got 1.5"),
        (" --config.gates.min_filters=-1", "config.gates.min_filters takes a whole number, at least 0; got -1"),
        (" --config.data.image_size=4", "config.data.image_size must be at least 8"),
        (" --config.batch_size=0", "config.batch_size takes a whole number, at least 1; got 0"),
        (
            " --config.baseline.lr_boundaries=('a',)",
            "lr_boundaries takes epochs above 0, such as (81,122,151); got ('a',)",
        ),
        (" --config.batch_size=5000", "config.batch_size=5000 is more than the 1347 images to train on"),
        # Of 4,608 + 18,432 + 160 MACs these are left: 64 * 9 + 8 * 1 and 16 * 9 + 16 * 8 with their heads, and 10.
        (
            " --config.model.plan=(8,'M',16) --config.gates.budget=.97",
            "can be cut by 0.963 at most, with 1 filter",
        ),
        (" --config.gates.budgets=(.1,.999)", "config.gates.budgets asks for a MACs reduction of 0.999, and this net"),
        (" --config.checkpoint_every=0", "config.checkpoint_every"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_written(capsys, tmp_path, override, says):
    config, *more = f"{DIGITS}{override}".split()
    assert says in fails(capsys, "train", config, f"--workdir={tmp_path / 'run'}", *more)
    assert not (tmp_path / "run").exists()


def test_a_device_without_memory_is_named_with_the_remedies(capsys, monkeypatch, tmp_path):
    def run(arguments, console):
        jnp.zeros(2**50).block_until_ready()

    monkeypatch.setattr("ftwt_jax.commands.evaluate.COMMAND", dataclasses.replace(EVALUATE, run=run))
    error = fails(capsys, "evaluate", f"--workdir={tmp_path}")
    assert "the memory of the device is full" in error
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in error


def test_a_workdir_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = fails(capsys, "train", DIGITS, f"--workdir={tmp_path / 'file' / 'run'}")
    assert "cannot write to the workdir" in error
    assert "choose another --workdir" in error


def test_a_workdir_with_a_broken_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    for command in (["evaluate"], ["estimate"], ["train", DIGITS]):
        assert f"cannot read the config in {tmp_path / 'config.json'}" in fails(
            capsys, *command, f"--workdir={tmp_path}"
        )


def test_a_config_without_its_fields_is_refused_by_their_names(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, "gates": {"r": 0.5}}')
    error = fails(capsys, "evaluate", f"--workdir={tmp_path}")
    assert "lacks baseline, batch_size" in error
    assert "gates.mode" in error
    assert "gates.r," not in error


def test_a_config_file_without_a_field(capsys, tmp_path):
    text = (ROOT / "configs" / "digits.py").read_text()
    (tmp_path / "mine.py").write_text(
        text.replace(
            "    return config", "    with config.unlocked():\n        del config.init_from\n    return config"
        )
    )
    error = fails(capsys, "train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert "the config lacks init_from" in error


def test_a_config_file_with_a_fault_of_its_own(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1 / 0\n")
    assert "division by zero" in fails(capsys, "train", f"--config={tmp_path / 'mine.py'}", "--workdir=w")


def test_a_workdir_without_a_baseline(program, tiny_run, tmp_path):
    (tmp_path / "config.json").write_text((tiny_run[0] / "config.json").read_text())
    for command in ("estimate", "evaluate"):
        error = program.run(command, f"--workdir={tmp_path}", status=2)
        assert "run `train` with this workdir first" in error


def test_help_names_the_commands_and_their_flags(capsys):
    assert main(["--help"]) == 0
    assert "estimate" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--workdir" in capsys.readouterr().out
    assert main(["train", "--help", "--config=digits", "--config.gates.cooldown=0.6"]) == 0
    printed = capsys.readouterr().out
    assert (
        "--config.gates.cooldown=0.6\n      share of the stage after which the heads are frozen (a number in" in printed
    )
    assert "--config.gates.r=0.85\n" in printed
    assert main([]) == 2


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ftwt_jax {__version__}\n"


def test_estimate_prints_a_row_for_each_r(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    printed = program.run("estimate", f"--workdir={workdir}", "--r=0.5,0.8,1")
    assert all(r in printed for r in ("0.5000", "0.8000", "1.0000"))
    solved = program.run("estimate", f"--workdir={workdir}", "--budget=0.6").splitlines()
    (row,) = [line for line in solved if line.count("│") == 4]
    assert abs(float(row.split("│")[2]) - 0.6) < 0.01
    error = program.run("estimate", f"--workdir={workdir}", "--budget=0.9999", status=2)
    assert "can be cut by" in error


def test_evaluate_again_writes_the_same_figures(program, tiny_run):
    path = tiny_run[0] / "evaluation.json"
    before = path.read_text()
    path.unlink()
    program.run("evaluate", f"--workdir={tiny_run[0]}")
    assert path.read_text() == before


@pytest.mark.parametrize(("flags", "file"), [((), "evaluation.json"), (("--budgets=0.5",), "budgets.json")])
def test_figures_that_cannot_be_written_are_printed_first(capsys, tiny_run, tmp_path, flags, file):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    (workdir / file).unlink(missing_ok=True)
    (workdir / file).mkdir()
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 2
    printed, error = capsys.readouterr()
    assert "MACs" in printed
    assert "reduction" in printed
    assert error == f"ftwt: error: cannot write {workdir / file}: is a directory\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("config.gates.r = '0.85'", "the field r takes a number; got '0.85' (text)"),
        ("config.gates.rr = 0.85", "there is no field 'rr' in the config"),
        ("config.gates.cooldwn = 0.5", "there is no field 'cooldwn' in the config; did you mean 'cooldown'?"),
        ("config.gates.update(cooldwn=0.5)", "there is no field 'cooldwn' in the config; did you mean 'cooldown'?"),
        ("config.gates.lr = 1 / 0", "ZeroDivisionError: division by zero"),
        ("config.gates.lr == )", "SyntaxError: unmatched ')'"),
    ],
)
def test_of_an_error_in_a_config_file_the_line_is_named(capsys, tmp_path, line, says):
    file = tmp_path / "mine.py"
    text = (ROOT / "configs" / "digits.py").read_text()
    text = text.replace("    return config", f"    {line}\n    return config")
    file.write_text(text)
    number = next(n for n, one in enumerate(text.splitlines(), start=1) if line in one)
    error = fails(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert f"{file}, line {number}: {says}" in error


def test_a_field_that_does_not_exist_is_found_however_a_config_file_sets_it(capsys, tmp_path):
    file = tmp_path / "mine.py"
    text = (ROOT / "configs" / "digits.py").read_text()
    line = "    config.unlock()\n    config.gates.cooldwn = 0.5\n    config.gates.lock()\n    return config"
    file.write_text(text.replace("    return config", line))
    error = fails(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert f"{file}: there is no field 'gates.cooldwn' in the config; did you mean 'gates.cooldown'?" in error
    # A loader or a network of your own may take more; both refuse what they do not know.
    file.write_text(text.replace("    return config", line.replace("gates.cooldwn", "data.flp")))
    assert "'flp'" in fails(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")


def test_a_bare_name_is_a_bundled_config():
    assert config_of(["--config=digits"]) == config_of(["--config=configs/digits.py"])
    assert config_of(["--config=digits.py:resnet20"]).model.name == "resnet20"
    assert config_of(["--config", "digits:resnet20", "--config.gates.r", "0.5"]).gates.r == 0.5


def test_a_path_may_have_a_colon(tmp_path):
    file = tmp_path / "a:b" / "mine.py"
    file.parent.mkdir()
    file.write_text((ROOT / "configs" / "digits.py").read_text())
    assert config_of([f"--config={file}"]).model.name == "vgg_bn"
    assert config_of([f"--config={file}:resnet20"]).model.name == "resnet20"


def test_a_switch_needs_no_value_and_leaves_the_next_flag_alone():
    def gates(*switch: str):
        arguments = parse("train", ["--config=digits", *switch, "--workdir=w"])
        assert arguments is not None
        assert arguments.workdir() == "w"
        return arguments.config("").gates

    for static in ((["--config.gates.static"]), ["--config.gates.static", "True"], ["--config.gates.static=1"]):
        assert gates(*static).static is True
    for off in (["--noconfig.gates.calibrate"], ["--config.gates.calibrate", "false"]):
        assert gates(*off).calibrate is False


def test_a_flag_of_an_older_version_is_understood():
    assert config_of(["--config=digits", "--config.gates.softmax=False"]).gates.norm == "none"
    flags = ["--config=digits", "--config.gates.norm=softmax", "--config.gates.softmax=True"]
    assert config_of(flags).gates.norm == "softmax"


def test_what_get_config_returns_must_be_a_config(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return {}\n")
    error = fails(capsys, "train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert "get_config must return a ConfigDict, not dict" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "a", "b"], "evaluate takes one dir, such as workdirs/digits; got a b"),
        (["evaluate", "a", "--workdir=b"], "name the dir once; got a and --workdir=b"),
        (["evaluate", "missing"], "there is no workdir"),
        (["report", "--workdir=missing"], "there is no workdir"),
        (["estimate", "missing", "--budget=0.5"], "there is no workdir"),
        (["export", "missing", "--out=x.stablehlo"], "there is no workdir"),
        (["export", "w", "--out=x.tflite"], ".stablehlo (a program that needs JAX alone) or .onnx (for ONNX Runtime"),
        (
            ["export", "w", "--out=x.pt", "--format=stablehlo"],
            "ends in .stablehlo (a program that needs JAX alone)",
        ),
        (["export", "w", "--out=x.safetensors", "--data=digits"], "--data belongs to a program"),
    ],
)
def test_a_workdir_is_named_with_or_without_its_flag(capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *arguments)


def test_the_best_checkpoint_is_that_of_the_log_or_the_reason_is_said(program, tiny_run, tmp_path):
    workdir = shutil.copytree(tiny_run[0], tmp_path / "run")
    printed = program.run("evaluate", str(workdir), "--best")
    result = json.loads((workdir / "evaluation.json").read_text())
    frozen = cooldown_step(load(str(workdir))[1].gates, TINY_STEPS)
    for stage, accuracy, first in (("baseline", "dense_accuracy", 0), ("gated", "accuracy", frozen)):
        rows = [row for row in read_metrics(workdir) if row["stage"] == stage and "eval_accuracy" in row]
        best = max(row["eval_accuracy"] for row in rows if row["step"] >= first)
        step = result["steps"][stage]
        assert result[accuracy] == pytest.approx(best, abs=1e-6)
        assert f"best {stage} checkpoint: step {step}, accuracy {best:.4f}" in printed
    earlier = max(row["eval_accuracy"] for row in rows)
    assert (f"the log's {earlier:.4f} is of step" in printed) == (earlier > best)


def test_units_are_told_apart_in_a_narrow_table():
    names = [f"features_of_the_encoder/block{index}/{conv}" for index in range(12) for conv in ("conv1", "conv2")]
    works = tuple(LayerWork(types.SimpleNamespace(name=name, out_features=64), 2e6, 1e6) for name in names)
    console = Console(width=80, file=io.StringIO())
    console.print(unit_table(Evaluation(1, 0.5, 0.5, 0.5, None, (), works)))
    cells = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join([*names, "all"])
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


def test_long_data_paths_are_shortened_from_the_front():
    name = "folder:/mnt/shared/projects/2026/animals/images/cats_and_dogs"
    assert shorten_data(name) == "folder:…/images/cats_and_dogs"
    assert shorten_data(f"folder:/{'x' * 50}") == f"folder:…/{'x' * 50}"
    assert shorten_data("folder:/data/pets") == "folder:/data/pets"
    assert shorten_data("tfds:imagenet_resized/64x64:0.1.0") == "tfds:imagenet_resized/64x64:0.1.0"
