"""The quick argmax and top-k agree with torch's."""

import pytest
import tiny
import torch

from trbatch.engine import likeliest


@pytest.mark.parametrize("vocab", [1, 7, 97, 128, 129, 1000, 49_152])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_both_give_what_torch_gives(vocab: int, count: int) -> None:
    generator = torch.Generator().manual_seed(vocab + count)
    # All different: of equal logits torch may take any.
    logits = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(count)])
    logits = (logits.float() - vocab / 2).to(tiny.DEVICE)
    blocks = likeliest.blocks_of(logits)
    assert torch.equal(likeliest.argmax(blocks), logits.argmax(-1))
    k = min(8, vocab)
    assert torch.equal(likeliest.topk(blocks, k), logits.topk(k).indices)


def test_of_equal_logits_the_first_token_is_taken() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, [300, 700, 701]] = 1.0
    assert likeliest.argmax(likeliest.blocks_of(logits)).tolist() == [0, 300]


def test_tokens_that_can_never_come_do_no_harm() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 299] = 0.0
    blocks = likeliest.blocks_of(logits)
    assert likeliest.argmax(blocks).tolist() == [299]
    best = likeliest.topk(blocks, 8)[0].tolist()
    assert best[0] == 299
    assert max(best) < 300
