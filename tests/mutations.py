"""Each formula broken in turn: which changes of the code does no test notice?

    python tests/mutations.py lnp/estimators lnp/results --jobs 2

A mutant is one module with one change: another operator, constant or comparison, a term or a root left out, a condition
turned round. The tests are collected once and run once under coverage, so that a mutant is given to those tests only
that run its line, first those that are fast and run little else, until one of them fails. Each mutant lives in a
process of its own, forked after collection: a function's code is replaced in memory, no file is touched. Code that runs
at import (constants, defaults, and functions that these call) is imported anew. Survivors are printed as they are
found; those in tests/equivalent_mutants.txt, which change no result, are left out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import coverage
import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/core", "tests/properties/test_numpy.py", "tests/contract/test_numpy.py", "lnp")
OPTIONS = ("-c", "pyproject.toml", "--doctest-modules", "-q", "-s", "-p", "no:cacheprovider", "-m", "not thorough")
OPTIONS += ("-W", "ignore::pytest.PytestAssertRewriteWarning")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
LONGEST_SHOWN = 100
"""Characters of an expression that is shown for a constant in it."""
LIMIT = 90
"""Seconds after which a mutant counts as noticed: it does not end."""
NOT_STARTED, SURVIVED = 70, 99
"""Exit statuses of a process that could not put its mutant in place, and of a new interpreter whose tests all pass."""

OTHER_OPERATOR = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitAnd,
}  # fmt: skip
OTHER_COMPARISON = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OTHER_FUNCTION = {
    "maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "any": "all", "all": "any",
    "mean": "sum", "sum": "mean", "floor": "ceil", "ceil": "floor",
}  # fmt: skip
LEFT_OUT = ("sqrt", "abs", "exp", "log", "square", "real", "conj", "sorted")
"""Functions of which only the argument is kept."""
LOOKS = {"alpha", "fontsize", "linewidth", "markersize", "markeredgewidth", "xytext", "linthresh", "linscale", "pad"}
"""Arguments that say how a figure looks, which people judge by looking at it."""
AMOUNTS = {"dtypes"}
"""Arguments that say how much is checked."""
GUARDS = {"strict"}
"""Arguments that guard as an assertion does."""
SPLIT = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    line: int
    where: str
    change: str
    tree: ast.Module
    at_import: bool = False

    @property
    def place(self) -> str:
        return f"{self.module}.{self.where}" if self.where else self.module

    def __str__(self) -> str:
        return f"{self.place}: {self.change}"


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """All mutants of a module."""
    tree = ast.parse(source)
    for path, node, where, at_import in walk(tree, (), ""):
        for changed in changes(node):
            made = with_change(tree, path, changed)
            number = isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)
            shown = where_shown(tree, path) if number else path
            if ast.unparse(changed) == "2" and of_reshape(at(tree, shown)):
                continue  # any negative length is the one that is left
            text = " -> ".join(" ".join(ast.unparse(at(root, shown)).split()) for root in (tree, made))
            yield Mutant(module, node.lineno, where, text, made, at_import)


def of_reshape(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("reshape")


def where_shown(tree: ast.Module, path: tuple) -> tuple:
    """The way to the expression that a constant is part of, which says more than the constant does."""
    for end in range(len(path) - 1, 0, -1):
        around = at(tree, path[:end])
        if isinstance(around, ast.BinOp | ast.Call | ast.Compare | ast.IfExp | ast.Subscript):
            return path[:end] if len(ast.unparse(around)) <= LONGEST_SHOWN else path
        if not isinstance(around, ast.expr | ast.keyword | ast.slice):
            break
    return path


def at(node: ast.AST, path: tuple) -> ast.AST:
    """The node at the end of the path."""
    for name, index in path:
        value = getattr(node, name)
        node = value if index is None else value[index]
    return node


def walk(node: ast.AST, path: tuple, where: str, at_import: bool = True) -> Iterator[tuple[tuple, ast.AST, str, bool]]:
    """All nodes with the way to them, the function that they are in, and whether they run at import, as constants and
    defaults do; texts, annotations, errors, looks and amounts left out.
    """
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}".strip(".")
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr | ast.Assert):
                continue
            if isinstance(child, ast.keyword) and child.arg in (LOOKS | AMOUNTS | GUARDS):
                continue
            key = node.keys[index] if isinstance(node, ast.Dict) and name == "values" else None
            if isinstance(key, ast.Constant) and key.value in LOOKS:
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            step = (*path, (name, index))
            now = at_import and not (name == "body" and isinstance(node, ast.FunctionDef | ast.Lambda))
            if hasattr(child, "lineno"):
                yield step, child, where, now
            yield from walk(child, step, where, now)


def with_change(tree: ast.Module, path: tuple, changed: ast.AST) -> ast.Module:
    """A copy of the tree with another node at the end of the path."""
    made = copy.copy(tree)
    node = made
    for i, (name, index) in enumerate(path):
        last = i == len(path) - 1
        value = getattr(node, name)
        child = changed if last else copy.copy(value if index is None else value[index])
        setattr(node, name, child if index is None else [*value[:index], child, *value[index + 1 :]])
        node = child
    return made


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node is broken to."""
    made: list[ast.AST] = []
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in OTHER_OPERATOR and not isinstance(left, ast.Constant | ast.JoinedStr):
                made = [ast.BinOp(left, OTHER_OPERATOR[type(op)](), right)]
            made += [left] if isinstance(op, SPLIT) else []
            made += [right] if isinstance(op, ast.Add) else []
            if any(isinstance(part, ast.JoinedStr) or is_text(part) for part in (left, right)):
                made = []
        case ast.AugAssign(target, op, value) if type(op) in OTHER_OPERATOR:
            made = [ast.AugAssign(target, OTHER_OPERATOR[type(op)](), value)]
        case ast.Compare(left, [op], right):
            made = [ast.Compare(left, [other()], right) for other in OTHER_COMPARISON[type(op)]]
        case ast.BoolOp(op, values):
            made = [ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)]
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            made = [operand]
        case ast.Constant(value):
            made = [ast.Constant(other) for other in other_values(value)]
        case ast.If(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            made = [ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)]
        case ast.IfExp(test, body, orelse):
            made = [ast.IfExp(test, orelse, body)]
        case ast.Call(function, arguments, keywords):
            made = list(other_calls(function, arguments, keywords))
    return (ast.fix_missing_locations(ast.copy_location(new, node)) for new in made)


