"""README and docs/: what they show works, what they name exists, and nothing that they promise to list is missing."""

import ast
import importlib.util
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import ftwt_jax as ftwt
from ftwt_jax.__main__ import main
from ftwt_jax.commands import COMMANDS
from ftwt_jax.commands.parse import parse
from ftwt_jax.config.fields import FIELDS
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
COMMANDS_PAGE = TEXTS[ROOT / "docs" / "commands.md"]
# A command or a flag with this in it is cut short, and no one can run it.
ELLIPSIS = "…"
FOLDERS = "ftwt_jax|configs|docs|launch|results|studies|tests"


def blocks(language: str) -> list:
    """The code blocks in this language, on all pages, each as a parameter named for its page and place."""
    return [
        pytest.param(block, id=f"{page.name}-{index}")
        for page, text in TEXTS.items()
        for index, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    ]


def command_lines() -> list[str]:
    """The commands of this program on all pages, without the name of the program: in code blocks and in sentences."""
    found = []
    for block in blocks("sh"):
        found += re.findall(r"^(?:ftwt|python -m ftwt_jax) (.*?)(?:\s+#.*)?$", block.values[0], flags=re.MULTILINE)
    for text in TEXTS.values():
        named = "|".join(COMMANDS)
        # Lines may be broken inside of backticks.
        for line in re.findall(rf"`(?:ftwt |python -m ftwt_jax )?((?:{named})\s[^`]*)`", text):
            found.append(" ".join(line.split()))
    return sorted({line for line in found if ELLIPSIS not in line})


def flag_sets() -> list[str]:
    """Flags of a config that stand alone in a sentence or in a table."""
    found = set()
    for text in TEXTS.values():
        for flags in re.findall(r"`(--config[.=][^`]*)`", text):
            if "=" in flags and ELLIPSIS not in flags:
                found.add(" ".join(flags.split()))
    return sorted(found)


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 120
    assert len(TEXTS[README].encode()) <= 8000


def test_the_readme_opens_with_what_speaks_against_it():
    opening = "\n".join(TEXTS[README].splitlines()[:15])
    assert "Dynamic pruning has not beaten static pruning" in opening
    assert "ONNX Runtime" in opening


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left_to_the_reader(page):
    assert not re.findall(r"\bOWNER\b|\bTODO\b|example\.(?:com|org)", TEXTS[page])


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(program, block):
    subprocess.run([sys.executable, "-c", block], cwd=ROOT, env=program.environment, check=True, timeout=600)


@pytest.mark.parametrize("line", command_lines())
def test_commands_are_understood(line):
    name, *flags = shlex.split(line)
    arguments = parse(name, flags)
    assert arguments is not None
    if arguments.names_config:
        arguments.config("")


def test_every_command_is_shown():
    assert {line.split()[0] for line in command_lines()} == set(COMMANDS)


@pytest.mark.parametrize("flags", flag_sets())
def test_flags_of_a_config_are_understood(flags):
    given = shlex.split(flags)
    config = [] if flags.startswith("--config=") else ["--config=digits"]
    found = parse("train", ["--workdir=DIR", *config, *given]).config("")
    for path, value in (flag.removeprefix("--config.").split("=", 1) for flag in given if "--config." in flag):
        node = found
        for key in path.split("."):
            node = node[key]
        try:
            assert node == ast.literal_eval(value)
        except (ValueError, SyntaxError):
            assert node == value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = set(re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./]*\w", TEXTS[page]))
    # In place of NAME stands what the reader adds.
    for name in (name for name in named if "NAME" not in name):
        assert (ROOT / name).exists(), name
    assert len(named) > 5 or page != README


def anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_reached_from_the_readme_and_from_the_index():
    pages = {page.name for page in PAGES} - {"README.md", "index.md"}
    index = TEXTS[ROOT / "docs" / "index.md"]
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) >= pages
    # The API reference is made from the docstrings, and there is nothing to read in its source.
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", TEXTS[README])) >= pages - {"api.md"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_described(capsys, name):
    """In the section of the command, and no flag that it does not have."""
    assert main([name, "--help"]) == 0
    flags = set(re.findall(r"^ +--(?:\[no\])?(\w+)", capsys.readouterr().out, flags=re.MULTILINE))
    section = re.search(rf"^## {name}\n(.*?)(?=^## )", COMMANDS_PAGE, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    described = set(re.findall(r"^\| `--(\w+)` \|", section[1], flags=re.MULTILINE))
    assert flags
    assert described == flags


def test_every_field_of_a_config_is_described_as_it_is_declared():
    rows = ["| field | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in FIELDS.items():
        default = "" if isinstance(field.default, type) or field.default == "" else f"`{field.default}`"
        rows.append(f"| `{name}` | {field.wanted} | {default} | {field.meaning} |")
    table = "\n".join(rows)
    assert table in COMMANDS_PAGE, f"the table in docs/commands.md must be:\n{table}"


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: ftwt_jax\.(\w+)$", TEXTS[ROOT / "docs" / "api.md"], flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(ftwt.__all__) - {"__version__"})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra [docs]")
def test_the_site_is_built_and_a_broken_link_ends_it(tmp_path):
    for name in ("docs", "ftwt_jax"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "topk_mass_mask" in (tmp_path / "build" / "docs" / "api.html").read_text()
    with (tmp_path / "docs" / "index.md").open("a") as file:
        file.write("\n[a page](nowhere.md)\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "nowhere.md" in done.stderr
