"""What launch/bundle.sh runs: see there."""

import argparse
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from typing import NoReturn

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = pathlib.Path(__file__).resolve().parent.parent
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
DATA_FILES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
# Of requirements.txt, what training on the digits and on Fashion-MNIST does without.
OPTIONAL = (
    "grain",
    "jinja2",
    "matplotlib",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "tensorboardx",
    "tensorflow-datasets",
)
# Besides: what installs the project, and what runs the tests marked `device`.
BESIDES = ("setuptools>=77", "pytest>=8", "hypothesis>=6.100")
# JAX, and what it needs itself.
JAX = ("jax", "jaxlib", "ml-dtypes", "numpy", "opt-einsum", "scipy")
# Versions of glibc whose wheels run on any machine that JAX runs on.
GLIBC = range(28, 4, -1)
OLD_TAGS = {"x86_64": ("manylinux2014", "manylinux2010", "manylinux1"), "aarch64": ("manylinux2014",)}
# A line of `pip freeze`, "jax==0.10.2", or a name alone.
INSTALLED = re.compile(r"([\w.-]+)(?:==([\w.!+-]+))?")
ANY_VERSION = SpecifierSet()


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        stop(message)


def stop(message: str) -> NoReturn:
    """Ends the program with one line and status 2."""
    print(f"ftwt_jax: {message}", file=sys.stderr)
    sys.exit(2)


def read_installed(path: str | None) -> dict[str, str | None]:
    """What the target has, and in which version; None is one that will do."""
    if path is None:
        return dict.fromkeys(JAX)
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read --installed={path}: {error}")
    found = {canonicalize_name(match[1]): match[2] for line in lines if (match := INSTALLED.fullmatch(line.strip()))}
    if not found:
        stop(f"--installed={path} holds no line like jax==0.10.2; it is the output of `pip freeze` on the target")
    return found


def platform_tags(given: list[str]) -> list[str]:
    """The tags of pip's for processors and tags."""
    tags = []
    for name in given:
        if name in OLD_TAGS:
            tags += [f"manylinux_2_{minor}_{name}" for minor in GLIBC] + [f"{old}_{name}" for old in OLD_TAGS[name]]
        elif re.fullmatch(r"\w+_\w+", name):
            tags.append(name)
        else:
            stop(f"--platform takes {' or '.join(OLD_TAGS)}, or a tag such as manylinux_2_35_x86_64; got {name!r}")
    return tags


class Wheels:
    """A folder of wheels for a target, with all that they need of what is not there.

    Args:
      installed: see `read_installed`.
      python: such as "3.12".
    """

    def __init__(self, folder: pathlib.Path, installed: dict[str, str | None], python: str, tags: list[str]):
        self._folder, self._installed = folder, installed
        self._download = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
        self._download += [f"--platform={tag}" for tag in tags]
        machine = next((name for name in OLD_TAGS if any(tag.endswith(name) for tag in tags)), platform.machine())
        self._environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "platform_machine": machine,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
        }
        # What is asked of each package so far.
        self._wanted: dict[str, SpecifierSet] = {}
        self._extras: dict[str, set[str]] = {}

    def add(self, requirements: Iterable[Requirement]) -> None:
        """Downloads these and what they need, newest versions first."""
        pending = list(requirements)
        while pending:
            names = {canonicalize_name(one.name) for one in pending if self._note(one)}
            missing = sorted(name for name in names if not self._is_there(name))
            if missing:
                self._get(missing)
            pending = [one for name in sorted(names) for one in self._needs(name)]

    def _note(self, requirement: Requirement) -> bool:
        """Whether this asks for more than what was asked for before."""
        name, extras = canonicalize_name(requirement.name), set(requirement.extras)
        before = self._wanted.get(name), frozenset(self._extras.get(name, ()))
        self._wanted[name] = self._wanted.get(name, ANY_VERSION) & requirement.specifier
        self._extras.setdefault(name, set()).update(extras)
        return before != (self._wanted[name], frozenset(self._extras[name]))

    def _is_there(self, name: str) -> bool:
        if name in self._installed:
            version = self._installed[name]
            if version is None or self._wanted[name].contains(version, prereleases=True):
                return True
        wheel = self._wheel(name)
        if wheel is None:
            return False
        if self._wanted[name].contains(parse_wheel_filename(wheel.name)[1], prereleases=True):
            return True
        wheel.unlink()
        return False

    def _wheel(self, name: str) -> pathlib.Path | None:
        return next((path for path in self._folder.glob("*.whl") if parse_wheel_filename(path.name)[0] == name), None)

    def _get(self, names: list[str]) -> None:
        wanted = [f"{name}{self._wanted[name]}" for name in names]
        print(f"downloading {' '.join(wanted)}", flush=True)
        self._fetch(wanted, self._folder)

    def _fetch(self, wanted: list[str], folder: pathlib.Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command = [*pip, *self._download, f"--dest={folder}", *wanted]
        if subprocess.run(command).returncode:
            stop("pip could not download the wheels; the lines above say why")

    def _needs(self, name: str) -> list[Requirement]:
        """What a package asks for; one that the target has is whole, but for its extras."""
        wheel, version = self._wheel(name), self._installed.get(name)
        if wheel is not None:
            return self._asked_by(wheel, name)
        if not self._extras[name] or version is None:
            return []
        with tempfile.TemporaryDirectory() as scratch:
            self._fetch([f"{name}=={version}"], pathlib.Path(scratch))
            return self._asked_by(next(pathlib.Path(scratch).glob("*.whl")), name)

    def _asked_by(self, wheel: pathlib.Path, name: str) -> list[Requirement]:
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = [one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)]
            headers = HeaderParser().parsestr(archive.read(metadata).decode())
        found = [Requirement(text) for text in headers.get_all("Requires-Dist", [])]
        return [one for one in found if self._applies(one, self._extras[name])]

    def _applies(self, requirement: Requirement, extras: set[str]) -> bool:
        marker = requirement.marker
        return marker is None or any(marker.evaluate(self._environment | {"extra": one}) for one in ("", *extras))


