"""How the settings of each optimiser move when gamma is folded away: one optimiser, one theorem.

A file says what one step does, in symbols, and which powers of s make it commute with the scaling
of the factors; theory/_equivariance.py derives the powers and checks them. The claims compared with
are those of lyco_lab.optimizers; tests/theory/optimizers runs each step beside the real optimiser.
"""
