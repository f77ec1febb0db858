"""`report`: what the page shows, that it is self-contained, and the errors when it cannot be written."""

import base64
import html.parser
import json
import re
import shlex
import shutil
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ftwt_jax import workdir
from ftwt_jax.printing import shorten_data
from ftwt_jax.report.co_activation import average_blocks, measure_co_activation
from ftwt_jax.report.images import find_routed, measure_images, to_png
from ftwt_jax.report.reproduce import train_command
from ftwt_jax.report.run_plots import Plot, accuracy_plot, distinct
from ftwt_jax.report.runs import read_runs
from ftwt_jax.training.run import load_run, open_run
from ftwt_jax.training.settings import SUBNETS
from tests.conftest import config_of, fails
from tests.helpers.reports import MOVED, STRANGE, change_json, copies

pytestmark = pytest.mark.long


class Page(html.parser.HTMLParser):
    """The text of a page, its tags with their attributes, and its preformatted blocks."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.blocks, self._inside = "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "pre":
            self.blocks.append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data):
        self.text += data
        if self._inside:
            self.blocks[-1] += data

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(program, tiny_run, tmp_path_factory):
    """The workdirs, the folder of their report, its page and what was printed."""
    folder = tmp_path_factory.mktemp("reports")
    runs = copies(tiny_run[0], folder)
    printed = program.run("report", *runs)
    out = runs[0] / "report"
    return runs, out, Page((out / "index.html").read_text()), printed


def test_the_page_names_the_environments_of_each_run(report):
    runs, _, page, _ = report
    (recorded,) = json.loads((runs[0] / "environment.json").read_text())
    for place in (recorded, *MOVED):
        assert all(value in page.text for value in place.values())
    assert page.text.index("TPU v5 lite") < page.text.index("<H100>")


def test_the_page_has_the_figures_of_every_evaluation(report):
    runs, _, page, _ = report
    for run in runs[:2]:
        found = json.loads((run / "evaluation.json").read_text())
        for name in ("accuracy", "dense_accuracy"):
            assert f"{found[name]:.4f}" in page.text
        for name in ("macs_reduction", "macs_reduction_published", "gate_accuracy", "static_gate_accuracy"):
            assert f"{found[name]:.3f}" in page.text
        assert all(unit in page.text for unit in found["units"])
    assert "decoupled" in page.text
    assert "0.8765" not in page.text  # Only drawn.
    assert "fog" in page.text


def test_the_page_has_the_times_of_a_benchmark(report):
    _, out, _, _ = report
    section = (out / "index.html").read_text().partition('<h2 id="time">')[2].partition("</section>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section)
    assert cells == ["vgg_bn", "&lt;cpu&gt;", "1", "0.600", "8.642", "9.500", "4.321", "2.00", "2.50"]


def test_the_page_has_the_figures_of_each_class(report):
    runs, out, _, _ = report
    found = json.loads((runs[0] / "evaluation.json").read_text())
    section = (out / "index.html").read_text().partition('<h2 id="classes">')[2]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', section)[:10]
    assert [row[0] for row in rows] == found["class_names"]
    assert [int(row[1]) for row in rows] == [sum(row) for row in found["confusion"]]
    assert [row[3] for row in rows] == [f"{accuracy:.3f}" for accuracy in found["class_accuracy"]]
    assert (out / "run1_confusion.png").exists()


def test_a_long_path_of_data_is_shortened_in_the_table(report):
    runs, _, page, _ = report
    name = json.loads((runs[3] / "config.json").read_text())["data"]["name"]
    assert len(name) > 34
    assert [cell for cell in page.attributes("td") if cell.get("title") == name]
    assert f" {shorten_data(name)}" in page.text


def accuracies(tmp_path, tiny_run, **networks) -> Plot:
    """The main plot of runs with these accuracies: of the dense network, the gated one, and at other budgets."""
    for name, (dense, gated, curve) in networks.items():
        run = shutil.copytree(tiny_run[0], tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        change_json(run / "evaluation.json", dense_accuracy=dense, accuracy=gated)
        rows = [{"accuracy": accuracy, "macs_reduction": 0.3 + 0.1 * place} for place, accuracy in enumerate(curve)]
        (run / "budgets.json").write_text(json.dumps({"rows": rows}))
    return accuracy_plot(read_runs([str(tmp_path / name) for name in networks]))


def test_one_bad_curve_does_not_squeeze_the_main_plot(tiny_run, tmp_path):
    good = {"a": (0.94, 0.938, (0.939, 0.937, 0.93)), "b": (0.945, 0.93, (0.94, 0.935, 0.92))}
    plot = accuracies(tmp_path, tiny_run, **good, bad=(0.12, 0.1, (0.1, 0.1, 0.1)))
    bottom, top = plot.figure.axes[0].get_ylim()
    assert 0.85 < bottom < 0.92
    assert 0.945 <= top < 1
    assert {text.get_text() for text in plot.figure.axes[0].texts} == {"0.12", "0.10"}
    assert "Arrows at the lower edge" in plot.caption


def test_a_curve_that_falls_is_shown_whole(tiny_run, tmp_path):
    plot = accuracies(tmp_path, tiny_run, a=(0.94, 0.92, (0.93, 0.88, 0.8)))
    assert plot.figure.axes[0].get_ylim()[0] <= 0.8
    assert not plot.figure.axes[0].texts
    assert "Arrows" not in plot.caption


def test_names_in_plots_stay_distinct():
    names = [f"encoder_of_the_left_side/block{index}/convolution_of_the_branch" for index in range(12)]
    assert len(set(distinct(names))) == len(names)
    assert distinct(["unit0", "unit1"]) == ["unit0", "unit1"]


def test_the_page_is_self_contained(report):
    _, out, page, _ = report
    for _, attributes in page.tags:
        for name in ("src", "href", "data", "poster", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not page.attributes("script")
    assert "@import" not in page.text
    assert "url(" not in page.text
    assert (out / "index.html").stat().st_size < 3_000_000


def test_every_image_has_an_alt_text_and_every_plot_a_png_file(report):
    _, out, page, _ = report
    images = page.attributes("img")
    assert all(image["alt"] for image in images)
    kinds = [image["src"].partition(";")[0] for image in images]
    # The six least and the six most expensive images of each run whose images were measured.
    assert kinds.count("data:image/png") == 24
    plots = sorted(path.name for path in out.glob("*.png"))
    assert len(plots) == kinds.count("data:image/svg+xml")
    assert {"accuracy.png", "density.png", "run1_macs.png", "run1_rates.png", "run2_corruptions.png"} <= set(plots)
    for name in plots:
        with Image.open(out / name) as plot:
            assert min(plot.size) > 100
            plot.verify()
    for image in images:
        if image["src"].startswith("data:image/svg"):
            xml.etree.ElementTree.fromstring(base64.b64decode(image["src"].partition(",")[2]))


def test_names_are_escaped(report):
    _, out, page, _ = report
    raw = (out / "index.html").read_text()
    assert "<b>&" not in raw
    assert "&lt;b&gt;&amp;" in raw
    assert f"2 {STRANGE}" in page.text
    accuracy = next(image for image in page.attributes("img") if image["alt"].startswith("Accuracy against MACs"))
    drawn = xml.etree.ElementTree.fromstring(base64.b64decode(accuracy["src"].partition(",")[2]))
    assert f"2 {STRANGE}" in "".join(drawn.itertext())


def test_what_is_missing_is_named(report):
    _, _, page, printed = report
    assert "3 dense: there is no gated network yet" in printed
    assert "4 gone: its images were not examined" in printed
    assert "its images were not examined" in page.text
    assert "There is no metrics.jsonl" in page.text
    # The networks that are there are those of the evaluations.
    assert "again`" not in printed
    assert "evaluation.json gives" not in page.text


def test_the_command_on_the_page_has_the_config_of_the_run(report):
    runs, _, page, _ = report
    commands = [block for block in page.blocks if block.startswith("python -m ftwt_jax train")]
    assert len(commands) == len(runs)
    for run, command in zip(runs, commands, strict=True):
        words = shlex.split(command.replace("\\\n", ""))
        assert words[:4] == ["python", "-m", "ftwt_jax", "train"]
        assert words[-1] == f"--workdir={run}"
        config = config_of(words[4:])
        assert workdir.as_dict(config) == json.loads((run / "config.json").read_text())
    assert any("--corruptions" in block for block in page.blocks)
    assert any("--budgets=0.6,0.3" in block for block in page.blocks)
    assert f"jax{jax.__version__}" in re.sub(r"\s", "", page.text)


def test_a_config_that_flags_cannot_give_has_no_command(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    change_json(run / "config.json", wishes="many")
    assert train_command(read_runs([str(run)])[0]) is None


def test_macs_and_masks_of_single_images_add_up_to_the_evaluation(tiny_run):
    folder = tiny_run[0]
    found = json.loads((folder / "evaluation.json").read_text())
    _, config = workdir.load(str(folder))
    run = open_run(ConfigDict(config), folder)
    measured = measure_images(run, best=False)
    assert len(measured.macs) == found["samples"] == 450
    assert 1 - measured.macs.mean() / measured.dense_macs == pytest.approx(found["macs_reduction"], abs=1e-5)
    assert np.mean(measured.labels == measured.predicted) == pytest.approx(found["accuracy"])
    counted = np.zeros((10, 10), int)
    np.add.at(counted, (measured.labels, measured.predicted), 1)
    assert found["confusion"] == counted.tolist()
    np.testing.assert_allclose(found["class_accuracy"], counted.diagonal() / counted.sum(axis=1))
    shares = np.array(found["dense_class_accuracy"]) * np.sum(found["dense_confusion"], axis=1)
    assert shares.sum() / 450 == pytest.approx(found["dense_accuracy"])
    densities = [measured.masks(unit).mean() for unit in found["units"]]
    np.testing.assert_allclose(densities, found["density"], atol=1e-6)
    dynamic, filters = (sum(xs) for xs in (map(measured.dynamic, measured.units), measured.widths))
    assert dynamic / filters == pytest.approx(found["dynamic_filters"])
    np.testing.assert_array_equal(measured.labels, run.dataset.test.labels[measured.indices])


def test_images_are_those_that_the_router_sends_to_a_subnet(tiny_subnets):
    run = load_run(str(tiny_subnets[0]))
    found = json.loads((tiny_subnets[0] / "evaluation.json").read_text())["subnets"]
    measured = measure_images(run, best=False, stage=SUBNETS)
    images = run.normalize(run.dataset.test.images)
    routes = run.models[SUBNETS].apply(run.trained(SUBNETS), images).routes
    np.testing.assert_array_equal(measured.choice, routes.choice)
    assert np.bincount(measured.choice, minlength=3).tolist() == [row["images"] for row in found["subnets"]]
    assert np.mean(measured.labels == measured.predicted) == pytest.approx(found["accuracy"])
    assert 1 - measured.macs.mean() / measured.dense_macs == pytest.approx(found["macs_reduction"], abs=1e-5)
    uris = np.array([to_png(image) for image in run.dataset.test.images])
    for subnet, shown in enumerate(find_routed(measured, run.dataset, 8)):
        there = measured.choice == subnet
        assert len({one.uri for one in shown}) == min(8, there.sum())
        for one in shown:
            places = np.flatnonzero(there & (uris == one.uri))
            assert one.name in {run.dataset.class_names[label] for label in run.dataset.test.labels[places]}


def test_the_page_shows_subnets_and_some_images_of_each(program, tiny_subnets, tmp_path):
    program.run("report", str(tiny_subnets[0]), f"--out={tmp_path / 'report'}")
    assert {path.name for path in (tmp_path / "report").glob("run1_*.png")} >= {"run1_routes.png", "run1_shared.png"}
    text = (tmp_path / "report" / "index.html").read_text()
    assert "A router sends each image" in text
    assert '<a href="#subnets">' in text
    section = Page(text.partition('<h2 id="subnets">')[2].partition("</section>")[0])
    rows = json.loads((tiny_subnets[0] / "evaluation.json").read_text())["subnets"]["subnets"]
    shown = [image for image in section.attributes("img") if image["src"].startswith("data:image/png")]
    assert len(shown) == sum(min(8, row["images"]) for row in rows)
    assert all(re.fullmatch("An image of class [0-9]", image["alt"]) for image in shown)
    for subnet, row in enumerate(rows):
        assert (f"Some of the images in subnet {subnet}: true class." in section.text) == (row["images"] > 0)


def test_filters_that_fire_together_are_neighbors():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    of_class, of_image = labels < 2, rng.random(400) < 0.5
    # 0 and 3 follow the class, 1 and 4 the image; 2 is always off, 5 always on.
    always = np.ones(400, bool)
    masks = np.stack([of_class, of_image, ~always, of_class, ~of_image, always], axis=1)
    found = measure_co_activation(masks, labels, classes=5, most_classes=2)
    order = found.order.tolist()
    assert order[0] == 5
    assert order[-1] == 2
    assert abs(order.index(0) - order.index(3)) == 1
    assert found.dynamic.tolist() == [False, True, True, True, True, False]
    place = [number for number in order if number not in (2, 5)]
    one, two, three, four = (place.index(number) for number in (0, 3, 1, 4))
    assert found.correlation[one, two] == pytest.approx(1)
    assert found.correlation[three, four] == pytest.approx(-1)
    # The class determines the first two, and says nothing of the others.
    assert found.within[one, two] == 0
    assert found.within[three, four] == pytest.approx(-1)
    assert 0.45 < found.explained < 0.55
    assert found.rates[0, order.index(0)] == 1
    assert found.rates[3, order.index(0)] == 0
    assert np.isnan(found.rates[4]).all()
    assert found.both[:, one, two].tolist() == [1, 1]


def test_large_maps_are_averaged_over_blocks():
    cells, side = average_blocks(np.arange(25.0).reshape(5, 5), most=3)
    assert side == 2
    np.testing.assert_allclose(cells, [[3, 5, 6.5], [13, 15, 16.5], [20.5, 22.5, 24]])


def test_runs_with_the_same_name_get_longer_names(tiny_run, tmp_path):
    folders = [shutil.copytree(tiny_run[0], tmp_path / parent / "run") for parent in ("a", "b")]
    names = [run.name for run in read_runs([str(folders[0]), str(folders[1]), f"{folders[0]}/."])]
    assert names == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((lambda run: (run / "evaluation.json").unlink()), "run `python -m ftwt_jax evaluate --workdir="),
        ((lambda run: (run / "evaluation.json").write_text('{"acc')), "cannot read the evaluation in"),
        ((lambda run: (run / "evaluation.json").write_text("[]")), "evaluation.json lacks accuracy, dense_accuracy"),
        ((lambda run: change_json(run / "evaluation.json", density=[0.5])), "lacks units and density"),
        ((lambda run: change_json(run / "evaluation.json", dynamic_filters="many")), "lacks dynamic_filters"),
        ((lambda run: (run / "budgets.json").write_text('{"rows": [{"budget": 1}]}')), "write it again with `evaluate"),
        ((lambda run: (run / "corruptions.json").write_text("x")), "cannot read the table in"),
        ((lambda run: (run / "config.json").unlink()), "holds no run"),
        ((lambda run: (run / "benchmark.json").write_text('{"batch": 1}')), "lacks macs_reduction, dense_ms"),
        ((lambda run: change_json(run / "evaluation.json", class_accuracy=[0.5])), "figures of the same classes"),
    ],
)
def test_a_broken_workdir_is_named(capsys, tiny_run, tmp_path, change, says):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    change(run)
    assert says in fails(capsys, "report", str(run))
    assert not (run / "report").exists()


def test_misuse(capsys, tiny_run, tmp_path):
    run = str(tiny_run[0])
    assert "report takes one dir or more, such as workdirs/digits; got none" in fails(capsys, "report")
    assert "there is no workdir" in fails(capsys, "report", str(tmp_path / "missing"))
    unit = json.loads((tiny_run[0] / "evaluation.json").read_text())["units"][1]
    assert f"did you mean {unit!r}" in fails(capsys, "report", run, f"--unit={unit}x", f"--out={tmp_path / 'r'}")
    (tmp_path / "file").write_text("")
    error = fails(capsys, "report", run, f"--out={tmp_path / 'file' / 'r'}")
    assert "cannot write the report to" in error
    assert "choose another with --out" in error
    assert "got tfds:a tfds:b" in fails(capsys, "prepare", "tfds:a", "tfds:b")
