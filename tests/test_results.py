"""What is said of the results is what the figures that are kept of them say."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "results"
# Folders of runs, each with a README.md, and how many tables it has.
FOLDERS = {RESULTS: 3, RESULTS / "h200": 2}
KEPT = sorted(path for folder in FOLDERS for path in folder.glob("*/evaluation.json"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> pathlib.Path:
    return request.param


@pytest.fixture(scope="module")
def tables(folder) -> list[str]:
    """The tables that are printed from the figures."""
    command = [sys.executable, str(RESULTS / "table.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("\n\n")


def test_the_tables_are_those_of_the_figures(folder, tables):
    text = (folder / "README.md").read_text()
    assert len(tables) == FOLDERS[folder]
    for table in tables:
        assert table in text


def test_every_run_that_is_kept_has_a_row(folder, tables):
    figures = [line for table in tables for line in table.splitlines()[2:]]
    kept = [
        path.parent.name for path in KEPT if path.parents[1] == folder and not path.parent.name.startswith("digits")
    ]
    heads = [name for name in kept if "_head_" in name]
    runs = [name for name in kept if name not in heads]
    assert sum(len(table.splitlines()[2:]) for table in tables[2:]) == len(heads)
    assert len(tables[0].splitlines()[2:]) >= len(runs)
    assert all(re.search(r"\d\.\d{3}", line) for line in figures)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_a_run_is_kept_with_its_config_and_names_no_folder_of_a_machine(path):
    config = json.loads((path.parent / "config.json").read_text())
    name = path.parent.name
    assert name.startswith((config["model"]["name"], config["data"]["name"]))
    assert name.endswith(f"_seed{config['seed']}")
    for file in path.parent.glob("*.json"):
        assert not re.search(r'"/\w', file.read_text()), file


def test_the_table_of_subnets_is_that_of_their_figures():
    script, folder = RESULTS / "subnet_table.py", RESULTS / "subnets"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (folder / "README.md").read_text()
    assert len(done.stdout.splitlines()) == 2 + len(list(folder.glob("*/evaluation.json")))
    for file in folder.glob("*/*.json"):
        assert not re.search(r'"/\w', file.read_text()), file
