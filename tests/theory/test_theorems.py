"""What must hold for every file in theory/. A new theorem is tested here for free."""

import inspect

import pytest
import sympy as sp

import theory
from theory import Identity, is_zero, reduced, theorems
from theory.__main__ import main

THEOREMS = dict(theorems())
x, y, s = sp.symbols("x y s", positive=True)


@pytest.mark.parametrize("path", THEOREMS)
def test_every_difference_is_zero(path):
    identities = list(THEOREMS[path].identities())
    assert identities, f"theory/{path} checks nothing"
    assert [identity.claim for identity in identities if not identity.holds()] == []


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


def test_reduction_sees_through_roots_and_fractions():
    assert is_zero(sp.sqrt(x / s**2 + y / s**2) - sp.sqrt(x + y) / s)
    assert is_zero(1 / (x / s + y / s) - s / (x + y))
    assert is_zero(sp.Matrix([[x - x, (x + y) ** 2 - x**2 - 2 * x * y - y**2]]))
    assert reduced(sp.sqrt(x / s + y) - sp.sqrt(x + y) / s) != 0
    assert not is_zero(sp.Matrix([[x - x, x]]))
