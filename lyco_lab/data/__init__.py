"""A concept's images and captions, from a folder to batches.

folder.py reads and checks the folder, cache.py turns it into latents and text states once, and
batches.py draws what each training step sees. stage.py is the first stage of a run.
"""
