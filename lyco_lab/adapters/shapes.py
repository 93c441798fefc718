"""Names for what the adapters' functions pass to one another."""

from torch import Tensor

Factors = dict[str, Tensor]  # by their names, as "a_RQ"
Shape = tuple[int, ...]  # of a weight: (P, Q, *kernel)
Terms = tuple[tuple[str, ...], ...]  # of a sum, each the factors that it multiplies
