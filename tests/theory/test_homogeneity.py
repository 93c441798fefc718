"""The degrees: no other degree passes, and the definitions are those of the adapters that train."""

import numpy as np
import pytest
import sympy as sp
import torch

from lyco_lab.adapters import ADAPTERS
from lyco_lab.seeds import generator
from theory import is_zero
from theory.homogeneity import TRANSFORMS, R, difference

BY_NAME = {adapter.name: adapter for adapter in TRANSFORMS}
every_transform = pytest.mark.parametrize("adapter", TRANSFORMS, ids=BY_NAME)

# definition here -> the adapter, as configured for it, a shape, and which factor is which
TRAINED = {
    "LoRA": (ADAPTERS["lora"](rank=R), (5, 3), {"B": "b_PR", "A": "a_RQ"}),
    "LoHa": (
        ADAPTERS["loha"](rank=R),
        (5, 3),
        {"B1": "b1_PR", "A1": "a1_RQ", "B2": "b2_PR", "A2": "a2_RQ"},
    ),
    "LoKr, right block full": (
        ADAPTERS["lokr"](factor=2),
        (8, 6),
        {"C": "c_US", "D": "d_VT"},
    ),
    "LoKr, right block factored": (
        ADAPTERS["lokr"](factor=2, rank=1),
        (16, 12),
        {"C": "c_US", "B": "b_VR", "A": "a_RT"},
    ),
    "native": (ADAPTERS["native"](), (5, 3), {"D": "diff"}),
}


@every_transform
def test_no_other_degree_passes(adapter):
    assert [m for m in range(7) if is_zero(difference(adapter, m))] == [adapter.degree]


@every_transform
def test_the_definition_is_the_adapter_that_trains(adapter):
    trained, shape, names = TRAINED[adapter.name]
    rng = generator(0, "definition", adapter.name)
    start = trained.init(torch.zeros(shape, dtype=torch.float64), rng)
    factors = {k: torch.randn(v.shape, dtype=v.dtype, generator=rng) for k, v in start.items()}
    assert set(names.values()) == set(factors)

    symbolic = {ours: sp.Matrix(factors[theirs].tolist()) for ours, theirs in names.items()}
    expected = np.array(adapter.transform(**symbolic).tolist(), dtype=np.float64)
    actual = trained.transform(factors, shape).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    assert trained.degree(shape) == adapter.degree
