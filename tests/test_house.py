"""The house rules: imports go one way, public names are documented, nothing is left open.

CONTRIBUTING.md has the floor plan.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_extra

ROOT = Path(flax_extra.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ROOMS = [
    "combinator/_core",
    "combinator/_cache",
    "combinator/_words",
    "combinator/_views",
    "combinator/_diagram",
    "combinator/_stream",
    "combinator/_surgery",
    "combinator",
    "layer",
    "testing",
    "",
]
"""The folders of the package. Each may import from those above it, and none from those below."""

LINEN = "combinator/_core/linen.py"
"""The one file that uses internals of linen."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(path: Path) -> str:
    folder = path.parent.relative_to(ROOT).as_posix()
    return "" if folder == "." else folder


def known_module(name: str) -> str:
    """The module of the package that a dotted name is in, or nothing."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imported_by(path: Path) -> set[str]:
    """The modules of the package that a file imports, also for type checkers alone.

    A package whose face is imported stands for its ``__init__.py``.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {known for known in map(known_module, names) if known}
    return found - {module_of(path)}


GRAPH = {name: imported_by(path) for name, path in MODULES.items()}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if circle := visit(other, [*way, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := visit(name, []):
            return circle
    return []


def test_there_is_no_circle_of_imports():
    # The face of the library imports `testing` on demand; nothing imports the face.
    assert find_circle(GRAPH) == []


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = ROOMS.index(room_of(path))
    for module in GRAPH[module_of(path)]:
        assert ROOMS.index(room_of(MODULES[module])) <= here, f"{path.name} imports {module}"
    if room_of(path) == "layer":  # a layer uses what users use
        assert not [m for m in GRAPH[module_of(path)] if m.startswith("flax_extra.combinator._")]


def test_every_folder_has_its_place():
    assert {room_of(path) for path in FILES} == set(ROOMS)


LINEN_INTERNALS = re.compile(
    r"\b(flax\.core|flax\.linen\.module|flax\.linen\.transforms|linen_module|SetupState|_state\b"
    r"|_context\b|_unspecified_parent|_register_submodules|_name_taken|_try_setup|_deep_clone"
    r"|_reset_names|autoname_cursor|reservations|_mutable_collection|_caches|DenseParams"
    r"|\.nowrap\s*=|scope\._)"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_internals_of_linen_are_used_in_one_file(path):
    if path.relative_to(ROOT).as_posix() == LINEN:
        return
    code = "\n".join(
        ast.unparse(node)
        for node in ast.parse(path.read_text()).body
        if not isinstance(node, ast.Expr)
    )
    found = LINEN_INTERNALS.search(code)
    assert found is None, f"{found and found[0]} is an internal of linen: use it in {LINEN}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_assert_and_nothing_left_open(path):
    text = path.read_text()
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
        assert word not in text
    assert ast.get_docstring(ast.parse(text)), "every file says why it exists"


def test_importing_the_library_needs_no_test_tools():
    code = (
        "import sys; sys.modules['hypothesis'] = None; import flax_extra; "
        "from flax_extra import combinator as cb; print(cb.serial(abs)(-1))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "1\n"


def public_packages():
    return [importlib.import_module(f"flax_extra.{name}") for name in flax_extra.__all__]


def public_names():
    return [(package, name) for package in public_packages() for name in package.__all__]


@pytest.mark.parametrize(
    ("package", "name"), public_names(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_public_name_has_a_docstring(package, name):
    value = getattr(package, name)
    doc = inspect.getdoc(value)
    assert doc
    if not inspect.isclass(value) and callable(value):
        for part in ("Args:" if inspect.signature(value).parameters else "", "Returns:", ">>> "):
            assert part in doc, f"{name} has no {part}"
    elif inspect.isclass(value):
        # A class of the vocabulary points to the function that builds it, which has the example.
        assert ">>> " in doc or "See :func:" in doc


@pytest.mark.parametrize(
    ("package", "name"), public_names(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_public_method_has_a_docstring(package, name):
    value = getattr(package, name)
    if inspect.isclass(value) and value.__module__.startswith("flax_extra"):
        for method, member in vars(value).items():
            if (
                not method.startswith("_")
                and inspect.isfunction(member)
                and member.__qualname__.startswith(name)
            ):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


RIDDLES = [
    ("where a constructor", "is none"),
    ("By this name a policy can keep", "what was found"),
    ("And so they are with", "no more than"),
    ("under the eyes of", "who watches"),
    ("takes for policy", "what is callable"),
    ("as the day", "may be"),
    ("the oldest that", "are asked for"),
]
"""Sentences that had to be read twice, in halves, so that a search does not find them here."""


@pytest.mark.parametrize("halves", RIDDLES)
def test_riddles_stay_out(halves):
    sentence, root = " ".join(halves), ROOT.parent
    pages = [*FILES, *(root / "docs").rglob("*.md"), root / "README.md", root / "CHANGELOG.md"]
    assert [str(page) for page in pages if sentence in " ".join(page.read_text().split())] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_raises_sections_say_if(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node) or ""
            for entries in re.findall(r"Raises:\n((?:    .*\n?)+)", doc):
                for kind, reason in re.findall(r"^    (\w+): (.*)", entries, re.MULTILINE):
                    assert reason.startswith("If "), f"{node.name}: {kind}: {reason}"
