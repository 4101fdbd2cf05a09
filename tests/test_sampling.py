"""Faults of samplers that are forbidden here: biased filters, tokens that depend on the batch, guidance that fades."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.noise import gumbel_noise, noise_key, philox
from dalle_mini_impl.pretrained import Bundle
from dalle_mini_impl.sampling import (
    choose,
    fitting_batch_size,
    guidance_scale,
    guide,
    keep_top_k,
    keep_top_p,
    log_likelihood_ratio,
    sample_many,
    sample_rows,
    sample_tokens,
    stream_tokens,
)
from tests.tiny import TINY_CAPTIONS, randomize, tiny_bundle

PROMPT = "a red circle"
GUIDED = SamplingConfig(guidance=3.0, top_p=0.95)
UNGUIDED = SamplingConfig(guidance=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle()


@pytest.fixture(scope="module")
def dalle(bundle: Bundle) -> DALLE:
    assert bundle.dalle is not None
    return bundle.dalle


@pytest.fixture(scope="module")
def text(bundle: Bundle) -> Tensor:
    return bundle.tokenizer.batch([PROMPT], bundle.stream.text_length)[0][0]  # (T,)


def _words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(word: int, expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = _words(word, word, word, word)
    k0, k1 = _words(word, word)
    assert tuple(philox((c0, c1, c2, c3), (k0, k1))[0].tolist()) == expected


def _noise(seed: int = 0, prompt: str = PROMPT, candidates: int = 1, start: int = 0, end: int = 4) -> Tensor:
    keys = torch.tensor([noise_key(seed, prompt)]).expand(candidates, 2)
    return gumbel_noise(keys, torch.arange(candidates), start, end, 50)


def test_noise_is_standard_gumbel() -> None:
    noise = _noise(candidates=500, end=10)  # 250,000 values
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_noise_depends_on_seed_prompt_candidate_and_position_alone() -> None:
    noise = _noise(candidates=3)
    assert torch.equal(noise[1:2, 2:3], gumbel_noise(torch.tensor([noise_key(0, PROMPT)]), torch.tensor([1]), 2, 3, 50))
    assert torch.equal(_noise(prompt="  A RED\tcircle "), noise[:1])
    flat = torch.cat([noise, _noise(seed=1), _noise(prompt="a blue circle")]).flatten(0, 1)
    assert len(flat.unique(dim=0)) == len(flat)


def _reference_probabilities(logits: np.ndarray, settings: SamplingConfig) -> np.ndarray:
    """Temperature, top-k, top-p one obvious step at a time."""
    weights = np.exp((logits - logits.max()) / settings.temperature)
    order = np.argsort(-weights)
    if settings.top_k:
        weights[order[settings.top_k :]] = 0
    weights /= weights.sum()
    kept, total = [], 0.0
    for token in order:
        if total >= settings.top_p:
            break
        kept.append(token)
        total += weights[token]
    mask = np.zeros_like(weights)
    mask[kept] = 1
    return weights * mask / (weights * mask).sum()


@pytest.mark.parametrize(
    "settings",
    [
        SamplingConfig(top_p=1.0),
        SamplingConfig(top_p=1.0, temperature=0.5),
        SamplingConfig(top_p=1.0, temperature=1.7),
        SamplingConfig(top_p=1.0, top_k=5),
        SamplingConfig(top_p=0.8),
        SamplingConfig(top_p=0.7, top_k=9, temperature=1.3),
    ],
    ids=str,
)
def test_sampled_frequencies_follow_the_filtered_distribution(settings: SamplingConfig) -> None:
    draws = 20_000
    logits = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    keys = torch.tensor([noise_key(0, "chi-square")]).expand(draws, 2)
    gumbel = gumbel_noise(keys, torch.arange(draws), 0, 1, 24)[:, 0]
    counts = np.bincount(choose(logits.expand(draws, -1), settings, gumbel).numpy(), minlength=24)
    expected = draws * _reference_probabilities(logits.double().numpy(), settings)
    assert (counts[expected == 0] == 0).all(), "a filtered token was drawn"
    kept = expected > 0
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 3, f"{statistic:.1f} at {freedom} degrees of freedom"


def test_filters_keep_what_they_should_and_leave_their_input_alone() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).log_softmax(dim=-1)
    before = logits.clone()
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, False, True]]
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 9) is logits
    assert keep_top_p(logits, 0.01).isfinite().tolist() == [[False, True, False, False]]
    assert keep_top_p(logits, 0.8).isfinite().tolist() == [[False, True, False, True]]
    assert torch.equal(logits, before)


def test_temperature_zero_takes_the_likeliest_token(dalle: DALLE, text: Tensor) -> None:
    settings = SamplingConfig(temperature=0.0, guidance=1.0)
    drawn = sample_tokens(dalle, text, [0, 7], seed=5, prompt=PROMPT, settings=settings).ids
    assert torch.equal(drawn[0], drawn[1])
    greedy = dalle.generate(text[None], lambda logits, _: logits.argmax(dim=-1))
    assert torch.equal(drawn[:1], greedy)


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 5.0), ("linear", 3.0), ("cosine", 3.0)])
def test_guidance_schedules_run_from_one_to_the_scale(schedule: str, middle: float) -> None:
    settings = SamplingConfig.model_validate({"guidance": 5.0, "guidance_schedule": schedule})
    scales = [guidance_scale(settings, index, 11) for index in range(11)]
    assert scales[0] == (5.0 if schedule == "constant" else 1.0)
    assert scales[5] == pytest.approx(middle)
    assert scales[-1] == pytest.approx(5.0)
    assert scales == sorted(scales)


def test_guidance_one_is_exactly_no_guidance() -> None:
    conditional, null = torch.randn(2, 9), torch.randn(2, 9)
    assert guide(conditional, null, 1.0) is conditional
    assert torch.allclose(guide(conditional, null, 0.0), null)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_sampler_equals_the_slow_reference(dalle: DALLE, text: Tensor, schedule: str, guidance: float) -> None:
    settings = SamplingConfig.model_validate({"guidance": guidance, "guidance_schedule": schedule, "top_k": 20})
    num_tokens = dalle.stream.num_image_tokens
    keys = torch.tensor([noise_key(2, PROMPT)]).expand(3, 2)
    noise = gumbel_noise(keys, torch.arange(3), 0, num_tokens, dalle.stream.image_vocab)
    slow = dalle.generate(
        text.expand(3, -1),
        lambda logits, index: choose(logits, settings, noise[:, index]),
        guidance=lambda index: guidance_scale(settings, index, num_tokens),
    )
    fast = sample_tokens(dalle, text, range(3), seed=2, prompt=PROMPT, settings=settings)
    assert torch.equal(fast.ids, slow)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("settings", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_tokens_dont_depend_on_the_batch_size(
    dalle: DALLE, text: Tensor, batch_size: int, settings: SamplingConfig
) -> None:
    whole = sample_tokens(dalle, text, range(16), seed=0, prompt=PROMPT, settings=settings)
    cut = sample_tokens(dalle, text, range(16), seed=0, prompt=PROMPT, settings=settings, batch_size=batch_size)
    assert torch.equal(whole.ids, cut.ids)
    assert whole.log_ratio is not None and cut.log_ratio is not None
    assert torch.allclose(whole.log_ratio, cut.log_ratio, atol=1e-4)


def test_tokens_dont_depend_on_the_other_candidates(dalle: DALLE, text: Tensor) -> None:
    whole = sample_tokens(dalle, text, range(12), seed=0, prompt=PROMPT, settings=GUIDED).ids
    some = sample_tokens(dalle, text, [9, 2], seed=0, prompt=PROMPT, settings=GUIDED).ids
    assert torch.equal(some, whole[[9, 2]])
    assert len(whole.unique(dim=0)) == 12
    other_seed = sample_tokens(dalle, text, range(12), seed=1, prompt=PROMPT, settings=GUIDED).ids
    assert not (other_seed == whole).all(dim=1).any()


def test_tokens_dont_depend_on_the_other_prompts(bundle: Bundle, dalle: DALLE) -> None:
    text_ids, _ = bundle.tokenizer.batch(TINY_CAPTIONS, bundle.stream.text_length)
    together = sample_many(dalle, text_ids, TINY_CAPTIONS, [0, 5], seed=0, settings=GUIDED, batch_size=4)
    for index, prompt in enumerate(TINY_CAPTIONS):
        alone = sample_tokens(dalle, text_ids[index], [0, 5], seed=0, prompt=prompt, settings=GUIDED)
        assert torch.equal(together.ids[2 * index : 2 * index + 2], alone.ids)
        assert together.log_ratio is not None and alone.log_ratio is not None
        assert torch.allclose(together.log_ratio[2 * index : 2 * index + 2], alone.log_ratio, atol=1e-4)


def test_a_guidance_of_one_doesnt_pay_for_a_null_pass(
    dalle: DALLE, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    step = DALLE.decode_step

    def spy(self: DALLE, previous: Tensor, *args: object) -> Tensor:
        rows.append(len(previous))
        return step(self, previous, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DALLE, "decode_step", spy)
    sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=UNGUIDED, log_ratio=False)
    assert set(rows) == {3}
    rows.clear()
    sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=GUIDED)
    assert set(rows) == {6}


def test_guidance_doesnt_fade_after_the_first_token(
    dalle: DALLE, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences: list[float] = []
    step = DALLE.decode_step

    def spy(self: DALLE, *args: object) -> Tensor:
        logits = step(self, *args)  # type: ignore[arg-type]
        conditional, null = logits.chunk(2)
        differences.append((conditional - null).abs().max().item())
        return logits

    monkeypatch.setattr(DALLE, "decode_step", spy)
    given = text.clone()
    sample_tokens(dalle, given, range(2), seed=0, prompt=PROMPT, settings=GUIDED)
    assert len(differences) == dalle.stream.num_image_tokens - 1
    assert min(differences) > 0.01
    assert torch.equal(given, text), "the caption was written to"


def test_the_ratio_of_the_guidance_passes_is_that_of_whole_passes(dalle: DALLE, text: Tensor) -> None:
    guided = sample_tokens(dalle, text, range(5), seed=0, prompt=PROMPT, settings=GUIDED)
    assert guided.log_ratio is not None
    teacher_forced = log_likelihood_ratio(dalle, text.expand(5, -1), guided.ids, batch_size=2)
    assert torch.allclose(guided.log_ratio, teacher_forced, atol=1e-4)
    unguided = sample_tokens(dalle, text, range(5), seed=0, prompt=PROMPT, settings=UNGUIDED)
    assert unguided.log_ratio is not None
    expected = log_likelihood_ratio(dalle, text.expand(5, -1), unguided.ids)
    assert torch.allclose(unguided.log_ratio, expected, atol=1e-4)
    assert sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=UNGUIDED, log_ratio=False).log_ratio is None


def test_the_stream_yields_growing_prefixes(dalle: DALLE, text: Tensor) -> None:
    whole = sample_tokens(dalle, text, range(2), seed=0, prompt=PROMPT, settings=GUIDED).ids
    steps = 0
    for partial in stream_tokens(dalle, text[None], [PROMPT], [(0, 0), (0, 1)], seed=0, settings=GUIDED):
        steps += 1
        assert torch.is_grad_enabled(), "the sampler turned off the caller's gradients"
        assert partial.index == steps
        assert torch.equal(partial.ids, whole[:, :steps])
    assert steps == dalle.stream.num_image_tokens


def test_sampling_leaves_the_global_generators_alone(dalle: DALLE, text: Tensor) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample_tokens(dalle, text, range(2), seed=0, prompt=PROMPT, settings=GUIDED)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_progress_ends_at_the_total(dalle: DALLE, text: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    sample_tokens(
        dalle, text, range(5), seed=0, prompt=PROMPT, settings=GUIDED, batch_size=2, progress=lambda *c: calls.append(c)
    )
    total = 5 * dalle.stream.num_image_tokens
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_no_rows_are_no_pictures(dalle: DALLE, text: Tensor) -> None:
    samples = sample_rows(dalle, text[None], [PROMPT], [], seed=0, settings=GUIDED)
    assert samples.ids.shape == (0, dalle.stream.num_image_tokens)


def test_the_batch_that_fits_shrinks_with_guidance_and_never_to_nothing(
    dalle: DALLE, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fitting_batch_size(dalle, GUIDED) == 64
    monkeypatch.setattr("dalle_mini_impl.sampling._CACHE_BYTES", 100_000)
    assert 1 < fitting_batch_size(dalle, GUIDED) < fitting_batch_size(dalle, UNGUIDED)
    monkeypatch.setattr("dalle_mini_impl.sampling._CACHE_BYTES", 1)
    assert fitting_batch_size(dalle, GUIDED) == 1


def test_bad_requests_are_explained(bundle: Bundle, dalle: DALLE, text: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=GUIDED, batch_size=0)
    with pytest.raises(ValueError, match="1 captions came with 2 prompts"):
        sample_rows(dalle, text[None], [PROMPT, "x"], [(0, 0)], seed=0, settings=GUIDED)
    with pytest.raises(ValueError, match=r"row \(1, 0\)"):
        sample_rows(dalle, text[None], [PROMPT], [(1, 0)], seed=0, settings=GUIDED)
    with pytest.raises(ValueError, match="text_ids have shape"):
        sample_tokens(dalle, text.repeat(2), [0], seed=0, prompt=PROMPT, settings=GUIDED)
    training = tiny_bundle().dalle
    assert training is not None
    with pytest.raises(ValueError, match="training mode"):
        sample_tokens(training.train(), text, [0], seed=0, prompt=PROMPT, settings=GUIDED)


def test_prompts_of_any_length_draw_in_one_call_what_they_draw_alone(bundle: Bundle) -> None:
    stream = replace(bundle.stream, slot_step=4)
    dalle = DALLE(bundle.recipe.dalle, stream).eval()
    randomize(dalle)
    prompts = [PROMPT, "red", "a red circle to the left of a blue square on a gray background"]
    text, _ = bundle.tokenizer.batch(prompts, stream.text_length)
    assert len(stream.groups(text)) > 1
    together = sample_many(dalle, text, prompts, [0, 1], seed=3, settings=GUIDED)
    for index, prompt in enumerate(prompts):
        alone = sample_tokens(dalle, text[index], [0, 1], seed=3, prompt=prompt, settings=GUIDED)
        assert torch.equal(together.ids[2 * index : 2 * index + 2], alone.ids)
        assert together.log_ratio is not None and alone.log_ratio is not None
        assert torch.allclose(together.log_ratio[2 * index : 2 * index + 2], alone.log_ratio, atol=1e-4)
    with pytest.raises(ValueError, match="slots; draw each kind on its own"):
        stream_tokens(dalle, text, prompts, [(0, 0)], seed=3, settings=GUIDED)
