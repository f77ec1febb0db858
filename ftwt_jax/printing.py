"""Plain lines of text on a console."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints one line of any length as it is: not coloured, not wrapped, brackets not taken for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def say_compiling(console: Console, what: str) -> None:
    """Prints what is about to be compiled, which may take so long that the program seems to hang."""
    say(console, f"compiling {what}; this can take a minute")
