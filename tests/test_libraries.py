"""Which library takes which product: what was the quicker one, and nothing else of it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trbatch.engine import libraries
from trbatch.engine.alike import same
from trbatch.engine.joined import JoinedLinear, join_linears, products_of
from trbatch.engine.libraries import SIZES, ByTokens, choose_libraries

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Layers(nn.Module):
    """Two layers of one input, which are joined, and two alike that are not."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.down, self.again = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.down(self.left(x) + self.right(x)))
        return y


def joined(width: int = 8, **kind: Any) -> tuple[Layers, list[JoinedLinear]]:
    torch.manual_seed(0)
    network = Layers(width).to(**kind)
    x = torch.randn(3, width).to(**kind)
    with torch.inference_mode():
        assert join_linears(network, lambda: network(x)) == 1
    return network, products_of(network)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that were asked for, one after the other."""
    names: list[str] = []

    @contextmanager
    def library(name: str) -> Iterator[None]:
        names.append(name)
        yield

    monkeypatch.setattr(libraries, "_library", library)
    return names


def quick_at(*sizes: int) -> Any:
    """Seconds by which cuBLASLt is the quicker one for so many tokens, and only for square W."""

    def seconds(library: str, weights: list[Tensor], x: Tensor) -> float:
        square = weights[0].shape[0] == weights[0].shape[1]
        return 0.9 if library == "cublaslt" and len(x) in sizes and square else 1.0

    return seconds


def test_each_number_of_tokens_has_the_library_that_was_quicker(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_concerned", lambda product: True)
    monkeypatch.setattr(libraries, "_seconds", quick_at(8, 32))
    network, products = joined()
    assert len(products) == 3, "one of two layers, two of one each"
    before = network(torch.ones(2, 8))
    assert choose_libraries(network) == 2
    by_width = {tuple(product.weight.shape): product.product for product in products}
    assert by_width[16, 8] is nn.functional.linear
    chosen = by_width[8, 8]
    assert isinstance(chosen, ByTokens) and chosen.others == {8, 32}
    torch.testing.assert_close(network(torch.ones(2, 8)), before)
    for tokens, other in {1: 0, 2: 1, 8: 1, 9: 0, 16: 0, 17: 1, 32: 1, 33: 0, 500: 0}.items():
        asked.clear()
        assert network.down(torch.ones(1, tokens, 8)).shape == (1, tokens, 8)
        assert asked == ["cublaslt"] * other


def test_a_library_that_says_something_else_is_not_taken(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_concerned", lambda product: True)
    monkeypatch.setattr(libraries, "_seconds", quick_at(*SIZES))
    monkeypatch.setattr(libraries, "same", lambda found, wanted: len(found) > 8)
    network, products = joined()
    assert choose_libraries(network) == 2
    assert [getattr(p.product, "others", None) for p in products if len(p.weight) == 8] == [
        frozenset(SIZES[2:])
    ] * 2


@pytest.mark.parametrize("gain", [0.0, 0.019])
def test_a_gain_within_the_noise_changes_nothing(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    monkeypatch.setattr(libraries, "_concerned", lambda product: True)
    monkeypatch.setattr(
        libraries, "_seconds", lambda library, *_: 1.0 - gain * (library == "cublaslt")
    )
    assert choose_libraries(joined()[0]) == 0


def product(**changed: Any) -> Any:
    """What is looked at of a product, as one whose library is chosen; `changed`: of its weight."""
    weight = {"is_cuda": True, "dtype": torch.bfloat16, "nbytes": 32 << 20} | changed
    return SimpleNamespace(weight=SimpleNamespace(**weight), bias=None)


def test_the_library_of_large_products_in_16_bits_on_a_gpu_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_BLAS_PREFER_CUBLASLT", raising=False)
    assert libraries._concerned(product())
    assert libraries._concerned(product(dtype=torch.float16))
    for changed in ({"is_cuda": False}, {"dtype": torch.float32}, {"nbytes": (32 << 20) - 1}):
        assert not libraries._concerned(product(**changed))
    biased = product()
    biased.bias = torch.zeros(1)
    assert not libraries._concerned(biased)
    with monkeypatch.context() as patch:
        other = torch._C._BlasBackend.Cublaslt
        patch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: other)
        assert not libraries._concerned(product())
    for chosen in "01":
        monkeypatch.setenv("TORCH_BLAS_PREFER_CUBLASLT", chosen)
        assert not libraries._concerned(product())


def test_where_timing_fails_the_usual_library_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> float:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(libraries, "_concerned", lambda product: True)
    monkeypatch.setattr(libraries, "_seconds", fails)
    network, products = joined()
    assert choose_libraries(network) == 0
    assert all(one.product is nn.functional.linear for one in products)
    assert "none left" in caplog.text


def test_as_many_weights_are_timed_as_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_SAMPLE", 100)
    weights = [torch.empty(10) for _ in range(5)]  # 40 bytes each
    assert len(libraries._sample(weights)) == 3
    assert len(libraries._sample(weights[:2])) == 2


@pytest.mark.gpu
@GPU
def test_both_libraries_say_the_same_and_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    network, products = joined(4096, dtype=torch.bfloat16, device="cuda")
    before = torch.backends.cuda.preferred_blas_library()
    timed, seconds = [], libraries._seconds
    monkeypatch.setattr(
        libraries, "_seconds", lambda *given: timed.append(given[0]) or seconds(*given)
    )
    choose_libraries(network)  # whatever is quicker here
    assert set(timed) == {"cublas", "cublaslt"}
    assert torch.backends.cuda.preferred_blas_library() == before
    for tokens in (1, 5, 32, 81, 128, 200):
        x = torch.randn(1, tokens, 4096, dtype=torch.bfloat16, device="cuda")
        for product in products:
            product.product = nn.functional.linear
        with torch.inference_mode():
            wanted = network(x)
            for product in products:
                product.product = ByTokens(frozenset(SIZES))
            assert same(network(x), wanted)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = network(x)
            graph.replay()
            assert same(found, wanted)
    assert torch.backends.cuda.preferred_blas_library() == before


@pytest.mark.gpu
@GPU
def test_a_library_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = joined(4096, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(libraries, "_seconds", lambda *_: pytest.fail("it was timed"))
    with libraries._library("cublaslt"):
        assert choose_libraries(network) == 0
