"""Adapter files: one file here per dialect that other programs read."""
