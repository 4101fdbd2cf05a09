"""Faults of the prior that are forbidden here: codes that don't come back, noise that depends on the batch."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from dalle_mini_impl.config import PriorConfig, Recipe, SamplingConfig, Stage
from dalle_mini_impl.data.embedding_cache import EmbeddingCache
from dalle_mini_impl.noise import gumbel_noise, noise_key
from dalle_mini_impl.pretrained import load_bundle, save_bundle
from dalle_mini_impl.prior import EmbeddingCodec, Prior, code_cosines
from dalle_mini_impl.stream import NULL
from dalle_mini_impl.training.run import train
from dalle_mini_impl.training.task import EvaluationContext
from dalle_mini_impl.training.tasks.prior import PriorTask
from tests.processes import train_in_processes
from tests.test_training_run import DATA, lines, recipe
from tests.test_training_tasks import batch_of, data, gradients
from tests.tiny import randomize, tiny_bundle

T, E, K, B = 5, 12, 6, 8


def _vectors(count: int, dim: int = E, seed: int = 0) -> Tensor:
    """Unit vectors that vary most along a few directions."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.7 ** torch.arange(dim, dtype=torch.float32)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)))[0]
    rows = torch.randn(count, dim, generator=generator) * scales + 0.5
    return F.normalize(rows @ mixing, dim=1)


def _prior() -> Prior:
    prior = Prior(PriorConfig(num_dims=K, num_buckets=B, num_dot_buckets=4, dim=16, layers=2, heads=2), T, 20, E)
    randomize(prior)
    prior.fit(_vectors(500), torch.linspace(-1, 1, 100))
    return prior.eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(5, 20, (3, T), generator=generator)
    text[0, 3:] = 0
    return text, _vectors(3, seed=1), torch.tensor([0, 3, 1]), torch.randint(0, B, (3, K))


def test_all_components_and_many_buckets_give_the_embedding_back() -> None:
    vectors, held_out = _vectors(4000), _vectors(200, seed=2)
    codec = EmbeddingCodec(E, E, 512)
    assert not codec.is_fitted
    codec.fit(vectors)
    assert codec.is_fitted and codec.variance_kept.item() == pytest.approx(1.0)
    assert (codec.decode(codec.encode(held_out)) * held_out).sum(dim=1).min() > 0.999
    assert torch.allclose(codec.components @ codec.components.t(), torch.eye(E), atol=1e-5)


def test_components_come_by_falling_variance_and_say_how_much_they_keep() -> None:
    vectors = _vectors(4000)
    codec = EmbeddingCodec(E, K, 16)
    codec.fit(vectors)
    variances = ((vectors - codec.mean) @ codec.components.t()).var(dim=0, correction=0)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)
    assert codec.variance_kept.item() == pytest.approx(
        (variances.sum() / vectors.var(dim=0, correction=0).sum()).item()
    )
    counts = torch.stack([torch.bincount(codes, minlength=16) for codes in codec.encode(vectors).t()])
    assert counts.min() >= 4000 / 16 - 2 and counts.max() <= 4000 / 16 + 2, "buckets are equally frequent"


def test_a_set_of_few_different_pictures_can_be_coded() -> None:
    vectors = _vectors(3).repeat(5, 1)
    codec = EmbeddingCodec(E, K, 64)
    codec.fit(vectors)
    assert codec.centres.isfinite().all()
    assert (codec.decode(codec.encode(vectors)) * vectors).sum(dim=1).min() > 0.999


def test_embeddings_of_another_space_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embeddings have shape \(4, 5\); expected \(n, 12\)"):
        EmbeddingCodec(E, K, 8).fit(torch.zeros(4, 5))


@torch.no_grad()
def test_no_logit_sees_the_code_it_predicts_or_a_later_one() -> None:
    prior, (text, vectors, dots, codes) = _prior(), _inputs()
    logits = prior(text, vectors, dots, codes)
    assert logits.shape == (3, K, B)
    for place in range(K):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % B
        after = prior(text, vectors, dots, changed)
        assert torch.equal(after[:, : place + 1], logits[:, : place + 1])
        assert place == K - 1 or not torch.allclose(after[:, place + 1 :], logits[:, place + 1 :])
    for others in ((text.flip(0), vectors, dots), (text, vectors.flip(0), dots), (text, vectors, 3 - dots)):
        assert not torch.allclose(prior(*others, codes)[:, 0], logits[:, 0]), "each condition reaches the first code"


def test_neighbouring_codes_are_alike_and_all_are_told_apart() -> None:
    cosines = F.normalize(code_cosines(256), dim=1)
    alike = cosines @ cosines.t()
    assert cosines.shape == (256, 64)
    assert alike.diagonal(1).min() > 0.7 and alike.diagonal(1).max() < 0.99
    assert alike.diagonal(30).abs().max() < 0.3
    whole = code_cosines(8)
    assert torch.linalg.matrix_rank(whole) == 8, "with few codes any distribution can be told"


