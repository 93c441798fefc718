"""Train, generate, evaluate and compare adapters of Stable Diffusion.

    import lyco_lab as ll

    mounted = ll.attach(pipe.unet, ll.LoRA(rank=8), ["*.attn?.to_?"], seed=0)
    ll.save("adapter.safetensors", {"unet": mounted})
    ll.merge(ll.load("adapter.safetensors", another_pipe))

    study = ll.load_study("experiments/demo")
    outcome = ll.run_study(study, "runs")

Every adapter and optimizer is here under the name of its class. Importing the package loads none of
this, nor torch: a name is looked up when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lyco_lab.adapters.mount import Mounted as Mounted
    from lyco_lab.adapters.mount import attach as attach
    from lyco_lab.adapters.options import Options as Options
    from lyco_lab.adapters.options import Override as Override
    from lyco_lab.config import load_study as load_study
    from lyco_lab.engines.local import run_study as run_study
    from lyco_lab.errors import UserError as UserError
    from lyco_lab.formats.files import load as load
    from lyco_lab.formats.files import merge as merge
    from lyco_lab.formats.files import save as save

__version__ = "0.1.0"

_HOMES = {
    "Mounted": "adapters.mount",
    "Options": "adapters.options",
    "Override": "adapters.options",
    "UserError": "errors",
    "attach": "adapters.mount",
    "load": "formats.files",
    "load_study": "config",
    "merge": "formats.files",
    "run_study": "engines.local",
    "save": "formats.files",
}
_FAMILIES = {"adapters": "ADAPTERS", "optimizers": "OPTIMIZERS"}  # whose kinds are here, too

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Python asks for the name of every submodule, too, before it imports that.
    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name[:1].isupper() and name in (kinds := _kinds()):
        found = kinds[name]
    else:
        from lyco_lab.errors import nearest

        hint = nearest(name, [*_HOMES, *(kinds if name[:1].isupper() else ())])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_kinds()})


def _kinds() -> dict[str, type]:
    """The classes of all families by their names."""
    found: dict[str, type] = {}
    for package, registry in _FAMILIES.items():
        kinds = getattr(importlib.import_module(f"{__name__}.{package}"), registry)
        found |= {kind.__name__: kind for kind in kinds.values()}
    return found
