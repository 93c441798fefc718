"""The degrees: no other passes, and the definitions are those of the adapters that train.

That every adapter scales as its terms say, tests/adapters/test_contract.py checks.
"""

import numpy as np
import pytest
import sympy as sp
import torch

from lyco_lab.adapters import ADAPTERS
from tests.strategies import random_factors, random_weight
from theory import is_zero
from theory.homogeneity import UPDATES, K, R, Update, by_factor, difference

BY_NAME = {update.name: update for update in UPDATES}
every_update = pytest.mark.parametrize("update", UPDATES, ids=list(BY_NAME))

LINEAR, CONVOLUTION = (4, 6), (5, 3, K)
B_A = {"B": "b_PR", "A": "a_RQ"}
CORE = B_A | {"M": "m_RRk"}
HALVES = {
    f"{ours}{i}": f"{theirs[0]}{i}_{theirs[2:]}" for i in "12" for ours, theirs in B_A.items()
}
HALVES_TUCKER = {
    f"{ours}{i}": f"{theirs}{i}_{shape}"
    for i in "12"
    for ours, theirs, shape in (("B", "b", "RP"), ("M", "m", "RRk"), ("A", "a", "RQ"))
}
SINGULAR = {"P": "p_PR", "L": "l_1R", "Q": "q_RQ", "P0": "p0_PR", "L0": "l0_1R", "Q0": "q0_RQ"}
C, C12 = {"C": "c_US"}, {"C1": "c_UR", "C2": "c_RS"}
D, RIGHT = {"D": "d_VT"}, {"B": "b_VR", "A": "a_RT"}
RIGHT_TUCKER = {"B": "b_RV", "M": "m_RRk", "A": "a_RT"}
MIXED = {"A1": "a1_QR", "A2": "a2_RQ", "B1": "b1_PR", "B2": "b2_RQ"}
TRANSPOSED = ("RP", "RV", "1R")  # as the adapter lays them out


def lokr(shape, factor, rank, names, **fields):
    return ADAPTERS["lokr"](rank=rank, factor=factor, **fields), shape, names


# definition here -> the adapter, as configured for it, a shape, and which factor is which
TRAINED = {
    "LoRA": (ADAPTERS["lora"](rank=R), CONVOLUTION, B_A),
    "LoRA, Tucker": (ADAPTERS["lora"](rank=R, tucker=True), CONVOLUTION, CORE),
    "DyLoRA, first 1 of 2": (ADAPTERS["dylora"](rank=R, block_size=1), LINEAR, B_A),
    "DyLoRA, first 2 of 2": (ADAPTERS["dylora"](rank=R), CONVOLUTION, B_A),
    "T-LoRA": (ADAPTERS["tlora"](rank=R), CONVOLUTION, SINGULAR),
    "LoHa": (ADAPTERS["loha"](rank=R), CONVOLUTION, HALVES),
    "LoHa, Tucker": (ADAPTERS["loha"](rank=R, tucker=True), CONVOLUTION, HALVES_TUCKER),
    "LoKr, left full, right full": lokr((8, 6, K), 2, 10000, C | D),
    "LoKr, left full, right factored": lokr((16, 12, K), 2, 1, C | RIGHT),
    "LoKr, left full, right with a core": lokr((16, 12, K), 2, 1, C | RIGHT_TUCKER, tucker=True),
    "LoKr, left factored, right full": lokr(
        (16, 4, K), 2, 1, C12 | D, decompose_both=True, unbalanced=True
    ),
    "LoKr, left factored, right factored": lokr(
        (16, 24, K), 4, 1, C12 | RIGHT, decompose_both=True
    ),
    "LoKr, left factored, right with a core": lokr(
        (16, 24, K), 4, 1, C12 | RIGHT_TUCKER, decompose_both=True, tucker=True
    ),
    "GLoRA": (ADAPTERS["glora"](rank=R), CONVOLUTION, MIXED),
    "(IA)3": (ADAPTERS["ia3"](), CONVOLUTION, {"w": "w_P"}),
    "(IA)3, on input": (ADAPTERS["ia3"](on_input=True), CONVOLUTION, {"w": "w_Q"}),
    "native": (ADAPTERS["native"](), CONVOLUTION, {"D": "diff"}),
    "norm": (ADAPTERS["norm"](), (5,), {"D": "dw"}),
}
SCALED = {f"{name}, with a scalar" for name in TRAINED} & set(BY_NAME)


@every_update
def test_no_other_degree_passes(update):
    assert [m for m in range(8) if is_zero(difference(update, m))] == [update.degree]


@every_update
def test_a_wrong_term_is_caught(update):
    """A factor left out of a term, and one counted twice."""
    assert is_zero(by_factor(update, update.terms))
    first, *rest = update.terms
    for wrong in (first[1:], (*first, first[0])):
        assert not is_zero(by_factor(update, (wrong, *rest)))


def numbers(factor: torch.Tensor) -> sp.Matrix:
    """As the definitions have it: unrolled, a vector as a column."""
    rows = factor.flatten(1) if factor.dim() > 1 else factor[:, None]
    return sp.Matrix(rows.tolist())


def defined(update: Update, weight, factors, names) -> torch.Tensor:
    """T by the definition."""
    given = {ours: numbers(factors[theirs]) for ours, theirs in names.items()}
    given |= {ours: given[ours].T for ours, theirs in names.items() if theirs[-2:] in TRANSPOSED}
    constants = {"W": numbers(weight)} if "W" in update.frozen else {}
    entries = np.array(update.transform(**given, **constants).tolist(), dtype=np.float64)
    return torch.tensor(entries).view(weight.shape)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in SCALED])
def test_the_definition_is_the_adapter_that_trains(name):
    trained, shape, names = TRAINED[name]
    update = BY_NAME[name]
    weight = random_weight(shape, 1)
    factors = random_factors(trained, weight, 2)
    assert set(names.values()) == set(factors)
    used = dict(factors)
    if name == "DyLoRA, first 1 of 2":  # as it trains: the mask that its dropout of ranks draws
        mask = trained.mask(lambda n: torch.zeros(n, dtype=torch.float64), R)
        assert mask.tolist() == [R, 0]
        used["b_PR"] = factors["b_PR"] * mask / R  # gamma follows the ranks in use

    expected = trained.gamma(shape) * defined(update, weight, factors, names)
    torch.testing.assert_close(trained.delta(weight, used), expected, rtol=1e-12, atol=1e-12)
    claimed = {frozenset(term) for term in trained.terms(shape)}
    assert claimed == {frozenset(names[ours] for ours in term) for term in update.terms}
    assert trained.degree(shape) == update.degree


@pytest.mark.parametrize("name", sorted(SCALED))
def test_a_scalar_multiplies_the_update(name):
    """`use_scalar` multiplies the factors of `scaling`, and so T once."""
    trained, shape, names = TRAINED[name.removesuffix(", with a scalar")]
    factors, c = random_factors(trained, random_weight(shape, 1), 2), 0.7
    scaled = {k: c * A if k in trained.scaling else A for k, A in factors.items()}
    expected = defined(
        BY_NAME[name],
        random_weight(shape, 1),
        factors | {"scalar": torch.tensor([[c]], dtype=torch.float64)},
        names | {"c": "scalar"},
    )
    actual = trained.transform(scaled, shape)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
