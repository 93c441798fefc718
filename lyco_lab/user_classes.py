"""Classes that a study names by `package.module.Class`: a user's own, of any kind that a study has.

A module may lie in the folder the command is run in. Names come from studies and command lines
alone: what a file of weights names is never imported.
"""

import importlib
import os
import pkgutil
import sys
from types import ModuleType

from lyco_lab.errors import UserError, nearest


def find_class(where: str, path: str, base: type, needed: str) -> type:
    """The class at `path`, a subclass of `base`.

    where: the setting that names it; needed: what it has to be, both for errors.
    Raises `UserError` where there is no such module or class, or importing it fails.
    """
    module_name, _, name = path.rpartition(".")
    module = _module(where, path, module_name)
    if not hasattr(module, name):
        others = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, base)]
        raise UserError(
            f"{where} is {path!r}, but {module_name} has no {name}{nearest(name, others)}"
        )
    cls = getattr(module, name)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{where} is {path!r}, which is no {needed}")
    return cls


def is_path(text: str) -> bool:
    """Whether it reads as package.module.Class."""
    words = text.split(".")
    return len(words) > 1 and all(word.isidentifier() for word in words)


def _module(where: str, path: str, name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if not f"{name}.".startswith(f"{missing}."):
            raise UserError(f"{where} is {path!r}, which needs {missing}: {error}") from error
        parent, _, last = missing.rpartition(".")
        folders = getattr(sys.modules[parent], "__path__", ()) if parent else None
        hint = nearest(last, [module.name for module in pkgutil.iter_modules(folders)])
        raise UserError(f"{where} is {path!r}, but there is no module {missing!r}{hint}") from None
    except Exception as error:
        raise UserError(f"{where} is {path!r}, but importing {name} fails: {error}") from error
