"""Faults of discrete VAEs forbidden here: collapsed codebooks, cut gradients, codes that decode to something else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from dalle_mini_impl.config import Recipe, VAEConfig
from dalle_mini_impl.vae.losses import (
    from_logit_laplace,
    laplacian_distance,
    logit_laplace_nll,
    mixed_loss,
    psnr,
    reconstruction_metrics,
    ssim,
)
from dalle_mini_impl.vae.model import DiscreteVAE
from dalle_mini_impl.vae.quantizers import (
    FiniteScalarQuantizer,
    GumbelQuantizer,
    Quantized,
    VectorQuantizer,
    usage_and_perplexity,
)
from tests.tiny import randomize

SIZE, GRID = 16, 4
SMALL: dict[str, Any] = {
    "downsample": 4,
    "patch": 2,
    "width": 8,
    "latent_width": 16,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "codebook_size": 24,
    "code_dim": 4,
    "fsq_levels": (4, 3, 2),
}
KINDS = ["vq", "fsq", "gumbel"]


def _config(quantizer: str = "vq", **changes: Any) -> VAEConfig:
    return VAEConfig.model_validate(SMALL | {"quantizer": quantizer} | changes)


def _vae(quantizer: str = "vq", **changes: Any) -> DiscreteVAE:
    vae = DiscreteVAE(_config(quantizer, **changes), SIZE)
    randomize(vae, scale=0.3)
    return vae


def _images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def _latents(vectors: Tensor) -> Tensor:
    """(n, C) rows as a grid (1, C, 1, n)."""
    return vectors.t()[None, :, None, :]


# --- the model ---


@pytest.mark.parametrize("reconstruction", ["mixed", "logit_laplace"])
@pytest.mark.parametrize("quantizer", KINDS)
def test_pictures_come_back_in_their_shape_and_range(quantizer: str, reconstruction: str) -> None:
    vae = _vae(quantizer, reconstruction=reconstruction).eval()
    ids = vae.encode(_images())
    assert (ids.shape, ids.dtype) == ((3, GRID * GRID), torch.int64)
    assert int(ids.min()) >= 0 and int(ids.max()) < vae.num_codes == vae.config.num_codes == 24
    everything = torch.arange(3 * GRID * GRID).view(3, -1) % vae.num_codes
    randomize(vae.decoder, seed=5, scale=10)  # a wild decoder leaves the range
    pictures = vae.decode(everything)
    assert (pictures.shape, pictures.dtype) == ((3, 3, SIZE, SIZE), torch.float32)
    assert pictures.min().item() == 0.0 and pictures.max().item() == 1.0


@pytest.mark.parametrize("reconstruction", ["mixed", "logit_laplace"])
@pytest.mark.parametrize("quantizer", KINDS)
def test_decoded_ids_are_the_evaluated_reconstruction(quantizer: str, reconstruction: str) -> None:
    vae = _vae(quantizer, reconstruction=reconstruction).eval()
    output = vae(_images())
    ids = vae.encode(_images())
    assert torch.equal(output.quantized.ids, ids)
    assert torch.allclose(vae.decode(ids), output.reconstruction.clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("quantizer", KINDS)
def test_ids_are_row_by_row(quantizer: str) -> None:
    vae = _vae(quantizer).eval()
    latents = torch.randn(1, vae.quantizer.in_channels, GRID, GRID)
    changed = latents.clone()
    changed[:, :, 1, 2] *= -5
    differs = vae.quantizer.ids(latents) != vae.quantizer.ids(changed)
    assert differs[0].nonzero().tolist() == [[1 * GRID + 2]]
    ids = torch.zeros(1, GRID * GRID, dtype=torch.long)
    ids[0, 1 * GRID + 2] = 23
    vectors = vae.quantizer.vectors(ids, GRID)
    assert (vectors != vectors[:, :, :1, :1]).any(dim=1)[0].nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("quantizer", KINDS)
def test_the_reconstruction_trains_the_encoder_through_the_codes(quantizer: str) -> None:
    vae = _vae(quantizer, commitment_weight=0.0, kl_weight=0.0).train()
    vae.loss(_images(), progress=0.5)
    vae.after_step()  # vq has a codebook from here on
    loss, terms = vae.loss(_images(), progress=0.5, generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == pytest.approx(sum(term.item() for term in terms.values()))
    assert not any(term.requires_grad for term in terms.values())
    dead = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("quantizer", KINDS)
def test_the_loss_is_a_mean_over_the_batch(quantizer: str) -> None:
    # In evaluation no codebook moves and no noise is drawn; the balance of codes is a matter of the whole batch.
    vae = _vae(quantizer, balance_weight=0.0).eval()
    images = _images(4)
    whole = vae.loss(images)[0].item()
    parts = [vae.loss(images[i : i + 1])[0].item() for i in range(4)]
    assert whole == pytest.approx(sum(parts) / 4, rel=1e-5)


@pytest.mark.parametrize("quantizer", KINDS)
def test_training_can_fit_a_picture(quantizer: str) -> None:
    vae = DiscreteVAE(_config(quantizer, quantize_after=0.1, kl_weight=0.1), SIZE).train()
    images = F.interpolate(_images(4)[:, :, :4, :4], scale_factor=4)  # a colour a cell
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    first = vae.loss(images, 0.0, generator)[0].item()
    for step in range(100):
        loss, _ = vae.loss(images, step / 100, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        vae.after_step(generator)
    assert loss.item() < 0.5 * first
    with torch.no_grad():
        better = psnr(images, vae.eval().decode(vae.encode(images))).mean()
    grey = psnr(images, images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)).mean()
    assert better > grey + 2  # dB


@pytest.mark.parametrize("quantizer", KINDS)
def test_adamw_keeps_the_kernels_that_make_codes_and_that_paint(quantizer: str) -> None:
    vae = _vae(quantizer)
    kernels = {name for name, p in vae.named_parameters() if p.ndim == 4}
    muons = {id(p) for p in vae.hidden_matrices()}
    codes, paint = f"encoder.{len(vae.encoder) - 1}.weight", f"decoder.{len(vae.decoder) - 2}.weight"
    assert {codes, paint} == {name for name, p in vae.named_parameters() if name in kernels and id(p) not in muons}
    assert len(muons) == len(kernels) - 2


@pytest.mark.parametrize("downsample", [4, 8, 16])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_every_stem_fits_every_grid(downsample: int, patch: int) -> None:
    vae = DiscreteVAE(_config(downsample=downsample, patch=patch), 32).eval()
    ids = vae.encode(torch.rand(1, 3, 32, 32))
    assert ids.shape == (1, (32 // downsample) ** 2)
    assert vae.decode(ids).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [12, 20, 36, 100])
def test_sizes_that_arent_powers_of_two_have_a_loss(size: int) -> None:
    vae = DiscreteVAE(_config(), size)
    loss, _ = vae.loss(torch.rand(1, 3, size, size), 1.0)
    assert loss.isfinite()


def test_wrong_shapes_and_sizes_are_refused_by_name() -> None:
    vae = _vae()
    with pytest.raises(ValueError, match="image size 18 is not a multiple of"):
        DiscreteVAE(_config(), 18)
    for read in (vae.encode, vae.loss, vae.forward):
        with pytest.raises(ValueError, match=r"images have shape \(3, 3, 8, 8\); expected \(B, 3, 16, 16\)"):
            read(_images()[:, :, :8, :8])
    with pytest.raises(ValueError, match=r"ids have shape \(3, 15\); expected \(B, 16\)"):
        vae.decode(torch.zeros(3, 15, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 8, "downsample": 4}, ["vae.patch is 8", "vae.downsample 4"]),
        ({"quantizer": "pq"}, ["quantizer", "pq"]),
        ({"fsq_levels": (8, 1)}, ["fsq_levels", "1"]),
        ({"quantizer": "fsq", "fsq_levels": (16, 16, 16, 17)}, ["fsq_levels", "69632"]),
        ({"quantizer": "fsq", "fsq_levels": ()}, ["fsq_levels", "1 codes"]),
        ({"codebook_decay": 1.5}, ["codebook_decay", "1.5"]),
        ({"temperature_final": 0}, ["temperature_final", "0"]),
    ],
    ids=str,
)
def test_impossible_recipes_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Recipe.parse({"vae": changes})
    for word in words:
        assert word in str(error.value)


# --- vq ---


def _vq(**changes: Any) -> VectorQuantizer:
    return VectorQuantizer(_config("vq", **changes)).train()


def _unit_rows(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def _step(vq: VectorQuantizer, latents: Tensor, progress: float = 1.0, generator: Any = None) -> Quantized:
    """An optimizer step's part in the codebook."""
    quantized: Quantized = vq(latents, progress)
    vq.observe(quantized)
    vq.after_step(generator)
    return quantized


