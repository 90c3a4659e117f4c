"""CONTRIBUTING.md names files and targets that exist."""

import re
from pathlib import Path

import pytest

from flax_extra import combinator as cb
from flax_extra import testing

PROJECT = Path(__file__).parents[1]
TEXT = (PROJECT / "CONTRIBUTING.md").read_text()
FILES = sorted(set(re.findall(r"`((?:\.ci|docs|flax_extra|tests)/[\w/.]+)`", TEXT)))
TARGETS = sorted(set(re.findall(r"make ([a-z-]+)`", TEXT)))
OURS = {"cb": cb, "testing": testing}
NAMES = sorted(set(re.findall(r"`((?:cb|testing)\.\w+)`", TEXT)))


@pytest.mark.parametrize("path", FILES)
def test_files_exist(path):
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("target", TARGETS)
def test_targets_exist(target):
    assert re.search(rf"^{target}:.*## ", (PROJECT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name):
    module, _, attribute = name.partition(".")
    assert hasattr(OURS[module], attribute)


def test_there_is_something_to_check():
    assert len(FILES) > 10
    assert len(TARGETS) > 5
    assert NAMES


def test_every_target_of_the_makefile_is_in_its_help():
    makefile = (PROJECT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert phony == re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
