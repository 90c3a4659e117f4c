"""What a release says of itself. ``make release-check`` builds one and tries it on its own."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import flax_extra

PROJECT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_project():
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert flax_extra.__version__ == declared


def test_a_package_that_is_not_installed_says_so(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    message = (
        "flax_extra.__version__ is read from the metadata of the installed package. There is none, "
        f"since flax_extra was imported from {PROJECT} without being installed. Install it: "
        f"pip install --editable {PROJECT}"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        _ = flax_extra.__version__
