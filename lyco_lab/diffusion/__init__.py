"""Stable Diffusion, frozen, and which of its layers may be adapted."""