def test_a_codebook_starts_from_encoder_outputs_once_quantizing_starts() -> None:
    vq = _vq(quantize_after=0.1, codebook_size=8)
    random_start = vq.codebook.clone()
    latents = _latents(3 * _unit_rows(50)).requires_grad_()
    for progress in (0.05, 0.1):  # at 0.1 the codebook isn't there before the end of the step
        before = _step(vq, latents, progress)
        assert not before.losses
        assert torch.allclose(before.vectors[0, :, 0].t(), 2 * _unit_rows(50), atol=1e-5)  # √4 long, not quantized
        assert torch.equal(vq.codebook, random_start) == (progress < 0.1)
    nearest = (vq.codebook @ _unit_rows(50).t()).amax(dim=1)
    assert int(vq.updates) == 1 and nearest.min() > 0.9
    assert "commitment" in _step(vq, latents, 0.05).losses  # once started it never stops again
    assert int(vq.updates) == 2


def test_quantizing_from_the_start_needs_no_share_of_the_run() -> None:
    vq = _vq(quantize_after=0.0)
    _step(vq, _latents(_unit_rows(50)), 0.0)
    assert "commitment" in vq(_latents(_unit_rows(50)), 0.0).losses


def test_a_step_that_was_skipped_leaves_no_trace_in_the_codebook() -> None:
    vq = _vq(quantize_after=0.0)
    _step(vq, _latents(_unit_rows(50)))
    twin = copy.deepcopy(vq)
    broken = vq(_latents(torch.full((50, 4), float("nan"))), 1.0)
    assert torch.equal(vq.codebook, twin.codebook)  # quantizing alone changes nothing
    vq.observe(broken)
    for each in (vq, twin):
        each.before_step()
        _step(each, _latents(_unit_rows(50, seed=1)), generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in vq.state_dict().items())


