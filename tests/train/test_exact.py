"""Bits are claimed where every operation has an exact algorithm; the others are named."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from lyco_lab.train import stage, train
from lyco_lab.train.exact import Exactness, Inexact, exact, operation
from lyco_lab.train.module import Training

SETTINGS = {"steps": 6, "checkpoint_every": 2}


def put():
    """An operation that has no exact algorithm on a processor either."""
    torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


def plant(patch):
    loss = Training.loss

    def planted(self, batch):
        put()
        return loss(self, batch)

    patch.setattr(Training, "loss", planted)


@pytest.fixture
def attempts(monkeypatch):
    """Whether each attempt of the stage was strict."""
    found, whole = [], stage._train

    def counted(run, record, strict):
        found.append(strict)
        whole(run, record, strict)

    monkeypatch.setattr(stage, "_train", counted)
    return found


def test_an_operation_without_an_exact_algorithm_is_named_and_changes_no_number(
    trained, results, monkeypatch, capsys, attempts
):
    _, plain = trained("plain", steps=3)
    assert plain.facts("train")["nondeterministic"] == [] and attempts == [True]
    plant(monkeypatch)
    _, other = trained("other", steps=3)
    assert other.facts("train")["nondeterministic"] == ["put_"] and attempts == [True, True, False]
    assert results(other) == results(plain)
    said = capsys.readouterr().out
    assert said.count("put_ has no exact algorithm on this device") == 1
    assert "training begins again, and claims no bits" in said


def test_a_run_that_goes_on_keeps_the_names(begin, interrupted, monkeypatch, attempts):
    """Also where the rest of it needs no such operation."""
    run, record = begin(**SETTINGS)
    with monkeypatch.context() as patch:
        plant(patch)
        interrupted(run, record, 5)
    train(run, record)
    assert record.facts("train")["nondeterministic"] == ["put_"]
    assert attempts == [True, False, True]


WORDS = {
    "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism "
    "call torch.use_deterministic_algorithms(True, warn_only=False).": "Flash Attention",
    "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable "
    "determinism call": "Memory Efficient attention",
    "cumsum_cuda_kernel does not have a deterministic implementation, but you "
    "set 'torch.use_deterministic_algorithms(True)'. You can": "cumsum_cuda_kernel",
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic "
    "because it uses CuBLAS and you have CUDA >= 10.2.": "cuBLAS with CUBLAS_WORKSPACE_CONFIG=",
}  # fmt: skip


@pytest.mark.parametrize("message", WORDS)
def test_what_torch_says_of_a_gpu_is_understood_as_error_and_as_warning(message):
    assert operation(message).startswith(WORDS[message])
    with pytest.raises(Inexact), exact(None):
        raise RuntimeError(message)
    with exact(None, strict=False, operations=["before"]) as found:
        for _ in range(2):
            with warnings.catch_warnings():  # as others do within
                warnings.simplefilter("ignore", FutureWarning)
                warnings.warn(message, stacklevel=1)
    assert found.operations == {"before", operation(message)}


def test_other_errors_and_warnings_are_left_alone():
    assert operation("a matrix does not have an inverse") is None
    with pytest.raises(RuntimeError, match="unrelated"), exact(None):
        raise RuntimeError("unrelated")
    with pytest.warns(UserWarning, match="unrelated"), exact(None, strict=False) as found:
        warnings.warn("unrelated", stacklevel=1)
    assert not found.operations


def test_every_warning_of_torch_itself_is_seen_in_each_run():
    for _ in range(2):
        with exact(None, strict=False) as found:
            put()
        assert found.operations == {"put_"}
    with pytest.raises(Inexact, match="put_ has no exact algorithm"), exact(None):
        put()


@pytest.mark.parametrize("strict", [True, False])
def test_settings_are_fixed_inside_and_as_before_outside(strict):
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_warn_always_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            set(_cur_sdpa_kernel_backends()),
            torch.get_num_threads(),
        )

    before = settings()
    attention = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    with exact(2, strict=strict):
        assert settings() == (
            True, not strict, not strict, False, False, False, False, attention, 2
        )  # fmt: skip
    assert settings() == before
    with pytest.raises(KeyError), exact(None, strict=strict):
        raise KeyError
    assert settings() == before


def test_what_is_kept_of_a_gpu_says_which_algorithms_there_were():
    found = Exactness(3, {"b", "a"})
    assert found.facts("cpu") == {"threads": 3, "nondeterministic": ["a", "b"]}
    kernels = found.facts("cuda")["kernels"]
    assert kernels["attention"] == ["flash_attention", "efficient_attention", "math"]
    assert kernels["cublas_workspace"] and not kernels["tf32"] and not kernels["cudnn_benchmark"]
