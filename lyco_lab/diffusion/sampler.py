"""DDIM, without waiting for the device in each of its steps.

diffusers keeps the noise levels on the processor and looks them up by timestep: with timesteps on
the device, the processor would have to read every one of them back.
"""

from typing import Any

from diffusers import DDIMScheduler


class Sampler(DDIMScheduler):  # type: ignore[misc]
    """The scheduler of diffusers, whose timesteps stay on the processor."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device="cpu")
