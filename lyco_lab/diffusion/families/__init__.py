"""Every file here is a family of models; there is no list to edit.

`sdxl.py` defines `class SDXL(Diffusion)`, which a study may call "sdxl".
"""

from lyco_lab.diffusion.base import Diffusion
from lyco_lab.diffusion.sources.base import Source
from lyco_lab.errors import UserError, nearest
from lyco_lab.kinds import Family

FAMILIES = Family.find("model", Diffusion, __name__, __path__).kinds  # type: ignore[type-abstract]


def of(source: Source) -> type[Diffusion]:
    """The family of a model, which has to be the one that the study asks for."""
    asked = source.model.family
    if asked is not None and asked not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"model.family is {asked!r}, needs one of {known} or null{nearest(asked, FAMILIES)}"
        )
    found = [name for name, family in FAMILIES.items() if family.fits(source)]
    if not found:
        raise UserError(
            f"{source.name} is no model of the families {', '.join(sorted(FAMILIES))}, laid out as "
            "diffusers saves them: it has neither a unet nor a transformer of theirs"
        )
    (name,) = found
    if asked not in (None, name):
        raise UserError(f"model.family is {asked!r}, but {source.name} is of the family {name!r}")
    return FAMILIES[name]
