"""What `predict` writes: JSON, CSV, or a table."""

import csv
import io
import json
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ftwt_jax.commands.predict.predictor import Answer
from ftwt_jax.errors import printable


def to_json(found: Sequence[Answer]) -> str:
    """One document, with a line for each file."""
    return "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n"


def to_csv(found: Sequence[Answer], top: int) -> str:
    """A line of names, and one for each file; the second most probable class is `class_2`, and so on up to `top`."""
    fields = ["file"]
    for place in range(top):
        fields += [_numbered(name, place) for name in ("class", "label", "probability")]
    fields += ["macs", "density", *(["subnet"] if _has_subnets(found) else []), "error"]
    lines = io.StringIO(newline="")
    # All text is quoted: left to itself, the module does not quote a carriage return.
    writer = csv.DictWriter(lines, fields, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC, restval="")
    writer.writeheader()
    for answer in found:
        choices = enumerate(answer.get("top", []))
        row = {_numbered(name, place): value for place, choice in choices for name, value in choice.items()}
        writer.writerow({**row, **{name: value for name, value in answer.items() if name != "top"}})
    return lines.getvalue()


def _numbered(name: str, place: int) -> str:
    return f"{name}_{place + 1}" if place else name


def _has_subnets(found: Sequence[Answer]) -> bool:
    return any("subnet" in answer for answer in found)


def to_table(found: Sequence[Answer]) -> Table:
    """A row for each file, with a line for each of the most probable classes."""
    subnets = _has_subnets(found)
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    for heading in ("probability", "MACs", "density", *(["subnet"] if subnets else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for answer in found:
        name = escape(printable(answer["file"]))
        if "error" in answer:
            table.add_row(name, escape(f"error: {answer['error']}"))
            continue
        classes = "\n".join(escape(printable(choice["class"])) for choice in answer["top"])
        shares = "\n".join(f"{choice['probability']:.3f}" for choice in answer["top"])
        subnet = [str(answer["subnet"])] if subnets else []
        table.add_row(name, classes, shares, f"{answer['macs']:,}", f"{answer['density']:.2f}", *subnet)
    return table
