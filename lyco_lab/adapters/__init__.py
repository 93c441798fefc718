"""Adapters: one file each, found by existing; there is no list to edit.

`loha.py` defines `class LoHa(Adapter)`, which a study's configuration calls "loha". `base.py` says
what an adapter is, `mount.py` puts one on layers, `plan.py` computes such a layer.
"""

from lyco_lab.adapters.base import Adapter
from lyco_lab.kinds import Family

FAMILY: Family[Adapter] = Family.find("adapter", Adapter, __name__, __path__)  # type: ignore[type-abstract]
ADAPTERS = FAMILY.kinds
build, describe = FAMILY.build, FAMILY.describe
