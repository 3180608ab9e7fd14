"""Evaluation through a cache: chunked numbers equal one-shot ones, and every metric sees what it should."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import evaluate, token_windows
from kvsink.evaluate.results import EvalResult
from kvsink.evaluate.retrieval import retrieval
from tests.models import VOCAB, build
from tests.wording import Words

TOKENS = 40


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (5, TOKENS), generator=torch.Generator().manual_seed(7))


def one_shot(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)[:, :-1]


@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_chunked_equals_one_shot(model, ids, chunk, batch):
    result = evaluate(model, None, ids, chunk=chunk, batch=batch)
    nll = -one_shot(model, ids).gather(-1, ids[:, 1:, None])[..., 0]
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert result.window_nll == pytest.approx(nll.mean(1).tolist(), rel=1e-5)
    assert result.tokens == 5 * (TOKENS - 1)
    assert result.kl is None
    assert result.baseline_perplexity is None


def test_same_model_on_both_sides(model, ids):
    result = evaluate(model, model, ids, chunk=8)
    assert result.kl == 0.0
    assert result.top1 == 1.0
    assert result.perplexity == result.baseline_perplexity
    assert result.perplexity_change == 0.0


def test_kl_and_agreement_equal_their_definition(model, ids):
    other = build("llama").eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    result = evaluate(other, model, ids, chunk=16, batch=2)
    log_p, log_q = one_shot(model, ids), one_shot(other, ids)
    assert result.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    assert result.kl > 0


def test_a_lossy_cache_is_noticed(model, ids):
    """The cache must be what later chunks read: one that forgets its keys changes the numbers."""

    class Forgetful(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            past = keys.shape[2] - key_states.shape[2]
            return torch.cat([keys[:, :, :past] * 0, keys[:, :, past:]], 2), values

    result = evaluate(model, model, ids, chunk=8, cache_factory=lambda m, rows, length: Forgetful())
    assert result.kl > 1e-3
    whole = evaluate(model, model, ids, chunk=TOKENS, cache_factory=lambda m, rows, length: Forgetful())
    assert whole.kl == pytest.approx(0.0, abs=1e-9)


def test_cache_factory_gets_rows_and_length(model, ids):
    asked = []

    def factory(m, rows, length):
        asked.append((rows, length))
        return DynamicCache()

    evaluate(model, None, ids, chunk=16, batch=2, cache_factory=factory)
    assert asked == [(2, TOKENS), (2, TOKENS), (1, TOKENS)]


def test_bits_are_the_bytes_held(model, ids):
    result = evaluate(model, None, ids, chunk=16, batch=2)
    config = model.config
    assert result.cache_nbytes == 2 * 2 * TOKENS * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert result.bits_per_element == 32


def test_bits_come_from_the_cache_when_it_counts(model, ids):
    class Counting(DynamicCache):
        def nbytes(self):
            return 1234

        def bits_per_element(self):
            return 2.5

    result = evaluate(model, None, ids, cache_factory=lambda *_: Counting())
    assert (result.bits_per_element, result.cache_nbytes) == (2.5, 1234)


def test_nan_logits_are_an_error(ids):
    broken = build("llama")
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"not finite in windows 0-3, tokens 0-15"):
        evaluate(broken, None, ids, chunk=16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids[0], "must be integers of shape"),
        (lambda ids: ids[:, :1], "must be integers of shape"),
        (lambda ids: ids.repeat(1, 10), "exceed the model's 128 positions"),
        (lambda ids: ids + VOCAB, "outside the model's vocabulary"),
    ],
)
def test_bad_ids(model, ids, change, words):
    with pytest.raises(EvaluationError, match=words):
        evaluate(model, None, change(ids))


def test_training_mode_is_restored(ids):
    model = build("llama").train()
    evaluate(model, None, ids[:1])
    assert model.training


def test_windows_are_spread_and_do_not_overlap():
    ids = token_windows(" ".join(map(str, range(103))), Words(), 4, 10)
    assert ids.shape == (4, 10)
    assert ids[0, 0] == 0
    assert ids[-1, -1] == 102
    assert (ids[:, 1:] - ids[:, :-1] == 1).all()
    assert (ids[1:, 0] > ids[:-1, -1]).all()
    assert token_windows("a b c d", Words(), 1, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("windows", "tokens", "words"),
    [(3, 4, "Pass --windows 2"), (2, 20, "--window-tokens 5"), (0, 4, "at least 1"), (1, 1, "at least 2 tokens")],
)
def test_windows_that_do_not_fit(windows, tokens, words):
    with pytest.raises(EvaluationError, match=words):
        token_windows("a b c d e f g h i j", Words(), windows, tokens)


@pytest.mark.slow
def test_smollm2_reference_perplexity_and_retrieval(smollm2_dir):
    """Two windows of the 16-bit demo model: a change here means that the text, the tokenizer or the model changed."""
    from kvsink.evaluate.texts import evaluation_text
    from kvsink.folder.loading import load_model, load_tokenizer

    model, tokenizer = load_model(smollm2_dir, "cpu"), load_tokenizer(smollm2_dir)
    ids = token_windows(evaluation_text(), tokenizer, 8, 1024)
    result: EvalResult = evaluate(model, model, ids[:2], chunk=64)
    assert result.kl == 0
    assert result.window_nll == pytest.approx((2.35029, 3.27175), abs=2e-3)
    found = retrieval(model, tokenizer, lengths=(256,))
    assert found.fraction == 1.0