def other_values(value: object) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    return [value * 1.5 or 1.0] if isinstance(value, float) else []


def other_calls(function: ast.expr, arguments: list, keywords: list) -> Iterator[ast.expr]:
    """Another function of the same arguments, or one argument alone."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in OTHER_FUNCTION:
        other = copy.copy(function)
        setattr(other, "attr" if isinstance(function, ast.Attribute) else "id", OTHER_FUNCTION[name])
        if isinstance(function, ast.Attribute) or name not in ("sum", "mean"):
            yield ast.Call(other, arguments, keywords)
    if name in LEFT_OUT and arguments and not isinstance(arguments[0], ast.Starred | ast.GeneratorExp):
        yield arguments[0]
    if name == "where" and len(arguments) == 3:
        yield ast.Call(function, [arguments[0], arguments[2], arguments[1]], keywords)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and all inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def place_of(code: types.CodeType) -> tuple:
    """Where a function stands, by columns as well: a line may hold two lambdas."""
    return code.co_qualname, code.co_firstlineno, code.co_linetable


def replace_code(mutant: Mutant) -> bool:
    """Put a mutant's code into the functions that are there; False where the change is in code that ran at import.

    That is not told by the code itself: a function that has run differs from the same one compiled anew.
    """
    if mutant.at_import:
        return False
    file = Path(sys.modules[mutant.module].__file__)
    before = list(codes(compile(file.read_text(encoding="utf-8"), file, "exec")))
    after = list(codes(compile(mutant.tree, file, "exec")))
    if len(before) != len(after):
        return False
    made = {place_of(old): new for old, new in zip(before, after, strict=True)}
    replaced = False
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__module__ == mutant.module:
            new = made.get(place_of(function.__code__))
            if new is not None and function.__code__ != new:
                try:
                    function.__code__ = new
                except ValueError:  # other free variables
                    return False
                replaced = True
    return replaced


class Imported:
    """Finds one module as a mutant has it."""

    def __init__(self, name: str, tree: ast.Module):
        self.name, self.tree = name, tree

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        code = compile(self.tree, spec.origin, "exec")
        spec.loader.get_code = lambda _: code
        return spec


class Check:
    """Runs the mutants in the place of the tests, once those are collected."""

    def __init__(self, chosen: list[Mutant], jobs=1, kept: Path | None = None, one: Path | None = None, longest=5.0):
        self.mutants, self.jobs, self.kept, self.one, self.longest = chosen, jobs, kept, one, longest
        self.equivalent = known_equivalents()
        self.survivors: list[Mutant] = []
        self.durations: dict[str, float] = {}
        self.lines: Counter[str] = Counter()
        self.known_costs: dict[str, dict[str, float]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        self.items = {item.nodeid: item for item in session.items}
        if self.one is not None:
            os._exit(1 if self.notices(json.loads(self.one.read_text())) else SURVIVED)
        tests, durations = self.recorded()
        imported = run_at_import([name for name in sys.modules if name.partition(".")[0] == "lnp"])
        self.refuse_failing_tests(tests, durations)
        running: dict[int, Mutant] = {}
        started, done = time.monotonic(), 0
        for mutant in self.mutants:
            mutant = replace(mutant, at_import=mutant.at_import or mutant.line in imported[mutant.module])
            ran = None if mutant.at_import else tests[mutant.module].get(mutant.line)
            ran = ran or set().union(*tests[mutant.module].values())
            cost = self.costs(mutant.module, tests, durations)
            given = limited(sorted(ran, key=cost.__getitem__), durations, self.longest)
            while len(running) >= self.jobs:
                done += self.finished(running)
            running[self.start(mutant, given)] = mutant
            if done and done % 200 == 0:
                print(f"{done} of {len(self.mutants)}, {time.monotonic() - started:.0f} s", file=sys.stderr)
        while running:
            self.finished(running)
        return True

    def costs(
        self, module: str, tests: dict[str, dict[int, set[str]]], durations: dict[str, float]
    ) -> dict[str, float]:
        """{test: its duration over the share of the lines it runs that lie in this module}."""
        if module not in self.known_costs:
            inside = Counter(name for names in tests[module].values() for name in names)
            self.known_costs[module] = {
                name: (durations.get(name, 0.0) + 1e-3) * self.lines[name] / inside[name] for name in inside
            }
        return self.known_costs[module]

    def refuse_failing_tests(self, tests: dict[str, dict[int, set[str]]], durations: dict[str, float]) -> None:
        """Code without a change has to pass, or each mutant of it would count as noticed."""
        for number, (module, by_line) in enumerate(tests.items()):
            given = limited(sorted(set().union(*by_line.values()), key=durations.get), durations, 1.0)
            source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
            for at_import in (False, True) if number == 0 else (False,):  # a new interpreter takes seconds
                pid = self.start(Mutant(module, 0, "", "unchanged", ast.parse(source), at_import), given)
                if os.waitpid(pid, 0)[1]:
                    raise RuntimeError(f"tests of {module} fail without a change: one of {given}")

    def finished(self, running: dict[int, Mutant]) -> int:
        pid, status = os.wait()
        mutant = running.pop(pid)
        if os.waitstatus_to_exitcode(status) == NOT_STARTED:
            raise RuntimeError(f"{mutant} was not put in place")
        if status == 0 and not {str(mutant), f"{mutant.place}: *"} & self.equivalent:
            self.survivors.append(mutant)
            print(f"{mutant.line:4d}  {mutant}", flush=True)
        return 1

    def start(self, mutant: Mutant, given: list[str]) -> int:
        """A process that ends with 0 if no test notices the mutant."""
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT)
            replaced = replace_code(mutant)
            silence()
        except BaseException:
            traceback.print_exc()
            os._exit(NOT_STARTED)
        try:
            os._exit(1 if (self.notices(given) if replaced else imported_anew(mutant, given)) else 0)
        except BaseException:  # an exception that is no test's failure, such as SystemExit: noticed
            os._exit(1)

    def notices(self, given: list[str]) -> bool:
        """Whether one of the tests fails."""
        self.failed = False
        if not given:
            return False
        for name, following in zip(given, [*given[1:], None], strict=True):
            item, after = self.items[name], self.items.get(following)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if self.failed:
                return True
        return False

    def pytest_runtest_logreport(self, report):
        self.failed = report.failed or getattr(self, "failed", False)
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration

    def recorded(self) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
        """{module: {line: tests that run it}}, and how long each test takes; from a process of its own."""
        folder = Path(tempfile.mkdtemp()) if self.kept is None else self.kept
        if not Path(sys.modules["lnp"].__file__).is_relative_to(ROOT):
            raise RuntimeError(f"lnp is imported from {sys.modules['lnp'].__file__}, not from {ROOT}")
        if not (folder / "durations").exists():
            folder.mkdir(parents=True, exist_ok=True)
            pid = os.fork()
            if not pid:
                silence()
                self.record(folder)
                os._exit(0)
            os.waitpid(pid, 0)
        data = coverage.CoverageData(str(folder / "data"))
        data.read()
        for file in data.measured_files():
            self.lines.update(name for names in data.contexts_by_lineno(file).values() for name in names if name)
        found: dict[str, dict[int, set[str]]] = defaultdict(dict)
        for module in {mutant.module for mutant in self.mutants}:
            file = sys.modules[module].__file__
            lines = data.contexts_by_lineno(file)
            found[module] = {line: {name for name in names if name} for line, names in lines.items()}
            if not any(found[module].values()):  # it runs at import alone: the tests of what lies beside it
                beside = [data.contexts_by_lineno(other) for other in data.measured_files() if in_folder(other, file)]
                found[module][0] = {name for lines in beside for names in lines.values() for name in names if name}
        return found, json.loads((folder / "durations").read_text())

    def record(self, folder: Path) -> None:
        """Run all tests once under coverage, each as a context."""
        watched = coverage.Coverage(data_file=str(folder / "data"), source=[str(ROOT / "lnp")], config_file=False)
        watched.start()
        for item in self.items.values():
            watched.switch_context(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        watched.stop()
        watched.save()
        (folder / "durations").write_text(json.dumps(self.durations))


def in_folder(file: str, of: str) -> bool:
    return Path(file).is_relative_to(Path(of).parent)


def run_at_import(modules: list[str]) -> dict[str, set[int]]:
    """{module: lines that run when these modules are imported}, also those of functions that run then."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "data"))
        lines = f"watched = coverage.Coverage(data_file={file!r}, source=[{str(ROOT / 'lnp')!r}], config_file=False)"
        imports = "; ".join(f"import {name}" for name in modules)
        code = f"import coverage; {lines}; watched.start(); {imports}; watched.stop(); watched.save()"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
        data = coverage.CoverageData(file)
        data.read()
        return {name: set(data.lines(sys.modules[name].__file__) or ()) for name in modules}


