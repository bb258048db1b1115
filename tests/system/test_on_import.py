"""Acting as soon as another module is imported."""

import importlib
import sys

from qmoe.system.on_import import when_imported


def test_it_is_called_once_and_after_the_module(tmp_path, monkeypatch):
    (tmp_path / "qmoe_test_late.py").write_text("ready = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    seen = []
    when_imported("qmoe_test_late", lambda: seen.append(sys.modules["qmoe_test_late"].ready))
    assert not seen
    module = importlib.import_module("qmoe_test_late")
    assert seen == [True] and sys.meta_path == finders
    importlib.reload(module)
    assert seen == [True]
    when_imported("qmoe_test_late", lambda: seen.append("now"))
    assert seen == [True, "now"] and sys.meta_path == finders
    del sys.modules["qmoe_test_late"]


def test_a_module_that_is_not_there_stays_an_import_error(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("qmoe_test_missing", lambda: None)
    assert importlib.util.find_spec("qmoe_test_missing") is None
