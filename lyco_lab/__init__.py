"""lyco_lab: train, generate, evaluate and compare adapters of Stable Diffusion."""

__version__ = "0.1.0"
