"""Builds a release and tries it as a user gets it: ``make release-check``.

The sdist must hold the files that git tracks, the wheel the package alone. The wheel is installed
in an empty environment and used from an empty folder, where nothing of the checkout can be found.
The artefacts are built in a temporary folder; nothing is left behind.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGE = "flax_extra"

FIRST_USE = """
import flax_extra
import jax
from flax import linen as nn
from flax_extra import combinator as cb, layer as xn

attention = cb.residual(nn.LayerNorm(), cb.fn(xn.SelfAttention(n_heads=2), mask=None))
encoder = nn.Embed(16, 8) >> cb.repeat(attention, 2) >> nn.LayerNorm()
tokens = jax.numpy.zeros((2, 5), int)
y, variables = encoder.init_with_output(jax.random.key(0), tokens)
assert y.shape == (2, 5, 8), y.shape
assert cb.shape_signature(encoder, "i32[b, t]") == "i32[b, t] -> f32[b, t, 8]"
print(flax_extra.__version__, flax_extra.__file__)
"""

WITHOUT_HYPOTHESIS = """
import flax_extra
try:
    flax_extra.testing
except ImportError as error:
    print(error)
"""


def main() -> int:
    """Runs all checks; says what is wrong with the first that fails."""
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    tracked = set(_output("git", "ls-files", cwd=PROJECT).splitlines())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("building the sdist, and from it the wheel")
        _output(sys.executable, "-m", "build", "--outdir", folder / "dist", PROJECT)
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        (wheel,) = (folder / "dist").glob("*.whl")
        check_sdist(sdist, tracked)
        check_wheel(wheel, tracked)
        print("installing the wheel in an empty environment")
        python = install(wheel, folder / "environment")
        check_use(python, folder, version)
    print(f"{wheel.name} and {sdist.name} are as they should be")
    return 0


def check_sdist(sdist: Path, tracked: set[str]) -> None:
    """The sdist holds what git tracks, and the metadata that every sdist has."""
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.partition("/")[2] for name in members}
    _check_same(sdist.name, names, tracked | {"PKG-INFO"})


def check_wheel(wheel: Path, tracked: set[str]) -> None:
    """The wheel holds the package as git tracks it, its metadata and the license."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    _check_same(wheel.name, names - about, {n for n in tracked if n.startswith(f"{PACKAGE}/")})
    _check_same(
        f"the metadata in {wheel.name}",
        {name.partition("/")[2] for name in about},
        {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"},
    )
    if f"{PACKAGE}/py.typed" not in names:
        raise SystemExit(f"{wheel.name} has no py.typed, so that type checkers ignore its types.")


def install(wheel: Path, environment: Path) -> Path:
    """An environment with the wheel and its dependencies; its Python."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    _output(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", wheel)
    return python


def check_use(python: Path, folder: Path, version: str) -> None:
    """The installed package runs, and says what to install where something is missing."""
    (folder / "elsewhere").mkdir()
    printed = _output(python, "-I", "-c", FIRST_USE, cwd=folder / "elsewhere").strip()
    found, _, path = printed.partition(" ")
    if found != version:
        raise SystemExit(f"flax_extra.__version__ is {found}; pyproject.toml says {version}.")
    if not Path(path).is_relative_to(folder):
        raise SystemExit(f"flax_extra was imported from {path}, which is not the environment.")
    said = _output(python, "-I", "-c", WITHOUT_HYPOTHESIS, cwd=folder / "elsewhere")
    if "pip install 'flax_extra[test]'" not in said:
        raise SystemExit(f"flax_extra.testing without hypothesis does not say what to do: {said!r}")


def _check_same(where: str, names: Iterable[str], expected: Iterable[str]) -> None:
    extra, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    if extra or missing:
        raise SystemExit(
            f"{where} does not hold the files that it should.\n"
            f"  not tracked by git, or not part of it: {', '.join(extra) or 'none'}\n"
            f"  missing: {', '.join(missing) or 'none'}\n"
            "  See [tool.hatch.build] in pyproject.toml; run git add for new files."
        )


def _output(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
