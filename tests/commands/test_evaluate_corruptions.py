"""`evaluate --corruptions`: a row for each corruption and severity, the same figures however they are computed."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from rich.console import Console

from ftwt_jax import workdir as workdirs
from ftwt_jax.commands.evaluate.corruptions import SUBNETS_FIGURES, applied, sweep
from ftwt_jax.data import load_dataset
from ftwt_jax.data.build import Selection
from ftwt_jax.data.corrupted_sets import open_corrupted
from ftwt_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt_batch
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError
from ftwt_jax.training.run import make_run, open_run
from ftwt_jax.training.settings import BASELINE, GATED
from tests.conftest import Program, fails
from tests.data.test_tfds import command_in, python
from tests.helpers.processes import two_processes

pytestmark = pytest.mark.long

HELD_OUT = 450
FIGURES = ("dense_accuracy", "accuracy", "density", "macs_reduction", "macs_reduction_published")
# Images of each configuration as `corrupt` makes them: what TFDS gives back must come to the same figures.
CONFIGURATIONS = (("contrast", 2), ("gaussian_noise", 1), ("gaussian_noise", 5))
# Writes FOLDER/written.npz as a set with a configuration for each array, and as two with the first one that do not fit.
BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

FOLDER = sys.argv[-1]
WRITTEN = dict(np.load(f"{FOLDER}/written.npz"))
LABELS = WRITTEN.pop("labels")


class FtwtCorrupted(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in WRITTEN]
    CLASSES, SPLIT = 10, "test"

    def _info(self):
        image, label = tfds.features.Image(shape=(8, 8, 1)), tfds.features.ClassLabel(num_classes=self.CLASSES)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, downloads):
        return {self.SPLIT: self._generate_examples()}

    def _generate_examples(self):
        for key, (image, label) in enumerate(zip(WRITTEN[self.builder_config.name], LABELS)):
            yield key, {"image": image, "label": label % self.CLASSES}


class FtwtFewCorrupted(FtwtCorrupted):
    CLASSES = 3


class FtwtTrainCorrupted(FtwtCorrupted):
    SPLIT = "train"


for builder in (FtwtCorrupted, FtwtFewCorrupted, FtwtTrainCorrupted):
    for name in WRITTEN:
        one = builder(config=name, data_dir=f"{FOLDER}/data", file_format="array_record")
        one.download_and_prepare()
        if builder is not FtwtCorrupted:
            break
"""


@dataclasses.dataclass(frozen=True)
class Swept:
    workdir: pathlib.Path
    printed: str

    @property
    def result(self) -> dict:
        return json.loads((self.workdir / "corruptions.json").read_text())


