"""The command `predict`: the classes of image files, and the work that each of them took."""

import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from rich.console import Console

from ftwt_jax.commands.command import (
    Arguments,
    Command,
    Operand,
    define_best,
    define_data,
    define_workdir,
    file_to_write,
)
from ftwt_jax.commands.predict.output import to_csv, to_json, to_table
from ftwt_jax.commands.predict.predictor import Answer, Predictor, load_predictor
from ftwt_jax.data.class_folders import first_of
from ftwt_jax.data.decoding import EXTENSIONS
from ftwt_jax.data.single import find_files
from ftwt_jax.errors import UserError, printable
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.printing import say, say_compiling
from ftwt_jax.training.settings import BASELINE

STDIN = "-"
_FORMATS = ("json", "csv")
_HINT = (
    f"name image files ({', '.join(EXTENSIONS)}) or folders of them, or pass their paths on standard input, one a line"
)


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    define_best(values)
    define_data(values)
    flags.DEFINE_bool(
        "baseline", False, "the dense baseline, not the network with subnets or gates", flag_values=values
    )
    flags.DEFINE_float(
        "budget", None, "MACs reduction to bring the gates to, which takes images of the run's data", flag_values=values
    )
    flags.DEFINE_integer("top", 1, "how many of the most probable classes to tell", flag_values=values)
    flags.DEFINE_integer("batch", None, "most images at once, if not the config's eval_batch_size", flag_values=values)
    flags.DEFINE_bool("json", False, "print a list of objects, and nothing else", flag_values=values)
    flags.DEFINE_bool("csv", False, "print a line for each file below a line of names", flag_values=values)
    flags.DEFINE_string("out", None, "file to write the list or the lines to: .json or .csv", flag_values=values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values, folder = arguments.flags, arguments.workdir()
    for flag in ("top", "batch"):
        number = values[flag].value
        if number is not None and number < 1:
            raise UserError(f"--{flag} takes a whole number, at least 1; got {number}")
    if values.budget is not None and values.baseline:
        raise UserError("--budget moves gates, and --baseline asks the dense network, which has none")
    if values.data is not None and values.budget is None:
        raise UserError("--data names images to calibrate on, which only --budget does: leave it out")
    form = _format(values)
    target = file_to_write(values.out) if values.out else None
    files = find_files(_places(arguments.words))
    if all(file.error for file in files):
        what = first_of(f"{printable(file.path)}: {file.error}" for file in files)
        raise UserError(f"there are no images{f' ({what})' if files else ''}: {_HINT}")
    predictor = load_predictor(folder, values.best, values.baseline, values.budget, values.data)
    quiet = form is not None and target is None
    if not quiet:
        say_compiling(console, f"{predictor.run.config.model.name}, {predictor.stage}")
    found = predictor.predict(files, values.top, values.batch)
    if form is None:
        console.print(to_table(found))
    else:
        top = min(values.top, predictor.run.dataset.num_classes)
        _write(to_json(found) if form == "json" else to_csv(found, top), target)
    answered = [answer for answer in found if "error" not in answer]
    if not answered:
        why = first_of(f"{printable(answer['file'])}: {answer['error']}" for answer in found)
        raise UserError(f"none of {len(found)} files could be answered: {why}" if len(found) > 1 else why)
    if not quiet:
        say(console, _summary(predictor, answered, len(found)))
        if target is not None:
            say(console, f"wrote {target}")


COMMAND = Command(_define, run, Operand("image", "photo.jpg", several=True, optional=True))


def _format(values: flags.FlagValues) -> str | None:
    chosen = [form for form in _FORMATS if values[form].value]
    if len(chosen) > 1:
        raise UserError("give --json or --csv, not both")
    if not chosen and values.out:
        chosen = [form for form in _FORMATS if values.out.lower().endswith(f".{form}")]
        if not chosen:
            raise UserError(f"--out takes a file that ends in .json or .csv, or give --json or --csv; got {values.out}")
    return chosen[0] if chosen else None


def _places(words: Sequence[str]) -> list[str]:
    """The paths that were named, with those of standard input in the place of `-`."""
    if not words and sys.stdin is not None and not sys.stdin.isatty():
        words = [STDIN]
    return [place for word in words for place in (_listed() if word == STDIN else [word])]


def _listed() -> Iterator[str]:
    """The paths on standard input: one a line or, as `find -print0` writes them, with a zero byte behind each."""
    listed = sys.stdin.buffer.read() if sys.stdin is not None else b""
    separator = b"\0" if b"\0" in listed else b"\n"
    for path in listed.split(separator):
        path = path if separator == b"\0" else path.removesuffix(b"\r")
        if path:
            yield os.fsdecode(path)


def _write(text: str, target: AnyPath | None) -> None:
    if target is None:
        sys.stdout.write(text)
        return
    with written_whole(target) as temporary:
        # Names of files as the system has them, also where they are not UTF-8.
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def _summary(predictor: Predictor, answered: Sequence[Answer], files: int) -> str:
    """How many files were answered, and at what work."""
    dense, mean = predictor.dense_macs, float(np.mean([answer["macs"] for answer in answered]))
    text = f"{predictor.run.config.model.name}, {predictor.stage}: {len(answered)} of {files} images"
    if predictor.stage == BASELINE:
        return f"{text}, {dense:,.0f} MACs each"
    return (
        f"{text}, {mean:,.0f} MACs on average, {1 - mean / dense:.1%} fewer than the {dense:,.0f} of the dense network"
    )
