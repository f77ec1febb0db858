"""Plain lines of text on a console."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints one line of any length as it is: not coloured, not wrapped, brackets not taken for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def say_compiling(console: Console, what: str) -> None:
    """Prints what is about to be compiled, which may take so long that the program seems to hang."""
    say(console, f"compiling {what}; this can take a minute")


def four_digits(value: float) -> str:
    """With so many digits that the quotient of two is the one that is printed beside them."""
    return f"{value:#.4g}".rstrip(".")


def shorten_data(name: str, most: int = 34) -> str:
    """The name of a data set with the beginning of a long path left out: `folder:…/dogs/train`."""
    kind, colon, place = name.partition(":")
    if len(name) <= most or "/" not in place:
        return name
    parts = place.rstrip("/").split("/")
    kept = parts[-1]
    for part in reversed(parts[:-1]):
        if len(f"{kind}:…/{part}/{kept}") > most:
            break
        kept = f"{part}/{kept}"
    return f"{kind}{colon}…/{kept}"