def copied(tiny_run, folder: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(tiny_run[0], folder / "run")


@pytest.fixture(scope="module")
def swept(program, tiny_run, tmp_path_factory) -> Swept:
    """What the command leaves and prints for a tiny run."""
    workdir = copied(tiny_run, tmp_path_factory.mktemp("swept"))
    return Swept(workdir, program.run("evaluate", f"--workdir={workdir}", "--corruptions"))


def by_setting(result: dict) -> dict:
    return {(row["corruption"], row["severity"]): row for row in result["rows"]}


def assert_same_figures(found: dict, wanted: dict) -> None:
    assert found["samples"] == wanted["samples"]
    for key in FIGURES:
        assert found[key] == pytest.approx(wanted[key], abs=1e-6), (found, wanted)


def test_a_row_for_clean_images_and_for_each_corruption_and_severity(swept):
    wanted = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    assert list(by_setting(swept.result)) == [("clean", 0), *wanted]
    assert len(CORRUPTIONS) == len(SEVERITIES) == 5
    assert (swept.result["source"], swept.result["samples"], swept.result["checkpoint"]) == (
        "applied",
        HELD_OUT,
        "newest",
    )
    for row in swept.result["rows"]:
        assert row["samples"] == HELD_OUT
        assert all(0 <= row[key] <= 1 for key in FIGURES)


def test_the_ordinary_evaluation_is_done_and_is_the_clean_row(swept, tiny_run):
    assert (swept.workdir / "evaluation.json").read_text() == (tiny_run[0] / "evaluation.json").read_text()
    evaluation, clean = json.loads((swept.workdir / "evaluation.json").read_text()), swept.result["rows"][0]
    for key in ("dense_accuracy", "accuracy", "macs_reduction", "macs_reduction_published"):
        assert clean[key] == evaluation[key]
    # Units of 8 and of 16 filters.
    assert clean["density"] == pytest.approx(np.average(evaluation["density"], weights=[8, 16]))
    assert "MACs per image, exact convention" in swept.printed


def test_corrupted_images_are_harder_and_the_gates_notice(swept):
    rows = by_setting(swept.result)
    assert rows["contrast", 5]["dense_accuracy"] < rows["clean", 0]["dense_accuracy"]
    assert len({row["density"] for row in rows.values()}) > 1


def test_means_are_of_what_is_shown(swept):
    result = swept.result
    for key in FIGURES:
        for name in CORRUPTIONS:
            values = [row[key] for row in result["rows"] if row["corruption"] == name]
            assert result["mean_by_corruption"][name][key] == pytest.approx(np.mean(values))
        assert result["mean"][key] == pytest.approx(np.mean([row[key] for row in result["rows"][1:]]))


def cells(printed: str) -> list[list[str]]:
    """The lines of the last table."""
    lines = printed[printed.rindex("┏") :].splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def shown(row: dict) -> list[str]:
    places = {"dense_accuracy": 4, "accuracy": 4, "density": 3, "macs_reduction": 3}
    return [f"{row[key]:.{digits}f}" for key, digits in places.items()]


def test_the_table_shows_the_figures_of_the_file(swept):
    result = swept.result
    wanted = [[row["corruption"], str(row["severity"]), *shown(row)] for row in result["rows"]]
    means = [[name, "mean", *shown(row)] for name, row in result["mean_by_corruption"].items()]
    found = cells(swept.printed)
    assert [row for row in found if row[1] != "mean"] == wanted
    assert [row for row in found if row[1] == "mean"] == [*means, ["all corruptions", "mean", *shown(result["mean"])]]
    assert "corruption 25 of 25: jpeg_compression, severity 5: accuracy" in swept.printed


def test_without_gates_their_figures_are_left_out(program, tiny_run, swept, tmp_path):
    workdir = copied(tiny_run, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / GATED)
    printed = program.run("evaluate", f"--workdir={workdir}", "--corruptions")
    for row, gated in zip(Swept(workdir, printed).result["rows"], swept.result["rows"], strict=True):
        assert row["dense_accuracy"] == row["accuracy"] == gated["dense_accuracy"]
        assert row["density"] is None
        assert row["macs_reduction"] == row["macs_reduction_published"] == 0
    assert {len(row) for row in cells(printed)} == {3}


def test_subnets_have_figures_of_their_own_in_every_row(program, tiny_subnets, tmp_path):
    workdir = copied(tiny_subnets, tmp_path)
    found = Swept(workdir, program.run("evaluate", f"--workdir={workdir}", "--corruptions"))
    clean, routed = found.result["rows"][0], json.loads((workdir / "evaluation.json").read_text())["subnets"]
    for key in ("accuracy", "macs_reduction"):
        name = f"subnets_{key}"
        assert clean[name] == routed[key]
        assert found.result["mean"][name] == pytest.approx(np.mean([row[name] for row in found.result["rows"][1:]]))
    means = found.result["mean_by_corruption"]
    assert all(row.keys() >= {*FIGURES, *SUBNETS_FIGURES} for row in (*found.result["rows"], *means.values()))
    rows = [*found.result["rows"], *means.values(), found.result["mean"]]
    wanted = {(*shown(row), f"{row['subnets_accuracy']:.4f}", f"{row['subnets_macs_reduction']:.3f}") for row in rows}
    assert {tuple(row[2:]) for row in cells(found.printed)} == wanted


def test_the_whole_sweep_compiles_each_network_once(tiny_run, tmp_path):
    path, config = workdirs.load(str(copied(tiny_run, tmp_path)))
    run = open_run(config, path)
    sweep(run, applied(run), "applied", Console(quiet=True))
    for stage in (BASELINE, GATED):
        assert run.evaluator(stage)._step._cache_size() == 1


@pytest.mark.parametrize("batch_size", [100, 450])
def test_figures_do_not_depend_on_the_batch_size(tiny_run, swept, tmp_path, batch_size):
    path, config = workdirs.load(str(copied(tiny_run, tmp_path)))
    config.eval_batch_size = batch_size
    run = open_run(config, path)
    hardest = [setting for setting in applied(run) if setting.severity == 5]
    found, wanted = by_setting(sweep(run, hardest, "applied", Console(quiet=True))), by_setting(swept.result)
    assert len(found) == 6
    for setting, row in found.items():
        assert_same_figures(row, wanted[setting])


def test_images_that_are_read_as_they_are_needed_are_corrupted_like_those_in_memory(tiny_run, tmp_path):
    path, config = workdirs.load(str(copied(tiny_run, tmp_path)))
    data = load_dataset("digits")
    streamed = dataclasses.replace(data, test=Selection(data.test, np.arange(HELD_OUT)), resized_crop=True)
    seen = np.concatenate([batch["image"] for batch in eval_batches(streamed, streamed.test, 150)])
    held = dataclasses.replace(data, test=ArraySource(seen, data.test.labels))
    found, wanted = (make_run(config, path, dataset=dataset) for dataset in (streamed, held))
    found, wanted = (sweep(run, applied(run)[4::5], "applied", Console(quiet=True))["rows"] for run in (found, wanted))
    assert len(found) == 6
    for row, same in zip(found, wanted, strict=True):
        assert_same_figures(row, same)


def test_two_processes_find_what_one_finds_and_one_of_them_prints_it(program, tiny_run, swept, tmp_path):
    workdir = copied(tiny_run, tmp_path)
    with two_processes(program, "evaluate", f"--workdir={workdir}", "--corruptions") as processes:
        outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ["corruption 1 of 25" in printed for printed, _ in outputs] == [True, False]
    assert ["all corruptions" in printed for printed, _ in outputs] == [True, False]
    found = Swept(workdir, outputs[0][0])
    assert list(by_setting(found.result)) == list(by_setting(swept.result))
    for row, wanted in zip(found.result["rows"], swept.result["rows"], strict=True):
        assert_same_figures(row, wanted)


@pytest.fixture(scope="module")
def with_sets(program, tiny_run, tmp_path_factory) -> Program:
    """The program where TFDS has prepared sets of corrupted digits."""
    folder, held_out = tmp_path_factory.mktemp("corrupted"), load_dataset("digits").test
    seed = json.loads((tiny_run[0] / "config.json").read_text())["seed"]
    arrays = {
        f"{name}_{severity}": corrupt_batch(held_out.images, name, severity, seed, range(HELD_OUT))
        for name, severity in CONFIGURATIONS
    }
    np.savez(folder / "written.npz", labels=held_out.labels, **arrays)
    python(program, BUILD, folder)
    return dataclasses.replace(program, environment=program.environment | {"TFDS_DATA_DIR": str(folder / "data")})


def test_a_set_of_tfds_is_evaluated_with_all_that_is_prepared_of_it(with_sets, tiny_run, swept, tmp_path):
    workdir, source = copied(tiny_run, tmp_path), "tfds:ftwt_corrupted"
    printed = with_sets.run("evaluate", f"--workdir={workdir}", "--corruptions", f"--corruptions_from={source}")
    found = Swept(workdir, printed).result
    assert (found["source"], found["samples"]) == (source, HELD_OUT)
    rows, wanted = by_setting(found), by_setting(swept.result)
    assert list(rows) == [("clean", 0), *CONFIGURATIONS]
    for setting, row in rows.items():
        assert_same_figures(row, wanted[setting])
    # A corruption of which more is prepared counts no more than another.
    means = [
        np.mean([rows[s]["accuracy"] for s in CONFIGURATIONS if s[0] == name]) for name in ("contrast", CORRUPTIONS[0])
    ]
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(means))
    assert source in printed


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("tfds:ftwt_few_corrupted", "has 3 classes, which are not the 10 of this network"),
        ("tfds:ftwt_train_corrupted", "has no split to evaluate on: neither test nor validation"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_before_anything_is_evaluated(with_sets, tiny_run, tmp_path, source, says):
    workdir = copied(tiny_run, tmp_path)
    before = (workdir / "evaluation.json").stat()
    error = with_sets.run("evaluate", f"--workdir={workdir}", "--corruptions", f"--corruptions_from={source}", status=2)
    assert error.startswith("ftwt: error: ")
    assert error.count("\n") == 1
    assert says in error
    assert (workdir / "evaluation.json").stat() == before
    assert not (workdir / "corruptions.json").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--corruptions_from=tfds:cifar10_corrupted"], "names the images that --corruptions takes: give both"),
        (["--corruptions", "--corruptions_from=cifar10_corrupted"], "takes tfds:NAME, such as tfds:cifar10_corrupted"),
        (["--corruptions", "--corruptions_from=tfds:"], "takes tfds:NAME, such as tfds:cifar10_corrupted"),
        (["--corruptions", "--corruptions_from=tfds:cifar10_corupted"], "did you mean 'cifar10_corrupted'"),
        (["--corruptions", "--corruptions_from=tfds:cifar10"], "is not a set of corrupted images with severities"),
        (
            ["--corruptions", "--corruptions_from=tfds:cifar10_corrupted/fog_1"],
            "takes a data set without a configuration: tfds:cifar10_corrupted;",
        ),
        (
            ["--corruptions", "--corruptions_from=tfds:cifar10_corrupted"],
            "has images of 32x32x3, but this network takes 8x8x1",
        ),
        (["--corruptions", "--budgets=0.5"], "--budgets or --corruptions, not both"),
    ],
)
def test_used_wrongly(capsys, tiny_run, flags, says):
    assert says in fails(capsys, "evaluate", f"--workdir={tiny_run[0]}", *flags)
    assert not (tiny_run[0] / "corruptions.json").exists()


def coloured(classes: int, names: tuple[str, ...] = ()) -> Dataset:
    nothing = ArraySource(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int32))
    return Dataset(nothing, nothing, classes, (32, 32, 3), (0.5,) * 3, (0.2,) * 3, class_names=names)


def test_a_set_of_which_nothing_is_prepared_is_refused_with_a_command(tmp_path):
    with pytest.raises(UserError, match="no configuration of tfds:cifar10_corrupted is prepared in") as caught:
        open_corrupted("tfds:cifar10_corrupted", str(tmp_path), coloured(10, tuple("abcdefghij")))
    command, name, place = command_in(str(caught.value))
    assert (command, place) == ("prepare", f"--data_dir={tmp_path}")
    assert name.startswith("tfds:cifar10_corrupted/")


def test_other_classes_are_refused_even_if_nothing_is_prepared(tmp_path):
    with pytest.raises(UserError, match="has 10 classes, which are not the 100 of this network"):
        open_corrupted("tfds:cifar10_corrupted", str(tmp_path), coloured(100))
