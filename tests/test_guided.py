"""VQGAN+CLIP: the score rises, the models stay as they were, the same seed gives the same picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_mini_impl import TextToImage
from dalle_mini_impl.bench import guide as bench
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.guided import (
    GuideSettings,
    GuideStep,
    Prior,
    Prompt,
    clamp_with_gradient,
    cut_out,
    guide,
    prompt_loss,
    random_cuts,
    random_ids,
    rate_share,
    spherical_distance,
)
from dalle_mini_impl.pretrained import Bundle
from dalle_mini_impl.sheet import read_metadata
from tests.tiny import tiny_bundle, tiny_checkpoint
from tests.tiny_pretrained import save_tiny_clip

QUANTIZERS = {
    "vq": ["vae.quantizer=vq"],
    "fsq": ["vae.quantizer=fsq", "vae.fsq_levels=[4,3,3]"],
    "gumbel": ["vae.quantizer=gumbel"],
}
FEW = GuideSettings(steps=20, cutouts=3, prior=0)


@pytest.fixture(params=list(QUANTIZERS))
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return tiny_bundle(*QUANTIZERS[request.param])


def parts(bundle: Bundle) -> dict[str, torch.nn.Module]:
    assert bundle.vae is not None and bundle.clip is not None and bundle.dalle is not None
    return {"vae": bundle.vae, "clip": bundle.clip, "dalle": bundle.dalle}


def tamed(bundle: Bundle) -> Bundle:
    """The bundle, with pictures in the range: beyond it, a decoder of random weights has no gradient to speak of."""
    assert bundle.vae is not None
    with torch.no_grad():
        for parameter in bundle.vae.decoder[-2].parameters():
            parameter.mul_(0.1)
    return bundle


def steps_of(bundle: Bundle, *prompts: str, settings: GuideSettings = FEW, seed: int = 0) -> list[GuideStep]:
    return list(TextToImage(bundle).guide(prompts or ("a red circle",), seed=seed, settings=settings))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


def test_latents_of_ids_have_these_ids(bundle: Bundle) -> None:
    vae = bundle.vae
    assert vae is not None
    ids = torch.arange(vae.num_codes)[: 2 * vae.grid_size**2].view(2, -1)
    latents = vae.quantizer.latents(ids, vae.grid_size)
    assert latents.shape == (2, vae.quantizer.in_channels, vae.grid_size, vae.grid_size)
    assert torch.equal(vae.quantizer.ids(latents), ids)
    assert torch.equal(vae.quantizer.log_assignment(latents).argmax(dim=2), ids)
    torch.testing.assert_close(
        vae.quantizer.log_assignment(latents).exp().sum(dim=2), torch.ones(ids.shape), atol=1e-4, rtol=1e-4
    )


def test_hard_codes_go_to_the_decoder_and_the_gradient_passes_the_rounding(bundle: Bundle) -> None:
    vae = bundle.vae
    assert vae is not None
    shape = (1, vae.quantizer.in_channels, vae.grid_size, vae.grid_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantized = vae.quantizer.straight_through(latents)
    assert torch.equal(quantized.ids, vae.quantizer.ids(latents))
    assert torch.equal(quantized.vectors, vae.quantizer.vectors(quantized.ids, vae.grid_size))
    weights = torch.randn(quantized.vectors.shape, generator=torch.Generator().manual_seed(1))
    (hard,) = torch.autograd.grad((quantized.vectors * weights).sum(), [latents])
    (soft,) = torch.autograd.grad((vae.quantizer.relaxed(latents) * weights).sum(), [latents])
    assert torch.equal(hard, soft) and hard.abs().sum() > 0
    pictures, ids = vae.decode_latents(latents)
    torch.testing.assert_close(pictures.clamp(0, 1), vae.decode(ids))


def test_the_score_rises(bundle: Bundle) -> None:
    vae, clip = bundle.vae, bundle.embedder
    assert vae is not None and clip is not None
    steps = steps_of(tamed(bundle), settings=GuideSettings(steps=30, cutouts=1, prior=0))
    assert [step.step for step in steps] == list(range(31))
    assert np.mean([step.score for step in steps[-3:]]) > steps[0].score + 0.03
    assert np.mean([step.loss for step in steps[-3:]]) < steps[0].loss
    for step in (steps[0], steps[-1]):
        picture = vae.decode(step.ids[None])
        assert torch.equal(step.picture, picture[0]), "the picture is the decode of hard codes"
        score = clip.encode_image(picture)[0] @ clip.encode_texts(["a red circle"])[0]
        assert step.score == pytest.approx(score.item(), abs=1e-5)


def test_the_shipped_checkpoint_goes_far() -> None:
    steps = list(TextToImage.from_pretrained("emoji").guide("a frog", settings=GuideSettings(steps=15, cutouts=3)))
    assert steps[-1].score > steps[0].score + 0.2


def test_guidance_leaves_the_models_untouched(bundle: Bundle) -> None:
    models = parts(bundle)
    models["clip"].train()
    models["dalle"].train()
    modes = {name: [part.training for part in model.modules()] for name, model in models.items()}
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    random_state = torch.get_rng_state()
    steps = iter(TextToImage(bundle).guide("a red circle", settings=GuideSettings(steps=3, cutouts=2, prior=0.1)))
    next(steps)
    assert not any(part.training for model in models.values() for part in model.modules())
    assert len(list(steps)) == 3
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert [part.training for part in model.modules()] == modes[name]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_modes_come_back_when_nobody_wants_more_steps(bundle: Bundle) -> None:
    models = parts(bundle)
    models["vae"].train()
    steps = TextToImage(bundle).guide("a red circle", settings=FEW)
    next(steps)
    assert not models["vae"].training
    steps.close()
    assert models["vae"].training and torch.is_grad_enabled()


def test_it_guides_where_gradients_are_off() -> None:
    with torch.no_grad():
        steps = steps_of(tamed(tiny_bundle()))
    assert steps[-1].score > steps[0].score


def test_the_same_seed_gives_the_same_picture() -> None:
    first, again, other = (steps_of(tiny_bundle(), seed=seed)[-1] for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and first.score == again.score
    assert not torch.equal(first.ids, other.ids)


def test_negative_prompts_are_left_behind() -> None:
    bundle = tiny_bundle()
    clip = bundle.embedder
    assert clip is not None

    def towards(step: GuideStep, text: str) -> float:
        return (clip.encode_image(step.picture[None])[0] @ clip.encode_texts([text])[0]).item()

    plain = steps_of(bundle, "a red circle")[-1]
    against = steps_of(bundle, "a red circle", "two small yellow stars:-2")[-1]
    assert towards(against, "two small yellow stars") < towards(plain, "two small yellow stars")


def test_a_step_goes_along_the_loss_of_these_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, texts = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (5, 2))
    weights = torch.tensor([2.0, -1.0])
    angle = torch.acos(vectors @ texts.t())
    expected = (0.5 * angle.square() * weights).sum(dim=1).mean() / 3
    torch.testing.assert_close(prompt_loss(vectors, texts, weights), expected)
    assert spherical_distance(texts, texts).abs().max() == 0
    opposite = spherical_distance(texts, -texts)
    torch.testing.assert_close(opposite, torch.full((2,), math.pi**2 / 2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("given", "text", "weight"),
    [
        ("a green heart", "a green heart", 1.0),
        (" a green heart : 0.5", "a green heart", 0.5),
        ("text:-1e0", "text", -1.0),
        ("flag: France", "flag: France", 1.0),
        ("a clock at 12:30:1", "a clock at 12:30", 1.0),
    ],
)
def test_prompts_are_read(given: str, text: str, weight: float) -> None:
    assert Prompt.parse(given) == Prompt(text, weight)


@pytest.mark.parametrize("given", ["", " ", ":1", "a heart:0", "a heart:nan", "a heart:inf", "a clock at 12:30"])
def test_prompts_that_say_nothing_clear_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="prompt "):
        Prompt.parse(given)


def test_what_cannot_be_guided_is_refused_before_the_first_step() -> None:
    bundle = tiny_bundle()
    model = TextToImage(bundle)
    with pytest.raises(ValueError, match="at least one prompt with a positive weight"):
        model.guide("text:-1", start=random_ids(model.vae, 0))
    with pytest.raises(ValueError, match=r"smallest cut-out is 1 of the picture and the largest 0.5"):
        model.guide("text", settings=GuideSettings(smallest=1.0, largest=0.5))
    for start in (torch.zeros(3, dtype=torch.long), torch.full((16,), 32), torch.full((16,), -1)):
        with pytest.raises(ValueError, match=r"expected \(16,\), ids below 32"):
            model.guide("text", start)
    assert bundle.embedder is not None
    prior = Prior(model.dalle, bundle.tokenizer.batch(["text"], bundle.stream.text_length)[0])
    with pytest.raises(ValueError, match="prior's weight is 0:"):
        guide(model.vae, bundle.embedder, [Prompt("text")], start=random_ids(model.vae, 0), settings=FEW, prior=prior)
    with pytest.raises(ValueError, match=r"prior's weight is 0.05:"):
        guide(model.vae, bundle.embedder, [Prompt("text")], start=random_ids(model.vae, 0))
    without = TextToImage(Bundle(**{**vars(bundle), "clip": None}))
    with pytest.raises(ValueError, match="has no CLIP to guide by"):
        without.guide("text")


def test_the_identity_cuts_out_the_whole_and_a_shift_shifts() -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, half, mirrored = (
        torch.eye(2, 3),
        torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
        torch.tensor([[-1.0, 0, 0], [0, 1, 0]]),
    )
    first, shifted, flipped = cut_out(picture, torch.stack([whole, half, mirrored]), 16)
    assert torch.equal(first, picture[0])
    torch.testing.assert_close(shifted[:, :, :8], picture[0, :, :, 8:])
    torch.testing.assert_close(shifted[:, :, 8:], picture[0, :, :, -1:].expand(-1, -1, 8))  # the border goes on
    torch.testing.assert_close(flipped, picture[0].flip(-1))
    assert cut_out(picture, torch.stack([whole, half]), 24).shape == (2, 3, 24, 24)
    small = cut_out(picture, torch.stack([whole, whole]), 8)
    torch.testing.assert_close(small[0], small[1])


def test_cuts_are_as_large_and_as_turned_as_the_settings_say() -> None:
    settings = GuideSettings(cutouts=400, smallest=0.5, largest=1.5, rotation=10.0)

    def cuts(flips: bool) -> Tensor:
        return random_cuts(settings, flips, torch.Generator().manual_seed(0))

    maps = cuts(False)
    assert torch.equal(maps[0], torch.eye(2, 3))
    scale = maps[1:, :, 0].norm(dim=1)
    assert 0.5 <= scale.min() < 0.55 and 1.4 < scale.max() <= 1.5
    angle = torch.atan2(maps[1:, 1, 0], maps[1:, 0, 0]) * 180 / math.pi
    assert -10 <= angle.min() < -9 and 9 < angle.max() <= 10
    assert (maps[1:, :, 2].abs() <= (1 - scale[:, None]).abs() + 1e-6).all(), "nothing is cut out beyond the picture"
    flipped = torch.linalg.det(cuts(True)[1:, :, :2]) < 0
    assert 0.4 < flipped.float().mean() < 0.6 and (torch.linalg.det(maps[:, :, :2]) > 0).all()


@pytest.mark.parametrize(
    ("prompt", "flips", "mirrored"),
    [
        ("a red circle", None, True),
        ("a circle LEFT of a star", None, False),
        ("a leftover", None, True),
        ("a circle left of a star", True, True),
        ("a red circle", False, False),
    ],
)
def test_pictures_are_mirrored_unless_a_side_is_named(
    prompt: str, flips: bool | None, mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def spy(settings: GuideSettings, flips: bool, generator: torch.Generator) -> Tensor:
        seen.append(flips)
        return random_cuts(settings, flips, generator)

    monkeypatch.setattr("dalle_mini_impl.guided.random_cuts", spy)
    steps_of(tiny_bundle(), prompt, settings=GuideSettings(steps=1, cutouts=2, flips=flips))
    assert set(seen) == {mirrored}


def test_regularisers_do_what_they_say() -> None:
    def last(**changes: float) -> GuideStep:
        return steps_of(tiny_bundle(), settings=FEW.model_copy(update=changes))[-1]

    def roughness(step: GuideStep) -> float:
        return (step.picture.diff(dim=2).square().mean() + step.picture.diff(dim=1).square().mean()).item()

    start, plain = random_ids(TextToImage(tiny_bundle()).vae, 0), last()
    assert roughness(last(smoothness=100.0)) < roughness(plain)
    assert (last(nearness=1000.0).ids == start).sum() > (plain.ids == start).sum()
    bundle = tiny_bundle()
    assert bundle.dalle is not None
    text = bundle.tokenizer.batch(["a red circle"], bundle.stream.text_length)[0]
    likely = [bundle.dalle.log_likelihood(text, step.ids[None]).item() for step in (plain, last(prior=5.0))]
    assert likely[1] > likely[0]


def test_the_rate_falls_over_the_last_half() -> None:
    assert [rate_share(done) for done in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


def test_what_is_outside_of_the_range_comes_back_and_goes_no_further() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    y = clamp_with_gradient(x)
    assert y.tolist() == [0.0, 0.5, 1.0]
    for sign, expected in ((1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, 0.0])):
        (gradient,) = torch.autograd.grad(sign * y.sum(), [x], retain_graph=True)
        assert gradient.tolist() == expected


def test_the_command_writes_picture_animation_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(tiny_checkpoint(tmp_path / "tiny"))]
    out = tmp_path / "out"
    base = ["guide", "a red circle", "two stars:-0.5", *checkpoint, "--steps", "6", "--cutouts", "3", "--out", str(out)]
    assert run(*base, "--every", "3") == 0
    assert "score " in capsys.readouterr().out
    path = out / "a-red-circle-guided-seed0.png"
    facts, bundle = read_metadata(path), TextToImage.from_pretrained(tmp_path / "tiny").bundle
    assert facts["prompts"] == [{"text": "a red circle", "weight": 1.0}, {"text": "two stars", "weight": -0.5}]
    assert facts["checkpoint_hash"] == bundle.checkpoint_hash and facts["settings"]["steps"] == 6
    assert bundle.vae is not None
    again = bundle.vae.decode(torch.tensor(facts["tokens"])[None])[0]
    assert np.abs(np.asarray(Image.open(path)) / 255 - again.permute(1, 2, 0).detach().numpy()).max() < 0.003
    written = json.loads(path.with_suffix(".json").read_text())
    assert [step["step"] for step in written["steps"]] == list(range(7))
    assert written["steps"][-1]["score"] == facts["clip_score"] != written["steps"][0]["score"]
    steps = out / "a-red-circle-guided-seed0-steps"
    assert sorted(file.name for file in steps.iterdir()) == ["0000.png", "0003.png", "0006.png"]
    assert (steps / "0006.png").read_bytes() == path.read_bytes()
    with Image.open(path.with_suffix(".gif")) as animation:
        assert animation.n_frames > 1 and animation.size == (256, 256)

    before = path.read_bytes()
    assert run(*base, "--animation", "webp") == 0
    assert path.read_bytes() == before, "the same seed writes the same picture"
    with Image.open(path.with_suffix(".webp")) as animation:
        assert animation.n_frames > 1

    start = ["--from", str(path), "--steps", "1", "--animation", "none", "--out", str(tmp_path / "more")]
    assert run("guide", "a blue square", *checkpoint, *start) == 0
    more = read_metadata(tmp_path / "more" / "a-blue-square-guided-seed0.png")
    assert more["start_tokens"] == facts["tokens"] and not list((tmp_path / "more").glob("*.gif"))

    drawn = TextToImage(bundle)("a blue square", 3, 1)[0]
    start = ["--from", "dalle", "--candidates", "3", "--steps", "1", "--out", str(tmp_path / "more")]
    assert run("guide", "a blue square", *checkpoint, *start) == 0
    more = read_metadata(tmp_path / "more" / "a-blue-square-guided-seed0.png")
    assert more["start_tokens"] == drawn.tokens.tolist()
    capsys.readouterr()
    assert run(*base[:2], *checkpoint, "--from", str(path), "--steps", "1", "--out", str(out)) == 2
    assert "is where the result would go" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"start is 'photo\.jpg'"):
        TextToImage(bundle).guide("a blue square", "photo.jpg")  # type: ignore[arg-type]
    assert run("replay", str(path)) == 2
    assert "was guided" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a heart:20"], "has weight 20"),
        (
            ["a heart", "--from", "nowhere.png"],
            '--from is \'nowhere.png\'; it must be "noise", "dalle" or a picture file',
        ),
        (["a heart", "--learning-rate", "0"], "learning_rate is 0"),
        (["a heart:-1"], "at least one prompt with a positive weight"),
    ],
)
def test_bad_options_are_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny"))
    assert run("guide", *options, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_pretrained_clip_guides(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(tiny_checkpoint(tmp_path / "tiny")), "--out", str(tmp_path / "out")]
    clip = str(save_tiny_clip(tmp_path / family, family))
    assert run("guide", "a red circle", "--clip", clip, *options, "--steps", "10", "--cutouts", "3") == 0
    written = json.loads((tmp_path / "out" / "a-red-circle-guided-seed0.json").read_text())
    assert written["clip"].startswith(f"{family}@")
    assert written["steps"][-1]["score"] > written["steps"][0]["score"]
    capsys.readouterr()


def test_the_judges_of_the_benchmark_know_right_from_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny"))
    monkeypatch.setattr(bench, "shapes_judge", lambda prompt, picture: float("red" in prompt))
    bench.main(checkpoint, "shapes", "random,noise,dalle-guided", 4, 2, 0, None, ["steps=2", "cutouts=2"], tmp_path)
    said = capsys.readouterr().out
    facts = json.loads(said.splitlines()[-1])
    assert facts == json.loads((tmp_path / "guide.json").read_text())
    assert facts["noise"]["right"] == facts["random"]["right"] == 1 and facts["settings"]["steps"] == 2
    assert (tmp_path / "sheet.png").stat().st_size > 1000