def test_codes_are_the_nearest_on_the_sphere_and_their_gradient_passes_straight() -> None:
    vq = _vq(codebook_size=8).eval()
    latents = _latents(5 * _unit_rows(30)).requires_grad_()
    quantized = vq(latents, 1.0)
    distance = torch.cdist(_unit_rows(30), vq.codebook)
    assert torch.equal(quantized.ids[0], distance.argmin(dim=1))
    assert torch.allclose(quantized.vectors, vq.vectors(quantized.ids, 1), atol=1e-6)
    expected = 0.25 * (_unit_rows(30) - vq.codebook[quantized.ids[0]]).square().sum(dim=1).mean()
    assert quantized.losses["commitment"].item() == pytest.approx(expected.item(), rel=1e-5)
    target = torch.randn(4)
    (gradient,) = torch.autograd.grad((quantized.vectors[0, :, 0].t() @ target).sum(), latents)
    fresh = _latents(5 * _unit_rows(30)).requires_grad_()
    (straight,) = torch.autograd.grad((2 * F.normalize(fresh[0, :, 0].t(), dim=1) @ target).sum(), fresh)
    assert torch.allclose(gradient, straight, atol=1e-6) and gradient.abs().max() > 0


def test_the_codebook_moves_as_a_slow_average_would() -> None:
    vq = _vq(quantize_after=0.0, codebook_size=3, codebook_decay=0.6, dead_code_share=0.0)
    _step(vq, _latents(_unit_rows(40)), generator=torch.Generator().manual_seed(0))
    counts, sums, codebook = vq.ema_counts.clone(), vq.ema_sums.clone(), vq.codebook.clone()
    for update in range(2, 14):
        rows = _unit_rows(40, seed=update)
        decay = min(0.6, (update + 1) / (update + 10))  # faster at first
        new_counts, new_sums = torch.zeros(3), torch.zeros(3, 4)
        for row in rows:
            code = max(range(3), key=lambda k: float(row @ codebook[k]))
            new_counts[code] += 1
            new_sums[code] += row
        counts = decay * counts + (1 - decay) * new_counts
        sums = decay * sums + (1 - decay) * new_sums
        codebook = sums / sums.norm(dim=1, keepdim=True)
        _step(vq, _latents(rows))
        assert torch.allclose(vq.ema_counts, counts, atol=1e-4)
        assert torch.allclose(vq.codebook, codebook, atol=1e-4), update


