"""Adapters: one file each, found by existing; there is no list to edit.

`loha.py` defines `class LoHa(Adapter)`, which a study's configuration calls "loha". `base.py` says
what an adapter is, `mount.py` puts one on layers, `plan.py` computes such a layer.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from lyco_lab.adapters.base import Adapter


def _concrete(parent: type) -> Iterator[type[Adapter]]:
    child: type[Adapter]
    for child in parent.__subclasses__():
        if child.__module__.startswith(f"{__name__}."):
            if not inspect.isabstract(child):
                yield child
            yield from _concrete(child)


for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

ADAPTERS: dict[str, type[Adapter]] = {cls.__name__.lower(): cls for cls in _concrete(Adapter)}