def requirements(everything: bool, cuda: bool) -> list[Requirement]:
    """What is asked for on the target."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    found = [Requirement(line) for line in (*filter(None, lines), *BESIDES)]
    if not everything:
        found = [one for one in found if canonicalize_name(one.name) not in OPTIONAL]
    if cuda:
        extra = re.search(r'^cuda = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        assert extra is not None
        found.append(Requirement(extra[1]))
    return found


def add_data(folder: pathlib.Path, bundle: pathlib.Path) -> None:
    """Copies Fashion-MNIST."""
    missing = [name for name in DATA_FILES if not (folder / name).is_file()]
    if missing:
        stop(f"{folder} lacks {missing[0]}: apt-get install dataset-fashion-mnist, or name its folder by --data=DIR")
    (bundle / "data" / "fashion-mnist").mkdir(parents=True)
    for name in DATA_FILES:
        shutil.copyfile(folder / name, bundle / "data" / "fashion-mnist" / name)


def add_sources(bundle: pathlib.Path) -> str:
    """Packs the commit that is checked out; returns what it is called."""
    git = ["git", "-C", str(ROOT)]
    target = f"--output={bundle / 'ftwt_jax.tar.gz'}"
    try:
        subprocess.run([*git, "archive", "--prefix=ftwt_jax/", target, "HEAD"], check=True, capture_output=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"cannot pack the sources in {ROOT}, which must be a git checkout: {error}")


def main() -> None:
    """Makes the bundle."""
    parser = Parser(prog="launch/bundle.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info))
    parser.add_argument("--platform", action="append")
    parser.add_argument("--installed")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--data", type=pathlib.Path, default=FASHION_MNIST)
    parser.add_argument("bundle", type=pathlib.Path)
    given = parser.parse_args()
    given.bundle = given.bundle.absolute()
    if not re.fullmatch(r"3\.\d+", given.python) or int(given.python[2:]) < 11:
        stop(f"--python takes a version from 3.11 on, such as 3.12; got {given.python!r}")
    tags = platform_tags(given.platform or ["x86_64"])
    installed = {} if given.cuda and given.installed is None else read_installed(given.installed)
    if given.bundle.exists() and (not given.bundle.is_dir() or any(given.bundle.iterdir())):
        stop(f"{given.bundle} is there already, and not an empty folder: name another, or delete it")
    asked = requirements(given.all, given.cuda)
    given.bundle.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name only when it is whole.
    with tempfile.TemporaryDirectory(dir=given.bundle.parent, prefix=".bundle-") as name:
        made = pathlib.Path(name) / "bundle"
        (made / "wheels").mkdir(parents=True)
        add_data(given.data, made)
        commit = add_sources(made)
        Wheels(made / "wheels", installed, given.python, tags).add(asked)
        (made / "requirements.txt").write_text("".join(f"{one}\n" for one in asked))
        (made / "bundle.txt").write_text(f"python={given.python}\nplatform={' '.join(tags)}\ncommit={commit}\n")
        if given.bundle.exists():
            given.bundle.rmdir()
        made.rename(given.bundle)
    files = [path for path in given.bundle.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    wheels = sum(path.suffix == ".whl" for path in files)
    print(f"{given.bundle}: {size:.0f} MB, with {wheels} wheels for Python {given.python}")


if __name__ == "__main__":
    main()
