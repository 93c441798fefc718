"""The samplers of diffusers, without waiting for the device in their steps.

diffusers keeps noise levels on the processor. DDIM looks them up by timestep: with timesteps on the
device, every one of them would have to be read back. Of flow matching only the first is looked up,
though what it will be is known.
"""

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


class Sampler(DDIMScheduler):  # type: ignore[misc]
    """DDIM whose timesteps stay on the processor."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device="cpu")


class FlowSampler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's steps along the flow, beginning at the first timestep."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.set_begin_index(0)
