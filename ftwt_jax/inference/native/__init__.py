"""A kernel of our own for CPUs, in C++, for what XLA has no operation for: a convolution that differs by sample.

It is built on first use by the machine's own compiler and kept in the user's cache folder. Where there is none,
`available()` is False, and compact execution makes do with what XLA offers.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import jax
import jaxlib

from ftwt_jax.errors import UserError
from ftwt_jax.files import written_whole
from ftwt_jax.inference.native.kernels import TARGET
from ftwt_jax.ops.compiling import cache_folder

_FOLDER = pathlib.Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# In this order, until one is understood: processors differ, and so do compilers.
_TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


@functools.cache
def available() -> bool:
    """Whether the kernel can be had here. `CXX` names the compiler."""
    try:
        register(build(cache_folder()))
    except (OSError, UserError):
        try:  # A cache that cannot be written.
            register(build(pathlib.Path(tempfile.mkdtemp(prefix="ftwt_jax-"))))
        except OSError:
            return False
    return True


def register(library: pathlib.Path, target: str = TARGET) -> None:
    """Makes a built library known to XLA."""
    handler = ctypes.CDLL(str(library)).FtwtGatedUnit
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def build(folder: pathlib.Path, tunings: Sequence[Sequence[str]] = _TUNINGS) -> pathlib.Path:
    """The built library in this folder, made if it is not there.

    Args:
      tunings: compiler flags for the processor, of which the first that the compiler understands are taken.

    Raises:
      OSError: there is no compiler, or it failed.
      UserError: the folder cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    sources = sorted(_FOLDER.glob("*.cc"))
    contents = [file.read_bytes() for file in (*sources, *sorted(_FOLDER.glob("*.h")))]
    made_of = repr((contents, jaxlib.__version__, compiler, tunings, _processor())).encode()
    library = folder / f"gated_unit-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(library) as temporary:
            if not any(_compiles(compiler, flags, sources, temporary) for flags in tunings):
                raise OSError(f"{compiler} does not compile {_FOLDER}")
    return library


def _processor() -> list[str]:
    """What tells processors apart that do not run each other's code; a cache may be shared by several machines."""
    known = pathlib.Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})]


def _compiles(compiler: str, flags: Sequence[str], sources: Sequence[pathlib.Path], out: pathlib.Path) -> bool:
    command = [compiler, *_FLAGS, *flags, f"-I{jax.ffi.include_dir()}", *map(str, sources), "-o", str(out)]
    try:
        return subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    except subprocess.TimeoutExpired:
        return False
