"""Several processes that train adapters together, and hold the frozen weights once between them.

Of n processes each keeps 1/n of the rows of every weight. A block has its weights whole, with the
very bits they had, from just before it computes to just after, forwards and backwards (torch's
FSDP). So what runs a network runs it in all processes at once: one alone would wait for the rest.

Factors are whole in each process, and their gradients are averaged as DDP does.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lyco_lab.train.module import Training


class Sharing(DDPStrategy):
    """DDP for the factors, of a module whose frozen weights are shared out."""

    def __init__(self, idle: Callable[[], bool], **settings: Any) -> None:
        """`idle`: whether some factors get no gradient; asked once weights are shared out."""
        super().__init__(**settings)
        self._idle = idle

    def configure_ddp(self) -> None:
        module = cast(Training, self.lightning_module)
        share(module, self.root_device.type)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        self._ddp_kwargs["find_unused_parameters"] = self._idle()
        super().configure_ddp()

    def teardown(self) -> None:
        # Lightning would move the whole module to the CPU, and shares cannot be moved.
        module, self._lightning_module = self.lightning_module, None
        super().teardown()
        self._lightning_module = self.model = module
        for factor in cast(Training, module).factors().values():
            factor.data = factor.data.cpu()


def share(module: Training, device: str) -> None:
    """Keep this process's part of the frozen weights, and let go of the rest."""
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    factors = set(module.factors().values())
    for network in module.diffusion.parts.values():
        whole = factors | {p for p in network.parameters() if p.dim() == 0}  # has no rows
        for block in blocks(network):
            kind = type(block)
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
            # The hooks are on; and by its very class transformers knows what a model can return.
            block.__class__ = kind


def blocks(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once: each block inside another before that, and last what is in none."""
    # Both libraries say so which of a network's modules are to stay together on one device.
    kinds = set(getattr(network, "_no_split_modules", None) or ())
    inner = [m for m in network.modules() if type(m).__name__ in kinds and m is not network]
    return [*reversed(inner), network]
