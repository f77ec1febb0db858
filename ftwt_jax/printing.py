"""Lines of text on a console, as they are."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints one line, however long: not coloured, not wrapped, and with brackets that are no markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
