"""The house rules: imports go one way, public names are documented, nothing is left open."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flax_extra

ROOT = Path(flax_extra.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# design.md, section 10: each file imports only from those above it.
ORDER = [
    "_errors",
    "_signature",
    "_stack",
    "_hints",
    "_inference",
    "_children",
    "_expression",
    "_binding",
    "_frame",
    "_run",
    "_base",
    "_leaf",
    "_flow",
    "_shuffle",
    "_merge",
    "_derived",
    "_lift",
    "_layers",
    "_specs",
    "_record",
    "_shapes",
    "_summary",
    "_columns",
    "_captions",
    "_picture",
    "_draft",
    "_wiring",
    "_diagram",
    "__init__",
]
TESTING_ORDER = [
    "_errors",
    "_axes",
    "_annotations",
    "_search",
    "_abstract",
    "_inputs",
    "_shapes",
    "_signature",
    "_strategies",
    "_programs",
    "_laws",
    "__init__",
]
ORDERS = {"combinator": ORDER, "testing": TESTING_ORDER}
PACKAGES = ["combinator", "layer", "testing"]


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports when it is run."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax_extra"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if _is_module(whole) else str(node.module))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    names.discard(str(inner.module))
    return names


def _is_module(name: str) -> bool:
    path = ROOT.parent / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("package", ORDERS)
def test_every_file_of_a_package_has_its_place(package):
    assert {path.stem for path in (ROOT / package).glob("*.py")} == set(ORDERS[package])


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, order in ORDERS.items() for name in order]
)
def test_imports_within_a_package_go_down_the_list(package, name):
    above = ORDERS[package][: ORDERS[package].index(name)]
    for module in imported(ROOT / package / f"{name}.py"):
        whole = f"flax_extra.{package}."
        if package == "combinator" or module.startswith(whole):
            assert module.rpartition(".")[2] in above, f"{name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_one_way(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if package == "__init__":
        return
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    for module in imported(path):
        assert module.split(".")[1] in allowed, module


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