def test_dead_codes_restart_from_encoder_outputs() -> None:
    vq = _vq(quantize_after=0.0, codebook_size=16, dead_code_share=0.2, codebook_decay=0.5)
    _step(vq, _latents(_unit_rows(64)))
    rows = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.3 * torch.randn(64, 4), dim=1)  # all moved to one corner
    for _ in range(12):
        _step(vq, _latents(rows))
    assert (vq.codebook @ rows.t()).amax(dim=1).min() > 0.8  # no code is left behind
    counts = torch.bincount(vq.ids(_latents(rows))[0], minlength=16)
    assert usage_and_perplexity(counts)[1] > 8


def test_the_balance_term_is_zero_for_even_use_and_pushes_a_collapsed_encoder_apart() -> None:
    vq = _vq(codebook_size=4, balance_weight=1.0).eval()
    vq.codebook.copy_(torch.eye(4))
    even = vq(_latents(torch.eye(4).repeat(5, 1)), 1.0).losses["balance"].item()
    assert even == pytest.approx(0.0, abs=1e-4)
    latents = _latents(torch.tensor([[1.0, 0.1, 0.2, 0.3]]).repeat(20, 1)).requires_grad_()
    collapsed = vq(latents, 1.0).losses["balance"]
    assert collapsed.item() == pytest.approx(math.log(4), abs=1e-3)
    (gradient,) = torch.autograd.grad(collapsed, latents)
    assert (gradient[0, 0] > 0).all() and (gradient[0, 1:] < 0).any()  # away from the one code in use
    assert "balance" not in _vq(balance_weight=0.0).eval()(latents, 1.0).losses


def test_evaluation_and_half_precision_leave_the_codebook_alone() -> None:
    vae = _vae("vq").eval()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.encode(_images())
    vae.loss(_images())
    with torch.autocast("cpu", torch.bfloat16):
        vae.loss(_images())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_the_nearest_code_is_that_of_fp32_inside_of_an_autocast() -> None:
    vq = _vq(codebook_size=512)
    vq.codebook.copy_(_unit_rows(512, seed=1))
    latents = _latents(_unit_rows(2000, seed=2))
    expected = vq.ids(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.ids(latents), expected)


def test_a_trained_codebook_is_part_of_the_checkpoint() -> None:
    vae, fresh = _vae("vq", quantize_after=0.0).train(), _vae("vq")
    vae.loss(_images())
    vae.after_step()
    assert fresh.load_state_dict(vae.state_dict()) == _IncompatibleKeys([], [])
    assert torch.equal(fresh.eval().encode(_images()), vae.eval().encode(_images()))


# --- fsq ---