def silence() -> None:
    """Nothing that this process prints is seen."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def limited(names: list[str], durations: dict[str, float], longest: float) -> list[str]:
    total, chosen = 0.0, []
    for name in names:
        total += durations.get(name, 0.0)
        if total > longest and chosen:
            break
        chosen.append(name)
    return chosen


def imported_anew(mutant: Mutant, given: list[str]) -> bool:
    """Whether a test fails in a fresh interpreter that imports the mutant."""
    if not given:
        return False
    with tempfile.TemporaryDirectory() as folder:
        code, tests = Path(folder, "mutant.py"), Path(folder, "tests")
        code.write_text(ast.unparse(mutant.tree), encoding="utf-8")
        tests.write_text(json.dumps(given))
        command = [sys.executable, __file__, "--one", mutant.module, str(code), str(tests)]
        ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=LIMIT - 10)
        return ended.returncode != SURVIVED


def known_equivalents() -> set[str]:
    """Mutants that change no result, each on a line, with the reason behind two spaces and a #; a * for all of a
    function.
    """
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else []
    return {line.partition("  #")[0] for line in lines}


def run(check: Check, tests: tuple[str, ...]) -> int:
    os.chdir(ROOT)
    hypothesis.settings.register_profile(
        "mutants", deadline=None, database=None, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
    )
    return pytest.main([*OPTIONS, "--hypothesis-profile=mutants", *tests], plugins=[check])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["lnp/estimators", "lnp/results", "lnp/spectral", "lnp/runs"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--every", type=int, default=1, help="only each so-many-th mutant")
    parser.add_argument("--first", type=int, default=0, help="from which on: others than in an earlier run")
    parser.add_argument("--at-import", action="store_true", help="only constants and defaults")
    parser.add_argument("--longest", type=float, default=5, help="seconds of tests that a mutant is given to")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is given, in the place of the core's")
    parser.add_argument("--again", type=Path, help="only the mutants that this file has, as they were printed")
    parser.add_argument("--kept", type=Path, help="folder for what coverage records, to be used again")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        module, code, tests = options.one
        sys.meta_path.insert(0, Imported(module, ast.parse(Path(code).read_text(encoding="utf-8"))))
        importlib.import_module(module)  # with its package, of which pytest, given a file, imports one module
        names = json.loads(Path(tests).read_text())
        return run(Check([], one=Path(tests)), tuple(dict.fromkeys(name.partition("::")[0] for name in names)))
    given = [ROOT / path for path in options.paths]
    files = [file for path in given for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    found = []
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += mutants(module, file.read_text(encoding="utf-8"))
    found = [mutant for mutant in found if mutant.at_import or not options.at_import]
    chosen = found[options.first :: options.every]
    if options.again:
        printed = {line.strip().partition("  ")[2] for line in options.again.read_text(encoding="utf-8").splitlines()}
        chosen = [mutant for mutant in chosen if str(mutant) in printed]
    check = Check(chosen, options.jobs, options.kept, longest=options.longest)
    run(check, tuple(options.tests))
    print(f"{len(check.mutants)} mutants, of which {len(check.survivors)} survive and are not known as equivalent")
    return 1 if check.survivors else 0


if __name__ == "__main__":
    sys.exit(main())
