"""The library's own exception and warning, and the message that goes with a misspelt name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that its reader can mend; the message says what, where and how, on one line.

    The command line prints it without a traceback and exits with status 2. In a program it is an ordinary `ValueError`.
    """


class SkippedImageWarning(UserWarning):
    """An image was left out; the message, on one line, says which and why."""


class WeightsWarning(UserWarning):
    """Imported weights are not all as they were; the message, on one line, says which."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line that any terminal can show; its kind if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not one of `known`: gives the nearest one and the whole list."""
    choices = list(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(choices) or 'none'}")
