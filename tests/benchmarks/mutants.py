"""The mutants of a source file: each is the file with one small fault in one place.

The operators are mutmut's; four more are here. mutmut's own runner is not used: it copies functions behind trampolines,
which leaves out every decorated function and all module-level code, and it forks after the tests have been imported.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst import matchers as m
from mutmut.mutation.mutators import mutation_operators


@dataclass(frozen=True)
class Mutant:
    """One fault. Its key depends on the text of its place, not on the line's number."""

    path: str
    function: str
    key: str
    line: int
    before: str
    after: str
    source: str
    lines: frozenset[int]
    """Lines of the original file: a test that runs none of them can hardly notice."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.function}: {self.before} => {self.after or '(dropped)'}"


@dataclass(frozen=True)
class Place:
    """A node that can be replaced, with the replacement chosen for it."""

    path: str
    function: str
    key: str
    module: cst.Module
    old: cst.CSTNode
    new: cst.CSTNode

    def mutant(self) -> Mutant:
        before, source = self.module.code, self.module.deep_replace(self.old, self.new).code
        old, new = before.splitlines(), source.splitlines()
        changes = [
            code for code in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes() if code[0] != "equal"
        ]
        removed = [i for _, i1, i2, _, _ in changes for i in range(i1, i2)]
        added = [j for _, _, _, j1, j2 in changes for j in range(j1, j2)]
        first = changes[0][1] + 1
        return Mutant(
            self.path, self.function, self.key, first, " ".join(old[i].strip() for i in removed),
            " ".join(new[j].strip() for j in added), source, frozenset(i + 1 for i in removed) or frozenset({first}),
        )  # fmt: skip


def places(root: Path, path: str) -> list[Place]:
    """Every place of a file where an operator applies: one mutant for each node and operator, in the file's order.

    Left out: annotations, decorators, imports, type aliases, docstrings, and prose (a string with a space in it).
    """
    finder = _Finder(path, cst.parse_module((root / path).read_text()))
    finder.module.visit(finder)
    return finder.found


def negated(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def dropped(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    if m.matches(node, m.SimpleStatementLine([m.Raise() | m.Expr(m.Call() | m.Yield())])):
        yield node.with_changes(body=[cst.Pass()])


def returns_none(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not m.matches(node.value, m.Name("None")):
        yield node.with_changes(value=cst.Name("None"), whitespace_after_return=cst.SimpleWhitespace(" "))


def one_less(node: cst.Integer) -> Iterator[cst.CSTNode]:
    if node.evaluated_value > 0:
        yield node.with_changes(value=str(node.evaluated_value - 1))


OPERATORS: list[tuple[Any, Callable[[Any], Any]]] = [
    *mutation_operators,
    (cst.If, negated),
    (cst.While, negated),
    (cst.SimpleStatementLine, dropped),
    (cst.Return, returns_none),
    (cst.Integer, one_less),
]
_SKIPPED = (
    m.Annotation()
    | m.Decorator()
    | m.Import()
    | m.ImportFrom()
    | m.Assign(value=m.Subscript(m.Name("Literal")))
    | m.Call(m.Name("cast") | m.Name("TypeVar"))
    | m.Expr(m.SimpleString() | m.ConcatenatedString())
)


class _Finder(cst.CSTVisitor):
    def __init__(self, path: str, module: cst.Module) -> None:
        super().__init__()
        self.path, self.module = path, module
        self.found: list[Place] = []
        self._scope: list[str] = []
        self._seen: Counter[str] = Counter()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _SKIPPED) or (isinstance(node, cst.SimpleString) and " " in node.value):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scope.append(node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and (choices := [self._place(node, new, operator) for new in operator(node)]):
                self.found.append(min(choices, key=lambda place: place.key))
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scope.pop()

    def _place(self, old: cst.CSTNode, new: cst.CSTNode, operator: Callable[[Any], Any]) -> Place:
        function = ".".join(self._scope) or "(module)"
        text = [self.path, function, operator.__name__, *(self.module.code_for_node(node) for node in (old, new))]
        self._seen[name := "\0".join(text)] += 1
        key = hashlib.sha256(f"{name}\0{self._seen[name]}".encode()).hexdigest()[:12]
        return Place(self.path, function, key, self.module, old, new)