def test_every_fsq_id_survives_the_round_trip() -> None:
    fsq = FiniteScalarQuantizer(_config("fsq", fsq_levels=(8, 5, 3)))
    ids = torch.arange(120)[None]
    vectors = fsq.vectors(ids, 10)
    assert vectors.shape == (1, 3, 10, 12)
    assert (vectors.min().item(), vectors.max().item()) == (-1.0, 1.0)
    levels = torch.stack([(ids[0] // basis) % size for basis, size in ((1, 8), (8, 5), (40, 3))], dim=1)
    share = (levels + 0.5) / torch.tensor([8, 5, 3])  # the middle of each level
    latents = (share / (1 - share)).log().t().view(1, 3, 10, 12)
    assert torch.equal(fsq.ids(latents), ids)
    quantized = fsq(latents, 0.0)
    assert torch.equal(quantized.ids, ids)
    assert torch.allclose(quantized.vectors, vectors, atol=1e-6)
    assert not quantized.losses


@pytest.mark.parametrize("extreme", [-1000.0, -20.0, 20.0, 1000.0])
def test_saturated_fsq_latents_stay_inside_of_the_codebook(extreme: float) -> None:
    fsq = FiniteScalarQuantizer(_config("fsq", fsq_levels=(8, 5, 3)))
    quantized = fsq(torch.full((1, 3, 1, 1), extreme), 1.0)
    assert quantized.ids.item() == (0 if extreme < 0 else 119)
    assert torch.equal(quantized.vectors, fsq.vectors(quantized.ids, 1))
    assert quantized.vectors.abs().max() <= 1


def test_fsq_levels_are_equally_wide() -> None:
    fsq = FiniteScalarQuantizer(_config("fsq", fsq_levels=(5,)))
    share = (torch.arange(1000) + 0.5) / 1000
    ids = fsq.ids((share / (1 - share)).log().view(1, 1, 1, 1000))
    assert torch.bincount(ids[0]).tolist() == [200] * 5


# --- gumbel ---


def test_gumbel_schedules_run_over_their_share_of_the_run() -> None:
    gumbel = GumbelQuantizer(_config("gumbel", temperature_anneal=0.8, kl_warmup=0.2))
    assert gumbel.temperature(0.0) == pytest.approx(1.0)
    assert gumbel.temperature(0.4) == pytest.approx((1 + 1 / 16) / 2)
    for done in (0.8, 0.9, 1.0):
        assert gumbel.temperature(done) == pytest.approx(1 / 16)
    assert [gumbel.kl_weight(done) for done in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.0, 3.3, 6.6, 6.6])
    quarter = (1 - 0.5**0.5) / 2  # of a cosine's half-period
    assert gumbel.kl_weight(0.05) == pytest.approx(6.6 * quarter)
    assert gumbel.temperature(0.2) == pytest.approx(1 - 15 / 16 * quarter)
    still = GumbelQuantizer(_config("gumbel", temperature_anneal=0.0, kl_warmup=0.0))
    assert (still.temperature(0.0), still.kl_weight(0.0)) == (pytest.approx(1 / 16), pytest.approx(6.6))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_kl_is_a_picture_s_and_ignores_the_size_of_the_batch(batch: int) -> None:
    gumbel = GumbelQuantizer(_config("gumbel", kl_weight=1.0)).eval()
    one = torch.randn(1, 24, 2, 2)
    probabilities = one.softmax(dim=1)
    expected = (probabilities * (probabilities * 24).log()).sum().item()  # of the whole picture
    assert gumbel(one.expand(batch, -1, -1, -1), 1.0).losses["kl"].item() == pytest.approx(expected, rel=1e-4)
    vae = _vae("gumbel", kl_weight=1.0).eval()
    images = _images(1)
    expected = vae(images).quantized.losses["kl"].item() / images.numel()
    assert vae.loss(images.expand(batch, -1, -1, -1))[1]["kl"].item() == pytest.approx(expected, rel=1e-4)


def test_uniform_codes_have_no_kl() -> None:
    gumbel = GumbelQuantizer(_config("gumbel")).eval()
    assert gumbel(torch.zeros(2, 24, 3, 3), 1.0).losses["kl"].item() == pytest.approx(0.0, abs=1e-4)


def test_gumbel_samples_follow_the_logits_and_are_soft_only_in_training() -> None:
    gumbel = GumbelQuantizer(_config("gumbel", codebook_size=3, latent_width=3, temperature_final=0.001))
    with torch.no_grad():
        gumbel.codebook.weight.copy_(torch.eye(3))
    logits = torch.tensor([2.0, 1.0, 0.0])
    latents = logits[None, :, None, None].expand(1, 3, 100, 100)
    drawn = gumbel.train()(latents, 1.0, torch.Generator().manual_seed(0)).vectors.mean(dim=(0, 2, 3))
    assert torch.allclose(drawn, logits.softmax(dim=0), atol=0.02)
    soft = gumbel(latents, 0.0, torch.Generator().manual_seed(0)).vectors
    assert ((soft > 0.05) & (soft < 0.95)).float().mean() > 0.3
    assert gumbel.eval()(latents, 0.0).vectors.unique().tolist() == [0.0, 1.0]


def test_a_fresh_encoder_s_codes_stand_out_from_the_gumbel_noise() -> None:
    torch.manual_seed(0)
    vae = DiscreteVAE(VAEConfig(quantizer="gumbel", codebook_size=64), 64)
    logits = vae.encoder(torch.rand(4, 3, 64, 64) - 0.5)
    assert 2.0 < logits.std(dim=1).mean().item() < 6.0
    likeliest = logits.softmax(dim=1).amax(dim=1).mean().item()
    assert 0.2 < likeliest < 0.95, "neither all alike nor decided"


@pytest.mark.parametrize("seed", [0, 1])
def test_gumbel_codes_carry_a_picture_under_the_paper_s_kl_weight(seed: int) -> None:
    """Plain colours through the paper's schedules in 150 steps; from flat logits they come back at 9 to 20 dB."""
    torch.manual_seed(seed)
    changes = {"reconstruction": "logit_laplace", "downsample": 8, "patch": 8, "width": 16, "codebook_size": 512}
    vae = DiscreteVAE(_config("gumbel", **changes), 16).train()
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.1, 0.2, 0.9], [0.9, 0.9, 0.1]])
    images = colours[:, :, None, None].expand(-1, -1, 16, 16).repeat(2, 1, 1, 1).contiguous()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        loss, _ = vae.loss(images, step / 150, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = vae.eval().encode(images[:4])
    assert len(ids.unique(dim=0)) == 4
    assert reconstruction_metrics(images[:4], vae.decode(ids))["psnr"].min() > 25


# --- losses ---


def test_logit_laplace_is_a_density() -> None:
    values = (torch.arange(20_000) + 0.5) / 20_000  # of [0, 1]
    for mean, scale in ((0.0, 0.1), (0.5, 0.2), (-1.0, 0.1)):
        nll = torch.stack(
            [
                logit_laplace_nll(v, torch.tensor(mean), torch.tensor(math.log(scale)))
                for v in values[::20]  # every 20th: 1,000 points are enough
            ]
        )
        assert (-nll).exp().mean().item() * 0.8 == pytest.approx(1.0, abs=0.01)  # 1 - 2ε of the squeezed axis


def test_logit_laplace_is_likeliest_at_its_mean_and_reads_it_back() -> None:
    pictures = torch.linspace(0, 1, 11)
    squeezed = 0.8 * pictures + 0.1
    logits = (squeezed / (1 - squeezed)).log()
    assert torch.allclose(from_logit_laplace(logits), pictures, atol=1e-6)
    beyond = torch.tensor([-3.0, 3.0], requires_grad=True)
    found = from_logit_laplace(beyond)
    assert found[0] < 0 and found[1] > 1
    found.sum().backward()
    assert beyond.grad is not None and (beyond.grad > 0).all(), "what is too dark or too light can be moved"
    log_scale = torch.full_like(logits, -1.0)
    best = logit_laplace_nll(pictures, logits, log_scale)
    assert best < logit_laplace_nll(pictures, logits + 0.2, log_scale)
    assert best < logit_laplace_nll(pictures, logits - 0.2, log_scale)
    assert logit_laplace_nll(pictures, logits, torch.full_like(logits, -1e9)).isfinite()


def test_logit_laplace_is_the_negative_log_likelihood_of_a_laplace_behind_a_sigmoid() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(200, generator=generator)
    mean, log_scale = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    laplace = torch.distributions.Laplace(mean, log_scale.exp())
    behind = torch.distributions.TransformedDistribution(laplace, [torch.distributions.SigmoidTransform()])
    expected = -behind.log_prob(0.8 * pictures + 0.1).mean()  # φ of equation 3
    assert logit_laplace_nll(pictures, mean, log_scale).item() == pytest.approx(expected.item(), rel=1e-4)


def test_logit_laplace_pulls_the_mean_to_the_picture_and_the_scale_to_the_error() -> None:
    pictures = torch.tensor([0.2, 0.2, 0.9, 0.9])
    mean, log_scale = torch.tensor([3.0, -3.0, 3.0, -3.0]), torch.zeros(4)
    mean.requires_grad_(), log_scale.requires_grad_()
    logit_laplace_nll(pictures, mean, log_scale).backward()
    assert mean.grad is not None and mean.grad.sign().tolist() == [1, -1, 1, -1]  # a step downhill goes to the picture
    errors = torch.tensor([0.01, 0.5, 2.0, 20.0])
    scale = torch.zeros(4, requires_grad=True)
    logit_laplace_nll(torch.full((4,), 0.5), errors, scale).backward()
    assert scale.grad is not None and scale.grad.sign().tolist() == [1, 1, -1, -1]  # sharper where it errs by less
    best = logit_laplace_nll(torch.full((4,), 0.5), errors, errors.log())
    for factor in (0.5, 2.0):
        assert best < logit_laplace_nll(torch.full((4,), 0.5), errors, (factor * errors).log())


def _slow_ssim(x: Tensor, y: Tensor, window: int, stride: int) -> float:
    """One window of one channel at a time."""
    values = []
    for channel in range(3):
        for top in range(0, x.shape[1] - window + 1, stride):
            for left in range(0, x.shape[2] - window + 1, stride):
                a = x[channel, top : top + window, left : left + window].double()
                b = y[channel, top : top + window, left : left + window].double()
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                rest = (2 * covariance + 9e-4) / (a.var(correction=0) + b.var(correction=0) + 9e-4)
                values.append(float(light * rest))
    return sum(values) / len(values)


@pytest.mark.parametrize(("window", "stride"), [(7, 1), (8, 4)])
def test_ssim_equals_a_loop_over_windows(window: int, stride: int) -> None:
    x = _images(2)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    expected = [_slow_ssim(a, b, window, stride) for a, b in zip(x, y, strict=True)]
    assert ssim(x, y, window, stride).tolist() == pytest.approx(expected, abs=1e-4)


def test_equal_pictures_are_perfect() -> None:
    x = _images()
    metrics = reconstruction_metrics(x, x)
    assert metrics["ssim"].tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert metrics["psnr"].tolist() == pytest.approx([100.0] * 3)
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).item() == pytest.approx(20.0, abs=1e-4)
    terms = mixed_loss(x, x, _config())
    assert set(terms) == {"l1", "l2", "ssim", "laplacian"}
    assert torch.stack(list(terms.values())).sum().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("size", [8, 12, 15, 16, 100])