def test_every_parameter_receives_gradient() -> None:
    prior, (text, vectors, dots, codes) = _prior().train(), _inputs()
    vectors[1], text[1] = 0, NULL
    prior.nll(text, vectors, dots, codes).sum().backward()
    dead = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def _slowly(prior: Prior, settings: SamplingConfig, seed: int, prompt: str, candidate: int) -> Tensor:
    """A row of the first caption without a cache: the obvious way."""
    text, vectors = (part[:1] for part in _inputs()[:2])
    dot = torch.tensor([min(3, int(settings.prior_dot * 4))])
    drawn = []
    for number in range(settings.prior_draws):
        codes = text[:, :0]
        for place in range(K):
            logits = prior(text, vectors, dot, codes)[:, -1]
            null = prior(torch.full_like(text, NULL), torch.zeros_like(vectors), dot, codes)[:, -1]
            logits = null + settings.prior_guidance * (logits - null)
            key = torch.tensor([noise_key(seed, prompt, "prior")])
            noise = gumbel_noise(key, torch.tensor([candidate]), torch.tensor([number * K + place]), B)[:, 0]
            if settings.prior_temperature:
                logits = logits / settings.prior_temperature + noise
            codes = torch.cat([codes, logits.argmax(dim=1, keepdim=True)], dim=1)
        drawn.append(prior.codec.decode(codes)[0])
    return max(drawn, key=lambda vector: float(vector @ vectors[0]))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        SamplingConfig(prior_draws=1),
        SamplingConfig(),
        SamplingConfig(prior_draws=3, prior_guidance=2.0, prior_temperature=0.5, prior_dot=1.0),
        SamplingConfig(prior_temperature=0),
    ],
    ids=["one", "two", "guided", "likeliest"],
)
def test_drawing_equals_the_slow_way_and_doesnt_depend_on_the_batch(settings: SamplingConfig) -> None:
    prior, (text, vectors, _, _) = _prior(), _inputs()
    prompts = ["a red circle", "x", "y"]
    rows = [(prompt, candidate) for prompt in range(3) for candidate in range(4)]
    drawn = prior.draw(text, vectors, prompts, rows, seed=7, settings=settings)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(12), atol=1e-5)
    for candidate in (0, 3):
        assert torch.allclose(drawn[candidate], _slowly(prior, settings, 7, prompts[0], candidate), atol=1e-5)
        alone = prior.draw(text[:1], vectors[:1], prompts[:1], [(0, candidate)], seed=7, settings=settings)
        assert torch.allclose(alone[0], drawn[candidate], atol=1e-5)
    other = prior.draw(text, vectors, prompts, rows, seed=8, settings=settings)
    assert torch.allclose(other, drawn) == (settings.prior_temperature == 0)


def test_the_priors_noise_is_not_the_pictures() -> None:
    assert noise_key(0, "a red circle", "prior") != noise_key(0, "a red circle")
    assert noise_key(0, " A  red circle", "prior") == noise_key(0, "a red circle", "prior")


