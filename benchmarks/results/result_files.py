"""Results of the benchmark as they lie in files: the check of their form, and several runs made one.

The form is result.schema.json beside this file. A machine may carry what belongs to it alone (date, command, work,
kernels, features, masks, export), as after a merge; where it does not, the result's own are its.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError

SCHEMA = 1
"""Version of the form; readers refuse another one."""

KIND = "bench"

OF_A_MACHINE = ("date", "command", "work", "kernels", "features", "masks", "export")
"""What a merge moves from the result to the machine that it was measured on; older results have no masks."""

Result = dict[str, Any]


def read_result(path: Path) -> Result:
    """Reads a results file and checks its form.

    Raises:
        BenchError: missing, truncated, of another schema or kind, or with a value that the form does not allow.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise BenchError(f"{path}: no such file; pass a report.json that `neck-export bench` wrote") from None
    except OSError as error:
        raise BenchError(
            f"{path}: the file cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except ValueError as error:  # JSON and UTF-8 both
        raise BenchError(
            f"{path}: the file is not valid JSON ({error}); copy it again, or run `neck-export bench` again"
        ) from None
    except RecursionError:
        raise BenchError(
            f"{path}: the JSON is nested too deeply for a result; pass a report.json that `neck-export bench` wrote"
        ) from None
    check_result(result, str(path))
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the file contains the value {name}, which JSON does not allow")


def check_result(result: object, where: str) -> None:
    """Checks the form of a result.

    Args:
        result: what a file holds.
        where: the file, for the message.

    Raises:
        BenchError: saying what was found and what is expected.
    """
    if not isinstance(result, dict) or result.get("kind") != KIND:
        found = f"kind {result.get('kind')!r}" if isinstance(result, dict) else f"a JSON {type(result).__name__}"
        raise BenchError(
            f"{where}: the file is not a benchmark result (found {_short(found)}, expected kind {KIND!r}); pass a "
            "report.json that `neck-export bench` wrote"
        )
    if result.get("schema") != SCHEMA:
        found = _short(f"schema {result.get('schema')!r}")
        raise BenchError(
            f"{where}: the result has {found}, but this version of neck-export reads schema {SCHEMA}; use the "
            "version that wrote the file"
        )
    if not can_check():
        raise BenchError(
            f"{where}: checking the file needs jsonschema, which is not installed; run pip install jsonschema"
        )
    if problem := _problem(result, _schema()):
        raise BenchError(
            f"{where}: the file does not match benchmarks/results/result.schema.json ({problem}); run `neck-export "
            "bench` again"
        )
    _check_machines(result, where)


def can_check() -> bool:
    """Whether the library is there that checks a form; a bare GPU machine has none, and measures all the same."""
    return importlib.util.find_spec("jsonschema") is not None


def row_problem(row: Mapping[str, Any]) -> str | None:
    """What the schema does not allow in a row; None if the row is valid or cannot be checked."""
    schema = _schema()
    return _problem(row, {**schema["$defs"]["row"], "$defs": schema["$defs"]}) if can_check() else None


def _problem(value: object, schema: Mapping[str, Any]) -> str | None:
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
    from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

    error = best_match(Draft202012Validator(schema).iter_errors(value))
    if error is None:
        return None
    place = "/".join(str(part) for part in error.absolute_path) or "top level"
    return f"{place}: {_short(error.message)}"


def _check_machines(result: Result, where: str) -> None:
    known = [machine["id"] for machine in result["machines"]]
    if len(set(known)) < len(known):
        raise BenchError(
            f"{where}: several machines have the same id ({', '.join(known)}); give every entry in `machines` its own "
            "id"
        )
    for index, row in enumerate(result["rows"]):
        if row["machine"] not in known:
            raise BenchError(
                f"{where}: rows/{index}/machine is {row['machine']!r}, but must be one of {', '.join(known)}"
            )


def _short(message: str, most: int = 200) -> str:
    return message if len(message) <= most else f"{message[: most // 2]} ... {message[-most // 2 :]}"


@functools.cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("result.schema.json").read_text(encoding="utf-8"))
    return schema


def merge_results(results: Sequence[Result]) -> Result:
    """One result over several: machines numbered anew, every row kept.

    Args:
        results: two or more of the same encoder, size and batch, checked.

    Raises:
        BenchError: fewer than two, of different encoders, or the same runs twice.
    """
    if len(results) < 2:
        raise BenchError(
            f"--merge needs at least two report.json files, but the number of files passed is {len(results)}. Pass the "
            "path of every report.json file that is to be merged"
        )
    for index, other in enumerate(results[1:], 2):
        refuse_other_encoder(results[0], other, "result 1", f"result {index}")
    machines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    seen: list[object] = []
    for result in results:
        for machine in result["machines"]:
            own = [row for row in result["rows"] if row["machine"] == machine["id"]]
            runs = [machine["environment"], [{**row, "machine": None} for row in own]]
            if runs in seen:
                raise BenchError(
                    f"two of the report.json files to merge contain the same runs (machine {machine['name']}, date "
                    f"{result['date']}); pass only one of the files with this machine and date"
                )
            seen.append(runs)
            number = f"m{len(machines)}"
            machines.append(_self_contained(result, machine, number))
            rows += [{**copy.deepcopy(row), "machine": number} for row in own]
    first = results[0]
    commands = dict.fromkeys(machine["command"] for machine in machines)
    return {
        **copy.deepcopy(first),
        "date": max(result["date"] for result in results),
        "command": "\n".join(commands),
        "machines": machines,
        "rows": rows,
        "growth": _all_points(results),
    }


def _self_contained(result: Result, machine: dict[str, Any], number: str) -> dict[str, Any]:
    own = {key: of_machine(result, machine, key) for key in OF_A_MACHINE}
    return copy.deepcopy({**machine, **own, "id": number})


def _all_points(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every point of the closed form once, smallest first."""
    points = {(*point["image_size"], point["batch"]): point for result in results for point in result["growth"]}
    return [copy.deepcopy(points[key]) for key in sorted(points)]


def of_machine(result: Result, machine: dict[str, Any], key: str) -> Any:
    """A machine's value of a key of OF_A_MACHINE: its own, else the result's."""
    return machine.get(key, result.get(key))


def refuse_other_encoder(one: Result, other: Result, one_name: str, other_name: str) -> None:
    """Refuses two results that are not of the same encoder at the same size.

    Raises:
        BenchError: saying what differs.
    """
    left, right = one["encoder"], other["encoder"]
    differing = [key for key in dict.fromkeys((*left, *right)) if left.get(key) != right.get(key)]
    if differing:
        told = "; ".join(f"{key} {_told(left, right, key)}" for key in differing)
        raise BenchError(
            f"{one_name} and {other_name} come from different encoders ({told}); pass results of the same encoder, "
            "size and batch"
        )


def _told(left: dict[str, Any], right: dict[str, Any], key: str) -> str:
    one, other = left.get(key), right.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]
        return ", ".join(f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in keys)
    return f"{one!r} and {other!r}"