def test_the_laplacian_distance_is_zero_only_between_equal_pictures(size: int) -> None:
    x = torch.rand(1, 3, size, size)
    assert laplacian_distance(x, x).item() == 0.0
    assert laplacian_distance(x, x + 0.25).item() == pytest.approx(0.25, abs=1e-6)  # flat: the coarsest level alone
    for row, column in ((0, 0), (size - 1, size - 1), (size // 2, size - 1)):
        y = x.clone()
        y[0, 1, row, column] += 0.5
        assert laplacian_distance(x, y).item() > 0
        assert laplacian_distance(x, y).item() == pytest.approx(laplacian_distance(y, x).item())


def test_terms_of_weight_zero_are_not_computed_and_none_at_all_is_an_error() -> None:
    x, y = _images(), _images().flip(0)
    none = {"l1_weight": 0, "l2_weight": 0, "ssim_weight": 0, "laplacian_weight": 0}
    only = mixed_loss(x, y, _config(**(none | {"l2_weight": 2.0})))
    assert only.keys() == {"l2"} and only["l2"].item() == pytest.approx(2 * (x - y).square().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="every reconstruction weight of the vae is 0"):
        mixed_loss(x, y, _config(**none))


def test_usage_and_perplexity_of_known_counts() -> None:
    assert usage_and_perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert usage_and_perplexity(torch.tensor([7, 0, 0, 0])) == pytest.approx((0.25, 1.0))
    assert usage_and_perplexity(torch.tensor([3, 3, 0, 0])) == pytest.approx((0.5, 2.0))
