"""Optimizers: one file each, found by existing; there is no list to edit.

`adamw.py` defines `class AdamW(Optimizer)`, which a study's configuration calls "adamw". `base.py`
says what an optimizer is. Each claims how its settings move when gamma is folded away; theory/
derives the claims from the update rules, and the contract checks them on the optimizers themselves.
"""

from lyco_lab.kinds import Family
from lyco_lab.optimizers.base import Optimizer

FAMILY: Family[Optimizer] = Family.find("optimizer", Optimizer, __name__, __path__)  # type: ignore[type-abstract]
OPTIMIZERS = FAMILY.kinds
build, describe = FAMILY.build, FAMILY.describe
