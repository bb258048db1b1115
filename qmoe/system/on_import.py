"""Something to do as soon as another module is imported, without importing it now.

`import qmoe` has to tell transformers of qmoe's quantizer, and must not wait for transformers.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call `act` once: now if the module of that name is there already, or else right after it has
    been executed. Python's own finders find the module; nothing of it is changed."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting(MetaPathFinder):
    def __init__(self, name: str, act: Callable[[], object]):
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.act()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
