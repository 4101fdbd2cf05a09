"""Faults of samplers that are forbidden here: biased filters, tokens that depend on the batch, guidance that fades."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_mini_impl import decoding
from dalle_mini_impl.config import SamplingConfig
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.decoding import FREE
from dalle_mini_impl.engine import Engine
from dalle_mini_impl.filters import (
    choose,
    choose_without_sorting,
    guidance_scales,
    guide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)
from dalle_mini_impl.layers.bag_attention import can_use_bags
from dalle_mini_impl.layers.packed_linear import can_pack
from dalle_mini_impl.noise import gumbel_noise, noise_key, splitmix64
from dalle_mini_impl.pretrained import Bundle
from dalle_mini_impl.sampling import (
    Samples,
    every_row,
    fitting_batch_size,
    log_likelihood_ratio,
    sample_rows,
    stream_tokens,
)
from tests.tiny import TINY_CAPTIONS, randomize, tiny_bundle

PROMPT = "a red circle"
GUIDED = SamplingConfig(guidance=3.0, top_p=0.95, precision="fp32")
UNGUIDED = SamplingConfig(guidance=1.0, top_p=1.0, precision="fp32")
GUIDED_BF16, UNGUIDED_BF16 = (each.model_copy(update={"precision": "bf16"}) for each in (GUIDED, UNGUIDED))


@pytest.fixture(
    scope="module", params=[(), ('dalle.neighbours=["above","two_left","above_right"]',)], ids=["", "neighbours"]
)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return tiny_bundle(*request.param)


@pytest.fixture(scope="module")
def dalle(bundle: Bundle) -> DALLE:
    assert bundle.dalle is not None
    return bundle.dalle


@pytest.fixture(scope="module")
def text(bundle: Bundle) -> Tensor:
    return bundle.tokenizer.batch([PROMPT], bundle.stream.text_length)[0][0]  # (T,)


def sample_tokens(dalle: DALLE, text: Tensor, candidates: Sequence[int], *, prompt: str, **options: Any) -> Samples:
    """Candidates of one prompt, whose caption is text (T,)."""
    return sample_rows(dalle, text[None], [prompt], every_row(1, candidates), **options)


def test_splitmix64_gives_the_published_words() -> None:
    words = splitmix64(torch.tensor([1234567]), torch.arange(3))
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert [word % 2**64 for word in words.tolist()] == list(published)


def _noise(seed: int = 0, prompt: str = PROMPT, candidates: int = 1, start: int = 0, end: int = 4) -> Tensor:
    keys = torch.tensor([noise_key(seed, prompt)]).expand(candidates)
    return gumbel_noise(keys, torch.arange(candidates), torch.arange(start, end), 50)


def test_noise_is_standard_gumbel() -> None:
    noise = _noise(candidates=500, end=10)  # 250,000 values
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_noise_depends_on_seed_prompt_candidate_and_position_alone() -> None:
    noise = _noise(candidates=3)
    assert torch.equal(
        noise[1:2, 2:3], gumbel_noise(torch.tensor([noise_key(0, PROMPT)]), torch.tensor([1]), torch.tensor([2]), 50)
    )
    assert torch.equal(_noise(prompt="  A RED\tcircle "), noise[:1])
    flat = torch.cat([noise, _noise(seed=1), _noise(prompt="a blue circle")]).flatten(0, 1)
    assert len(flat.unique(dim=0)) == len(flat)


def _reference_probabilities(logits: np.ndarray, settings: SamplingConfig) -> np.ndarray:
    """Temperature, top-k, top-p, min-p one obvious step at a time."""
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
    mask[weights < settings.min_p * weights.max()] = 0
    return weights * mask / (weights * mask).sum()


@pytest.mark.parametrize(
    "settings",
    [
        SamplingConfig(top_p=1.0),
        SamplingConfig(top_p=1.0, temperature=0.5),
        SamplingConfig(top_p=1.0, temperature=1.7),
        SamplingConfig(top_p=1.0, top_k=5),
        SamplingConfig(top_p=0.8),
        SamplingConfig(top_p=1.0, min_p=0.2),
        SamplingConfig(top_p=0.7, top_k=9, temperature=1.3),
        SamplingConfig(top_p=0.9, min_p=0.1, temperature=1.3),
    ],
    ids=str,
)
def test_sampled_frequencies_follow_the_filtered_distribution(settings: SamplingConfig) -> None:
    draws = 20_000
    logits = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    keys = torch.tensor([noise_key(0, "chi-square")]).expand(draws)
    gumbel = gumbel_noise(keys, torch.arange(draws), torch.tensor([0]), 24)[:, 0]
    counts = np.bincount(choose(logits.expand(draws, -1), settings, gumbel).numpy(), minlength=24)
    expected = draws * _reference_probabilities(logits.double().numpy(), settings)
    assert (counts[expected == 0] == 0).all(), "a filtered token was drawn"
    kept = expected > 0
    statistic = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 3, f"{statistic:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.95},
        {"top_p": 0.3},
        {"top_p": 0.01},
        {"top_p": 1.0},
        {"top_p": 0.8, "top_k": 6},
        {"top_p": 1.0, "top_k": 6},
        {"top_p": 1.0, "top_k": 1},
        {"top_p": 1.0, "top_k": 3, "min_p": 0.3},
        {"top_p": 0.9, "min_p": 0.2, "temperature": 1.4},
        {"top_p": 0.7, "top_k": 12, "min_p": 0.05, "temperature": 0.6},
        {"temperature": 0.0, "top_p": 0.5},
    ],
    ids=str,
)
def test_choosing_without_sorting_draws_the_same_tokens(values: dict[str, Any]) -> None:
    settings = SamplingConfig.model_validate(values)
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(500, 3, 40, generator=generator)
    keys = torch.tensor([noise_key(0, "x")]).expand(500)
    gumbel = gumbel_noise(keys, torch.arange(500), torch.arange(3), 40)
    before = logits.clone(), gumbel.clone()
    assert torch.equal(choose_without_sorting(logits, settings, gumbel), choose(logits, settings, gumbel))
    assert torch.equal(logits, before[0]) and torch.equal(gumbel, before[1])


def test_filters_keep_what_they_should_and_leave_their_input_alone() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).log_softmax(dim=-1)
    before = logits.clone()
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, False, True]]
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 9) is logits
    assert keep_top_p(logits, 0.01).isfinite().tolist() == [[False, True, False, False]]
    assert keep_top_p(logits, 0.8).isfinite().tolist() == [[False, True, False, True]]
    assert keep_min_p(logits, 0.3).isfinite().tolist() == [[False, True, False, True]]
    assert keep_min_p(logits, 1.0).isfinite().tolist() == [[False, True, False, False]]
    assert keep_min_p(logits, 0.0) is logits
    assert torch.equal(logits, before)


def test_temperature_zero_takes_the_likeliest_token(dalle: DALLE, text: Tensor) -> None:
    settings = SamplingConfig(temperature=0.0, guidance=1.0, precision="fp32")
    drawn = sample_tokens(dalle, text, [0, 7], seed=5, prompt=PROMPT, settings=settings).ids
    assert torch.equal(drawn[0], drawn[1])
    greedy = dalle.generate(text[None], lambda logits, _: logits.argmax(dim=-1))
    assert torch.equal(drawn[:1], greedy)


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 5.0), ("linear", 3.0), ("cosine", 3.0)])
def test_guidance_schedules_run_from_one_to_the_scale(schedule: str, middle: float) -> None:
    settings = SamplingConfig.model_validate({"guidance": 5.0, "guidance_schedule": schedule})
    scales = guidance_scales(settings, 11)
    assert scales[0] == (5.0 if schedule == "constant" else 1.0)
    assert scales[5] == pytest.approx(middle)
    assert scales[-1] == pytest.approx(5.0)
    assert scales == sorted(scales)
    late = guidance_scales(settings.model_copy(update={"guidance_power": 2.0}), 11)
    assert late[0] == scales[0] and late[-1] == scales[-1]
    assert (late[5] < scales[5]) == (schedule == "cosine")
    assert guidance_scales(settings, 1) == [5.0]


def test_guidance_one_is_exactly_no_guidance() -> None:
    conditional, null = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    guided = guide(conditional, null, torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(guided[:, 0], conditional[:, 0])
    assert torch.allclose(guided[:, 1], null[:, 1])
    assert torch.allclose(guided[:, 2], 2 * conditional[:, 2] - null[:, 2], atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_sampler_equals_the_slow_reference(dalle: DALLE, text: Tensor, schedule: str, guidance: float) -> None:
    settings = SamplingConfig.model_validate(
        {"guidance": guidance, "guidance_schedule": schedule, "top_k": 20, "precision": "fp32"}
    )
    num_tokens = dalle.stream.num_image_tokens
    keys = torch.tensor([noise_key(2, PROMPT)]).expand(3)
    noise = gumbel_noise(keys, torch.arange(3), torch.arange(num_tokens), dalle.stream.image_vocab)
    slow = dalle.generate(
        text.expand(3, -1),
        lambda logits, index: choose(logits, settings, noise[:, index]),
        guidance=lambda index: guidance_scales(settings, num_tokens)[index],
    )
    ways: list[dict[str, Any]] = [*({"window": window} for window in (1, 2, 5, 99)), {"fixed": "eager"}]
    for way in ways:
        fast = sample_tokens(dalle, text, range(3), seed=2, prompt=PROMPT, settings=settings, **way)
        assert torch.equal(fast.ids, slow), way


def test_a_compiled_step_draws_what_an_eager_one_draws(
    dalle: DALLE, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole, but not turned into C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    eager, compiled = (
        sample_tokens(dalle, text, [0, 1], seed=0, prompt=PROMPT, settings=GUIDED, fixed=fixed)
        for fixed in ("eager", "compile")
    )
    assert torch.equal(eager.ids, compiled.ids)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [GUIDED, UNGUIDED, GUIDED_BF16, UNGUIDED_BF16],
    ids=["guided", "unguided", "guided-bf16", "unguided-bf16"],
)
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
    together = sample_rows(dalle, text_ids, TINY_CAPTIONS, every_row(3, [0, 5]), seed=0, settings=GUIDED, batch_size=4)
    for index, prompt in enumerate(TINY_CAPTIONS):
        alone = sample_tokens(dalle, text_ids[index], [0, 5], seed=0, prompt=prompt, settings=GUIDED)
        assert torch.equal(together.ids[2 * index : 2 * index + 2], alone.ids)
        assert together.log_ratio is not None and alone.log_ratio is not None
        assert torch.allclose(together.log_ratio[2 * index : 2 * index + 2], alone.log_ratio, atol=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Tensor]]:
    """Rows, tokens and logits of every pass over picture tokens."""
    seen: list[tuple[int, int, Tensor]] = []
    extend = Engine.extend

    def spy(self: Engine, ids: Tensor, *args: Any) -> Tensor:
        logits = extend(self, ids, *args)
        seen.append((*ids.shape, logits))
        return logits

    monkeypatch.setattr(Engine, "extend", spy)
    return seen


def test_where_the_scale_is_one_no_null_pass_is_paid_for(
    dalle: DALLE, text: Tensor, passes: list[tuple[int, int, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = dalle.stream.num_image_tokens - 1
    sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=UNGUIDED, log_ratio=False)
    assert [shape[:2] for shape in passes] == [(3, 1)] * steps
    passes.clear()
    sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=GUIDED)
    assert [shape[:2] for shape in passes] == [(6, 1)] * steps
    passes.clear()
    scales = [1.0] * 6 + [3.0] * (steps - 5)
    monkeypatch.setattr("dalle_mini_impl.decoding.guidance_scales", lambda *_: scales)
    late = sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=GUIDED)
    assert [shape[:2] for shape in passes] == [(3, 1)] * 5 + [(3, 5)] + [(6, 1)] * (steps - 5)
    assert late.log_ratio is not None
    whole = log_likelihood_ratio(dalle, text.expand(3, -1), late.ids)
    assert torch.allclose(late.log_ratio, whole, atol=1e-4)
    for window in (2, 4, 50):
        again = sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=GUIDED, window=window)
        assert torch.equal(again.ids, late.ids)
        assert again.log_ratio is not None and torch.allclose(again.log_ratio, late.log_ratio, atol=1e-4)


def test_guidance_doesnt_fade_after_the_first_token(
    dalle: DALLE, text: Tensor, passes: list[tuple[int, int, Tensor]]
) -> None:
    given = text.clone()
    sample_tokens(dalle, given, range(2), seed=0, prompt=PROMPT, settings=GUIDED, window=1)
    differences = [(logits[:2] - logits[2:]).abs().max().item() for _, _, logits in passes]
    assert len(differences) == dalle.stream.num_image_tokens - 1
    assert min(differences) > 0.01
    assert torch.equal(given, text), "the caption was written to"


def test_several_tokens_at_a_time_take_fewer_passes(
    dalle: DALLE, text: Tensor, passes: list[tuple[int, int, Tensor]]
) -> None:
    """A greedy picture settles into repeats, which are easy to guess."""
    greedy = SamplingConfig(temperature=0.0, guidance=1.0, precision="fp32")
    one = sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=greedy, log_ratio=False, window=1)
    num_single = len(passes)
    passes.clear()
    many = sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=greedy, log_ratio=False, window=8)
    assert torch.equal(one.ids, many.ids)
    assert len(passes) < num_single == dalle.stream.num_image_tokens - 1


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("settings", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_given_tokens_stay_and_the_others_follow_from_them(
    dalle: DALLE, text: Tensor, settings: SamplingConfig, window: int
) -> None:
    def draw(known: Tensor) -> Samples:
        return sample_tokens(dalle, text, [4, 9], seed=0, prompt=PROMPT, settings=settings, known=known, window=window)

    num_tokens = dalle.stream.num_image_tokens
    nothing = torch.full((2, num_tokens), FREE)
    free = draw(nothing)
    plain = sample_tokens(dalle, text, [4, 9], seed=0, prompt=PROMPT, settings=settings)
    assert torch.equal(free.ids, plain.ids)
    for first in (1, 5, num_tokens - 1, num_tokens):
        known = nothing.clone()
        known[:, :first] = free.ids[:, :first]
        again = draw(known)
        assert torch.equal(again.ids, free.ids), "its own first tokens are completed to the same picture"
        assert again.log_ratio is not None
        drawn = log_likelihood_ratio(dalle, text.expand(2, -1), again.ids, known=known)
        assert torch.allclose(again.log_ratio, drawn, atol=1e-4)
    known = nothing.clone()
    known[0, [0, 7, 8]] = torch.tensor([3, 1, 2])  # the other picture is free
    partly = draw(known)
    assert partly.ids[0, [0, 7, 8]].tolist() == [3, 1, 2]
    assert torch.equal(partly.ids[1], free.ids[1])
    assert not torch.equal(partly.ids[0], free.ids[0])
    with pytest.raises(ValueError, match="known has shape"):
        draw(known[:1])
    with pytest.raises(ValueError, match="known ids must be below 32"):
        draw(torch.full((2, num_tokens), 32))


@pytest.mark.parametrize("settings", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_given_tokens_are_read_in_parts_as_at_once(
    dalle: DALLE, text: Tensor, settings: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = sample_tokens(dalle, text, [4, 9], seed=0, prompt=PROMPT, settings=settings).ids
    known[:, 9:] = FREE
    found = []
    for at_once in (2, 64):
        monkeypatch.setattr(decoding, "_READ_AT_ONCE", at_once)
        found.append(sample_tokens(dalle, text, [4, 9], seed=1, prompt=PROMPT, settings=settings, known=known))
    assert torch.equal(found[0].ids, found[1].ids)
    assert found[0].log_ratio is not None and found[1].log_ratio is not None
    assert torch.allclose(found[0].log_ratio, found[1].log_ratio, atol=1e-5)


def test_the_ratio_of_the_guidance_passes_is_that_of_whole_passes(dalle: DALLE, text: Tensor) -> None:
    guided = sample_tokens(dalle, text, range(5), seed=0, prompt=PROMPT, settings=GUIDED)
    assert guided.log_likelihood is not None
    of_captions = dalle.log_likelihood(text.expand(5, -1), guided.ids)
    assert torch.allclose(guided.log_likelihood, of_captions, atol=1e-4)
    assert guided.log_ratio is not None
    teacher_forced = log_likelihood_ratio(dalle, text.expand(5, -1), guided.ids, batch_size=2)
    assert torch.allclose(guided.log_ratio, teacher_forced, atol=1e-4)
    unguided = sample_tokens(dalle, text, range(5), seed=0, prompt=PROMPT, settings=UNGUIDED)
    assert unguided.log_likelihood is not None
    of_captions = dalle.log_likelihood(text.expand(5, -1), unguided.ids)
    assert torch.allclose(unguided.log_likelihood, of_captions, atol=1e-4)
    assert unguided.log_ratio is not None
    expected = log_likelihood_ratio(dalle, text.expand(5, -1), unguided.ids)
    assert torch.allclose(unguided.log_ratio, expected, atol=1e-4)
    assert sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=UNGUIDED, log_ratio=False).log_ratio is None


@pytest.mark.parametrize("num_rows", [2, 3])
def test_the_stream_yields_growing_prefixes(dalle: DALLE, text: Tensor, num_rows: int) -> None:
    """One token longer each, or, for one or two pictures, several."""
    rows = every_row(1, range(num_rows))
    whole = sample_tokens(dalle, text, range(num_rows), seed=0, prompt=PROMPT, settings=GUIDED).ids
    drawn = 0
    for partial in stream_tokens(dalle, text[None], [PROMPT], rows, seed=0, settings=GUIDED):
        assert partial.index > drawn if num_rows == 2 else partial.index == drawn + 1
        drawn = partial.index
        assert torch.is_grad_enabled(), "the sampler turned off the caller's gradients"
        assert torch.equal(partial.ids, whole[:, :drawn])
    assert drawn == dalle.stream.num_image_tokens


@pytest.mark.parametrize("settings", [GUIDED_BF16, UNGUIDED_BF16], ids=["guided", "unguided"])
def test_in_bf16_too_guessing_changes_no_bit(dalle: DALLE, text: Tensor, settings: SamplingConfig) -> None:
    """On CPUs with the kernels that give each row its own bits; tokens may differ where PyTorch lacks them."""
    if not (can_pack(torch.device("cpu")) and can_use_bags(torch.device("cpu"))):
        pytest.skip("this build of PyTorch lacks the kernels")
    single, several = (
        sample_tokens(dalle, text, range(3), seed=0, prompt=PROMPT, settings=settings, window=window)
        for window in (1, 5)
    )
    assert torch.equal(single.ids, several.ids)


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
    monkeypatch.setattr("dalle_mini_impl.sampling.free_bytes", lambda device: 3_000_000)
    assert 1 < fitting_batch_size(dalle, GUIDED) < fitting_batch_size(dalle, UNGUIDED)
    monkeypatch.setattr("dalle_mini_impl.sampling.free_bytes", lambda device: 1)
    assert fitting_batch_size(dalle, GUIDED) == 1


def test_bad_requests_are_explained(bundle: Bundle, dalle: DALLE, text: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=GUIDED, batch_size=0)
    with pytest.raises(ValueError, match="window is 0"):
        sample_tokens(dalle, text, [0], seed=0, prompt=PROMPT, settings=GUIDED, window=0)
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
    together = sample_rows(dalle, text, prompts, every_row(3, [0, 1]), seed=3, settings=GUIDED)
    for index, prompt in enumerate(prompts):
        alone = sample_tokens(dalle, text[index], [0, 1], seed=3, prompt=prompt, settings=GUIDED)
        assert torch.equal(together.ids[2 * index : 2 * index + 2], alone.ids)
        assert together.log_ratio is not None and alone.log_ratio is not None
        assert torch.allclose(together.log_ratio[2 * index : 2 * index + 2], alone.log_ratio, atol=1e-4)
    with pytest.raises(ValueError, match="slots; draw each kind on its own"):
        stream_tokens(dalle, text, prompts, [(0, 0)], seed=3, settings=GUIDED)
