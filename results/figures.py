"""Figures as lines of JSON: each is written the moment it is measured, and what is there is not measured again.

Also a program, for figures that come from another: python results/figures.py FIGURES.jsonl run NAME WORKDIR SECONDS
(what a training has recorded), or … FIGURES.jsonl tests NAME JUNIT.xml SECONDS (what a part of the suite gave).
"""

import json
import pathlib
import statistics
import sys
import time
from typing import Any
from xml.etree import ElementTree

import jax


class Figures:
    """The figures of one part, in a file that other parts write too.

    Args:
      path: the file; it need not exist.
      part: what the figures belong to.
      seconds: after this long nothing more is begun; what is left is for another call.
    """

    def __init__(self, path: str, part: str, seconds: float):
        self._path, self._part = pathlib.Path(path), part
        self._seconds, self._start = seconds, time.perf_counter()
        self._device = jax.devices()[0].device_kind

    def wants(self, name: str) -> bool:
        """Whether to measure this figure: it is not there yet, from such a device, and there is time."""
        if any(self._key(line) == (self._part, name, self._device) for line in self._lines()):
            print(f"{self._part}: {name}: is there already", flush=True)
            return False
        passed = time.perf_counter() - self._start
        if passed > self._seconds:
            print(f"{self._part}: {name}: left for another call, after {passed:.0f} s", flush=True)
            return False
        return True

    def write(self, name: str, **values: Any) -> None:
        """Adds a figure to the file, and prints it."""
        line = {"part": self._part, "name": name, "device": self._device, "jax": jax.__version__, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[str, str, str]:
        return line["part"], line["name"], line["device"]


def of_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What a training has recorded: accuracies, the work saved, and the speed in the median of its reports."""
    found: dict[str, Any] = {}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        speeds = [row["images_per_second"] for row in mine if "images_per_second" in row]
        waits = [row["input_wait"] for row in mine if "input_wait" in row]
        accuracies = [row["eval_accuracy"] for row in mine if "eval_accuracy" in row]
        found[stage] = {
            "steps": mine[-1]["step"],
            "images_per_second": statistics.median(speeds) if speeds else None,
            "input_wait": statistics.median(waits) if waits else None,
            "accuracy": accuracies[-1] if accuracies else None,
        }
    evaluation = workdir / "evaluation.json"
    if evaluation.exists():
        found["evaluation"] = json.loads(evaluation.read_text())
    return found


def of_tests(report: pathlib.Path) -> dict[str, int]:
    """How many tests a JUnit report has, and how they ended."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"], **counts}


def main() -> None:
    """Writes one figure from files."""
    path, kind, name, source, seconds = sys.argv[1:]
    read = {"run": of_run, "tests": of_tests}[kind]
    Figures(path, kind, 0).write(name, seconds=float(seconds), **read(pathlib.Path(source)))


if __name__ == "__main__":
    main()
