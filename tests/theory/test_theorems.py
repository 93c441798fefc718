"""What must hold for every file in theory/. A new theorem is tested here for free."""

import inspect

import pytest
import sympy as sp

import theory
from theory import Counterexample, Identity, is_zero, reduced, theorems
from theory.__main__ import main

THEOREMS = dict(theorems())
x, y, s = sp.symbols("x y s", positive=True)


@pytest.mark.parametrize("path", THEOREMS)
def test_every_claim_holds(path):
    checks = list(THEOREMS[path].identities())
    assert checks, f"theory/{path} checks nothing"
    assert [check.claim for check in checks if not check.holds()] == []


@pytest.mark.parametrize("path", THEOREMS)
def test_states_and_proves_before_it_checks(path):
    statement = inspect.getdoc(THEOREMS[path]) or ""
    assert statement.startswith("Theorem")
    assert "\nProof." in statement
    assert "[]" in statement


def test_the_theorems_are_found_by_existing(tmp_path, monkeypatch):
    (tmp_path / "planted_theorem.py").write_text("def identities():\n    return iter(())\n")
    (tmp_path / "_planted_helper.py").write_text("")
    monkeypatch.setattr(theory, "__path__", [*theory.__path__, str(tmp_path)])
    assert set(dict(theorems())) == {*THEOREMS, "planted_theorem.py"}


def test_a_file_that_proves_nothing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "planted_emptiness.py").write_text("")
    monkeypatch.setattr(theory, "__path__", [*theory.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match="planted_emptiness proves nothing"):
        list(theorems())


def test_the_command_prints_each_difference_and_counts_them(capsys):
    true = Identity("x - x", x - x)
    assert main([("a.py", [true, true]), ("b.py", [true])]) == 0
    out = capsys.readouterr().out
    assert out.count("difference = 0") == 3
    assert "3 identities in 2 files: every difference is zero" in out


def test_the_command_fails_on_a_false_identity(capsys):
    planted = [Identity("true", x - x), Identity("false", sp.Matrix([x - x, x - y]))]
    assert main([("a.py", planted)]) == 1
    out = capsys.readouterr().out
    assert "x - y" in out
    assert "1 of 2 identities do not hold" in out


def test_the_command_counts_counterexamples_apart(capsys):
    true, differs = Identity("x - x", x - x), Counterexample("1/3 - 1/2", sp.Rational(-1, 6))
    assert main([("a.py", [true, differs]), ("b.py", [differs])]) == 0
    out = capsys.readouterr().out
    assert out.count("differs: -1/6") == 2
    assert "1 identities in 2 files: every difference is zero; 2 counterexamples" in out


def test_the_command_fails_on_a_counterexample_that_shows_nothing(capsys):
    assert main([("a.py", [Counterexample("symbol", x), Counterexample("true", y / y)])]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT HOLD, difference = x" in out
    assert "1 of 2 counterexamples do not hold" in out


@pytest.mark.parametrize(
    ("difference", "differs"),
    [
        (sp.Rational(1, 10**40), True),
        (sp.sqrt(2) - sp.Rational(99, 70), True),
        (sp.Matrix([0, 1]), True),
        (sp.Matrix([0, 0]), False),
        (sp.sqrt(3 + 2 * sp.sqrt(2)) - 1 - sp.sqrt(2), False),  # zero, and not simplified
        (x, False),
        (sp.Matrix([1, x]), False),
        (sp.Float(0.5), False),
        (sp.nan, False),
        (sp.oo, False),
    ],
)
def test_only_an_exact_number_that_is_not_zero_is_a_counterexample(difference, differs):
    assert Counterexample("", difference).holds() == differs


def test_reduction_sees_through_roots_and_fractions():
    assert is_zero(sp.sqrt(x / s**2 + y / s**2) - sp.sqrt(x + y) / s)
    assert is_zero(1 / (x / s + y / s) - s / (x + y))
    assert is_zero(sp.Matrix([[x - x, (x + y) ** 2 - x**2 - 2 * x * y - y**2]]))
    assert reduced(sp.sqrt(x / s + y) - sp.sqrt(x + y) / s) != 0
    assert not is_zero(sp.Matrix([[x - x, x]]))