def prior_task(*overrides: str) -> PriorTask:
    bundle = tiny_bundle("dalle.image_prefix=2", "prior.num_dims=4", "prior.num_buckets=4", "prior.dim=24", *overrides)
    assert bundle.clip is not None and bundle.prior is not None
    vectors = _vectors(30, bundle.recipe.clip.embed_dim).numpy().astype(np.float16)[None]
    prior = Prior(bundle.recipe.prior, bundle.stream.text_length, bundle.stream.text_vocab, 16)
    randomize(prior)
    return PriorTask(prior, data(), bundle.recipe, bundle.tokenizer, bundle.clip, EmbeddingCache(vectors))


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_cutting_a_batch_of_the_prior_up_changes_nothing(micro_batch_size: int) -> None:
    task = prior_task()
    batch = batch_of(task)
    whole_metrics, whole = gradients(task, batch, None)
    cut_metrics, cut = gradients(task, batch, micro_batch_size)
    assert cut_metrics == pytest.approx(whole_metrics, rel=1e-4)
    for name, gradient in whole.items():
        assert torch.allclose(cut[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name
    assert not any(name.startswith("clip") for name in whole), "CLIP is frozen"
    assert all(p.grad is None for p in task.clip.parameters())


def test_captions_of_the_prior_are_dropped_at_their_rate() -> None:
    task = prior_task("prior.caption_dropout=0.3")
    dropped = torch.cat([batch_of(task, step=step)["dropped"] for step in range(100)])
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert task.num_items == 22 and all(task.data.captions[index] for index in task.captioned)


def test_the_prior_is_judged_beside_its_floors(tmp_path: Path) -> None:
    task = prior_task()
    with torch.no_grad():
        metrics = task.evaluate(task.model, EvaluationContext(Accelerator(cpu=True), tmp_path, 1, None))
    assert metrics["nll_uniform"] == pytest.approx(math.log(4))
    assert metrics.keys() == {
        "nll", "nll_unigram", "nll_uniform", "cosine_drawn", "cosine_other", "cosine_caption", "cosine_codec",
        "drawn_to_caption", "variance_kept",
    }  # fmt: skip
    assert metrics["cosine_codec"] > metrics["cosine_other"]
    others = task._others(task.held_out)
    assert (others != task.held_out).all()


def test_a_recipe_asks_for_more_components_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"num_dims 300 exceeds clip\.embed_dim 256"):
        Recipe.parse({}, ["prior.num_dims=300"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages with a decoder that is conditioned on picture embeddings, and a prior."""
    out = tmp_path_factory.mktemp("runs") / "unclip"
    assert train(unclip_recipe(), DATA, out)
    return out


def unclip_recipe(*overrides: str) -> Recipe:
    settings = ["dalle.image_prefix=2", "dalle.caption_dropout=0.5", "prior.dim=16", "prior.heads=2", "prior.layers=1"]
    quick = ["steps=6", "batch_size=8", "evaluations=2", "warmup_steps=3", "precision=fp32", "optimizer=adamw"]
    return recipe(*settings, "prior.num_buckets=8", *(f"train.prior.{value}" for value in quick), *overrides)


def test_a_recipe_with_a_prefix_trains_a_prior_too(finished: Path, tmp_path: Path) -> None:
    bundle = load_bundle(finished)
    assert bundle.prior is not None and bundle.prior.codec.is_fitted
    assert bundle.dalle is not None and bundle.dalle.prefix is not None
    metrics = bundle.metadata["metrics"]
    assert list(metrics) == ["vae", "clip", "prior", "dalle"]
    assert metrics["prior"]["nll"] < metrics["prior"]["nll_uniform"] + 1 and "embedding_gain" in metrics["dalle"]
    again = load_bundle(save_bundle(bundle, tmp_path / "again"))
    assert again.prior is not None
    for name, value in bundle.prior.state_dict().items():
        assert torch.equal(again.prior.state_dict()[name], value), name
    (tmp_path / "again" / "prior.safetensors").unlink()
    assert load_bundle(tmp_path / "again").prior is None


def test_a_prior_that_nothing_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set dalle\.image_prefix"):
        train(recipe(), DATA, tmp_path / "run", stages=["prior"])


def test_embeddings_need_a_clip(tmp_path: Path) -> None:
    assert train(unclip_recipe(), DATA, tmp_path / "run", stages=["vae"])
    with pytest.raises(ValueError, match="train --stage clip first"):
        train(unclip_recipe(), DATA, tmp_path / "run", stages=["dalle"])


@pytest.mark.parametrize("stages", [["prior"], ["clip", "prior"]], ids=["the same CLIP", "another CLIP"])
def test_codes_belong_to_the_space_of_the_clip_that_there_is(
    finished: Path, tmp_path: Path, stages: list[Stage]
) -> None:
    before = load_bundle(finished).prior
    assert train(unclip_recipe(), DATA, tmp_path / "run", stages=stages, init_from=str(finished))
    after = load_bundle(tmp_path / "run").prior
    assert before is not None and after is not None
    assert torch.equal(before.codec.mean, after.codec.mean) == (stages == ["prior"])


def test_a_plain_checkpoint_gains_a_prefix_by_fine_tuning(tmp_path: Path) -> None:
    plain = tiny_bundle()
    save_bundle(plain, tmp_path / "plain")
    out, init = tmp_path / "run", str(tmp_path / "plain")
    assert train(unclip_recipe(), DATA, out, stages=["prior"], init_from=init)
    first = load_bundle(out)
    assert first.dalle is None and first.prior is not None and first.recipe.dalle.image_prefix == 2
    assert plain.vae is not None and first.vae is not None and plain.dalle is not None
    assert all(torch.equal(value, first.vae.state_dict()[name]) for name, value in plain.vae.state_dict().items())
    frozen = unclip_recipe("train.dalle.learning_rate=1e-9", "train.dalle.muon_learning_rate=1e-9")
    assert train(frozen, DATA, out, stages=["dalle"], init_from=init)
    gained = load_bundle(out).dalle
    assert gained is not None and gained.prefix is not None
    for name, value in plain.dalle.state_dict().items():
        assert torch.allclose(gained.state_dict()[name], value, atol=1e-6), name


def test_two_processes_see_the_losses_of_one(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "two")
    for later in ("prior", "dalle"):
        shutil.rmtree(out / "state" / later)
    shutil.rmtree(out / "cache")
    assert train_in_processes(unclip_recipe(), DATA, out, world_size=2, stages=("prior", "dalle")) == [0, 0]
    for stage in ("prior", "dalle"):
        for ours, theirs in zip(lines(out, stage), lines(finished, stage), strict=True):
            assert ours.pop("stage") == theirs.pop("stage")
            assert ours == pytest.approx(theirs, rel=5e-3, abs=5e-4)
