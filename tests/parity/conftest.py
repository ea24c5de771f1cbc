"""These tests compare with `rfdetr`; where it is not installed (it needs transformers >= 5.1) they are not collected."""

import importlib.util

if importlib.util.find_spec("rfdetr") is None:
    collect_ignore_glob = ["test_*.py"]
