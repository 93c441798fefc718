"""Images -> scores. Every file here except base.py and stage.py holds metrics; no list to edit.

`vendi.py` defines `class Vendi(Metric)`, whose `name` heads the columns of every table.
"""

import importlib
import pkgutil

from lyco_lab.evaluate.base import Metric

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in {"base", "stage"}:
        importlib.import_module(f"{__name__}.{_module.name}")

METRICS: dict[str, Metric] = {cls.name: cls() for cls in Metric.__subclasses__()}
