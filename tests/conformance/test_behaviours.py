"""`docs/behaviours.md` is honest: every promise names a test that exists."""

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "behaviours.md"
ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<tests>`[^|]+`) \|$")


def rows() -> list[tuple[str, str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    lines = [line for line in lines if not re.fullmatch(r"[|\- ]+", line) and "| Promise |" not in line]
    found = []
    for line in lines:
        match = ROW.match(line)
        assert match, f"not a row of `| promise | `tests/file.py::test` |`: {line}"
        found.extend((match["promise"], test) for test in re.findall(r"`([^`]+)`", match["tests"]))
    return found


@cache
def named_in(file: str) -> frozenset[str]:
    path = ROOT / file
    assert path.is_file(), f"{file} does not exist"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            names.update(f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            names.add(node.name)
        elif isinstance(node, ast.Assign):  # a hypothesis state machine: TestOutbox = Machine.TestCase
            names.update(t.id for t in node.targets if isinstance(t, ast.Name) and t.id.startswith("Test"))
    return frozenset(names)


def test_the_page_makes_promises() -> None:
    assert len(rows()) >= 30


@pytest.mark.parametrize(("promise", "test"), rows())
def test_each_promise_names_a_test_that_exists(promise: str, test: str) -> None:
    file, _, name = test.partition("::")
    assert name in named_in(file), f"{promise!r}: no {name} in {file}"


def test_no_promise_is_made_twice() -> None:
    promises = [match["promise"] for line in PAGE.read_text().splitlines() if (match := ROW.match(line))]
    assert len(set(promises)) == len(promises)
