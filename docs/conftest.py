"""Which Python files of the site are no tests."""

import importlib.util

collect_ignore = ["conf.py", "guide/more_than_one_device.md"]  # the guide runs in tests/mesh
if importlib.util.find_spec("sphinx") is None:  # the extra `docs` brings it
    collect_ignore += ["_ext"]
