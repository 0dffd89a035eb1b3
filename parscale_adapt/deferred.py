"""What waits until it is needed: the names of a package, and telling PEFT and transformers about the method.

Both need torch, transformers and PEFT, whose imports take seconds, and `parscale --help` has no use for them.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports its public names when they are first asked for (PEP 562).

    Args:
        package: `__name__` of the package.
        modules: every public name, and the module of the package that defines it.
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next access finds it without this function
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})


def import_after(trigger: str, module: str) -> None:
    """Import `module` right after `trigger` was imported by anybody: now, if that has happened.

    Folders of this package whose modules take part in importing `module` import `trigger` in their `__init__`, so that
    none of them is half imported when the turn of `module` comes.
    """
    if trigger in sys.modules:
        importlib.import_module(module)
    elif (finder := _Finder(trigger, module)) not in sys.meta_path:
        sys.meta_path.insert(0, finder)


@dataclass(frozen=True)
class _Finder(MetaPathFinder):
    """Finds `trigger` where the other finders find it, with a loader that goes on to `module`.

    Looking a module up does not mean to import it (`importlib.util.find_spec` tells whether PEFT is installed), so the
    finder stays until `module` was imported.
    """

    trigger: str
    module: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.trigger:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads as `loader` does, then imports the finder's `module`; an error there ends the import of the trigger."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module itself names its own loader, which is asked for its source and its data files.
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.finder.module)
        with suppress(ValueError):  # an import that failed and was tried again may have removed it
            sys.meta_path.remove(self.finder)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)
