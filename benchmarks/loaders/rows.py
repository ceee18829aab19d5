"""From measurements, round by round, to the rows of the result file."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Result = dict[str, Any]
REFERENCE = "ImageFolder, PIL"
DECODE_LIMIT = "decode whole images"


@dataclass(frozen=True)
class Task:
    """What becomes one row.

    measure, name, output: the row's. jobs: what is run for it each round, as changes to the common job; their results
    are joined. about: more for the row. baseline: name of the loader that `ratio_to_original` compares with.
    """

    measure: str
    name: str
    output: str
    jobs: tuple[dict[str, Any], ...]
    about: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""


def all_rows(tasks: Sequence[Task], results: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """The rows after some rounds, one for each task that was run.

    results: one list of results a task, in the order of the rounds; a failed one holds "error" alone.
    Figures are medians over the rounds, and so are ratios, each taken within its round.
    """
    by_row = {(task.measure, task.name, task.output): list(found) for task, found in zip(tasks, results, strict=True)}
    return [_row(task, list(found), by_row) for task, found in zip(tasks, results, strict=True) if found]


def _row(task: Task, found: list[Result], by_row: dict[tuple[str, str, str], list[Result]]) -> dict[str, Any]:
    row: dict[str, Any] = {"measure": task.measure, "device": "cpu", "loader": task.name}
    if task.output:
        row["output"] = task.output
    row |= task.about
    errors = [result["error"] for result in found if "error" in result]
    if errors:
        return {**row, "error": errors[0]}
    for key, value in found[0].items():
        row[key] = statistics.median(result[key] for result in found) if isinstance(value, float | int) else value
    if "images_per_s" in row:
        rates = [result["images_per_s"] for result in found]
        row |= {"images_per_s_min": min(rates), "images_per_s_max": max(rates)}
    if task.measure == "loader":
        reference = by_row.get(("loader", REFERENCE, task.output))
        row["ratio_to_imagefolder"] = _ratio(found, reference)
        row["cpu_ratio_to_imagefolder"] = _ratio(reference, found, "cpu_ms_per_image")
        row["share_of_decode_limit"] = _ratio(found, by_row.get(("loader_limit", DECODE_LIMIT, "")))
    if task.baseline:
        row["ratio_to_original"] = _ratio(found, by_row.get(("loader", task.baseline, task.output)))
    return {**row, "rounds": len(found)}


def _ratio(ones: list[Result] | None, others: list[Result] | None, key: str = "images_per_s") -> float | None:
    """Median over the rounds of one's figure over the other's in the same round; None where a round lacks either."""
    if not ones or not others or len(ones) != len(others) or any("error" in result for result in ones + others):
        return None
    return statistics.median(one[key] / other[key] for one, other in zip(ones, others, strict=True))
