"""Packages that only some of what is here needs."""

import importlib
from types import ModuleType

from ftwt_jax.errors import UserError


def imported(package: str, what: str, extra: str) -> ModuleType:
    """The package, loaded.

    Args:
      what: what needs it, for the message.
      extra: of ours, which installs it.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package}: pip install -e '.[{extra}]'") from error
