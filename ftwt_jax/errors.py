"""The library's own exception and warnings, and how errors become one line of text."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake that the user can fix; the message says on one line what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with status 2. In a program it is an ordinary `ValueError`.
    """


class SkippedImageWarning(UserWarning):
    """An image was skipped; the message says on one line which and why."""


class MissingPackageWarning(UserWarning):
    """Something is left out for want of a package; the message says on one line what and which."""


class RunWarning(UserWarning):
    """A workdir's network is not what it may be taken for; the message says on one line how."""


class WeightsWarning(UserWarning):
    """Imported weights were changed; the message says on one line which and how."""


class CompositionWarning(UserWarning):
    """A network does something to activations that loses track of masks; the message says what, and what does not."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns of the line of a user's program that called this library, directly or through Flax or JAX."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "ftwt_jax",
        "flax",
        "jax",
        "contextlib",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors of reading and writing files and, once gcsfs is loaded, those of buckets; and `more` of them."""
    if "gcsfs" not in sys.modules:
        return OSError, *more
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return OSError, HttpError, ClientError, GoogleAPIError, GoogleAuthError, *more


def os_reason(error: BaseException) -> str:
    """The operating system's reason, such as "no space left on device", for a message that names the file itself.

    The error number is left out; of an error that is not the system's, this is `one_line`.
    """
    reason = error.strerror if isinstance(error, OSError) else None
    return f"{reason[0].lower()}{reason[1:]}" if reason else one_line(error)


def one_line(error: BaseException) -> str:
    """The message of an error on one line that any terminal can show; the error's type if it has no message."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {os_reason(error)}" if error.filename else os_reason(error)
    return printable(" ".join(text.split()) or type(error).__name__)


def printable(text: str) -> str:
    """The text with its unprintable characters escaped, and so are bytes of a file's name that are not UTF-8."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shortened(error: BaseException, most: int = 240) -> str:
    """`one_line`, with the middle left out if it is longer than `most` characters.

    Libraries put the cause at either end: their own words first, those of the operating system last.
    """
    text, half = one_line(error), most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def listed(names: Sequence[str], most: int = 10, between: str = ", ", rest: str = " and {} more") -> str:
    """Names in a message: of more than `most` the first ones, and `rest` with the number of the others."""
    return between.join(names[:most]) + (rest.format(len(names) - most) if len(names) > most else "")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not one of `known`: suggests the closest and lists all."""
    choices = list(known)
    closest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(choices) or 'none'}")
