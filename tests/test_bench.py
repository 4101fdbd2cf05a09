"""Benchmarks measure what they say, on a shape small enough for a test; nothing here asserts a speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.bench import batches, sample, train
from dalle_mini_impl.bench import machine as machine_module
from dalle_mini_impl.bench.machine import Machine
from dalle_mini_impl.bench.peak import peak_bytes_alone
from dalle_mini_impl.bench.peers import Shape
from dalle_mini_impl.cli.app import main
from dalle_mini_impl.dalle import DALLE
from dalle_mini_impl.stream import BOS, PAD
from dalle_mini_impl.training import task

TINY = Shape(dim=16, layers=2, heads=2, text_length=4, grid_size=3, text_vocab=300, image_vocab=20)
MACHINE = Machine("a slide rule", 1, {"bfloat16": 200.0, "float32": 100.0}, read_rate=50.0)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    assert MACHINE.least_sec(1000.0, 10.0, torch.float32) == pytest.approx(10.0)
    assert MACHINE.least_sec(1000.0, 10.0, torch.bfloat16) == pytest.approx(5.0)
    assert MACHINE.least_sec(10.0, 1000.0, torch.float32) == pytest.approx(20.0)


def test_the_roofline_counts_what_a_token_costs() -> None:
    weights = sum(
        parameter.numel()
        for name, parameter in sample.build(TINY, torch.device("cpu")).named_parameters()
        if name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight", "image_head.weight"))
    )
    arithmetic_only = Machine("", 1, {"float32": 1.0, "bfloat16": 1.0}, read_rate=1e30)
    seen = sum(TINY.text_length + index for index in range(1, 9))
    expected = 2 * 3 * (8 * 2 * weights + 4 * TINY.layers * TINY.dim * seen)
    assert sample.least_seconds(TINY, arithmetic_only, 3, True, torch.float32) == pytest.approx(expected)
    memory_only = Machine("", 1, {"float32": 1e30, "bfloat16": 1e30}, read_rate=1.0)
    one = sample.least_seconds(TINY, memory_only, 1, False, torch.float32)
    assert one == pytest.approx(4 * (8 * weights + 2 * TINY.layers * TINY.dim * seen))
    assert sample.least_seconds(TINY, memory_only, 1, False, torch.bfloat16) == pytest.approx(one / 2)


def test_a_run_writes_table_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_module, "_MATMUL_SIDE", 64)
    monkeypatch.setattr(machine_module, "_READ_BYTES", 2**16)
    monkeypatch.setattr(sample, "best_sec", lambda work, device, least_sec=0.0: work() is None or 0.5)
    monkeypatch.setattr(sample, "peers", lambda *_: {"a peer": lambda pictures: None})
    # The compiled kernel has no heads of 4, on whatever processor.
    options = ["--batches", "1,2", "--dim", "16", "--layers", "1", "--heads", "4", "--grid", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "sample", *options, "--out", str(tmp_path)])
    assert not stopped.value.code
    facts = json.loads((tmp_path / "bench-sample.json").read_text())
    assert facts["shape"]["grid_size"] == 2 and facts["machine"]["read_rate"] > 0
    names = [result["name"] for result in facts["results"]]
    assert len(names) == 4 * 2 + 1 + 2
    assert names.count("ours, float32") == names.count("a peer") == 2
    tokens = {(result["name"], result["batch"]): result["tokens_per_sec"] for result in facts["results"]}
    assert tokens["ours, bfloat16", 1] == pytest.approx(4 / 0.5)
    assert facts["ratios"]["a peer"] == {"1": pytest.approx(2.0), "2": pytest.approx(2.0)}
    assert (tmp_path / "bench-sample.png").stat().st_size > 1000
    assert "of the roofline" in capsys.readouterr().out


def test_training_steps_are_measured_beside_a_plain_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_module, "_MATMUL_SIDE", 64)
    monkeypatch.setattr(machine_module, "_READ_BYTES", 2**16)
    monkeypatch.setattr(train, "_ROUND_SEC", 0.0)
    monkeypatch.setattr(train, "peak_bytes_alone", lambda device, work, name, *_: len(name))
    monkeypatch.setattr(DALLE, "compile_blocks", lambda self: None)
    options = ["--batches", "2", "--dim", "16", "--layers", "1", "--heads", "2", "--grid", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "train", *options, "--out", str(tmp_path)])
    assert not stopped.value.code
    (facts,) = json.loads((tmp_path / "bench-train.json").read_text())["runs"]
    results = {result["name"]: result for result in facts["results"]}
    ours, plain = results["ours, AdamW"], results["torch.nn.TransformerEncoder, AdamW"]
    assert ours["tokens_per_sec"] == pytest.approx(2 * (32 + 4) / ours["seconds"])
    assert ours["mfu"] > ours["mfu_causal"] > 0 and plain["mfu"] is plain["mfu_causal"] is None
    assert all(result["peak_bytes"] == len(name) for name, result in results.items())
    assert sum(ours["shares"].values()) == pytest.approx(1.0) and set(ours["shares"]) == set(train.PHASES)
    best = max(result["tokens_per_sec"] for name, result in results.items() if name.startswith("ours"))
    assert facts["ratios"][plain["name"]] == pytest.approx(best / plain["tokens_per_sec"])
    assert "of the matmul rate" in capsys.readouterr().out


def test_shares_of_the_matmul_rate_are_of_the_type_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_ROUND_SEC", 0.0)
    monkeypatch.setattr(train, "peak_bytes_alone", lambda *_: 0)
    monkeypatch.setattr(DALLE, "compile_blocks", lambda self: None)
    device = torch.device("cpu")
    for is_native, kind in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(task, "computes_bf16", lambda _, answer=is_native: answer)
        assert train.compute_type(device) == kind
        slow = Machine("", 1, {"float32": 1e30, "bfloat16": 1e30, kind: 1.0}, read_rate=1.0)
        results = {result.name: result for result in train.run(TINY, slow, device, 2)}
        assert results["ours, AdamW"].mfu is not None and results["ours, AdamW"].mfu > 1.0


def test_batches_are_training_s_own() -> None:
    given = batches.prefetched(TINY, 5, torch.device("cpu"))
    first, second = next(given), next(given)
    given.close()
    assert first.keys() == {"text", "ids", "inputs", "view", "reads"}
    for batch in (first, second):
        assert batch["text"].shape == (5, 4) and batch["ids"].shape == (5, 9)
        assert int(batch["ids"].min()) >= 0 and int(batch["ids"].max()) < TINY.image_vocab
        assert int(batch["text"].max()) < TINY.text_vocab and not (batch["text"][:, 0] == PAD).any()
    assert (first["text"] == BOS).any() and not torch.equal(first["ids"], second["ids"])


def test_memory_is_of_a_process_of_its_own() -> None:
    here = torch.ones(2**28)  # 1 GiB
    nothing, block = (peak_bytes_alone(torch.device("cpu"), torch.ones, size) for size in (1, 2**26))
    assert nothing < here.nbytes, "what this process holds isn't counted"
    assert block - nothing == pytest.approx(2**28, rel=0.2)
    steps = peak_bytes_alone(torch.device("cpu"), train._few_steps, "ours, AdamW", TINY, torch.device("cpu"), 2)
    assert nothing < steps < here.nbytes


def test_the_plain_transformer_reads_every_token_but_the_last() -> None:
    model = train._Plain(TINY)
    text, image = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
    loss = model(text, image)
    gradient = torch.autograd.grad(loss, model.position)[0]
    assert gradient.shape == (13, 16) and gradient[:12].any(dim=1).all()
    assert not gradient[12].any()


def test_what_cant_be_measured_or_drawn_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without matplotlib the plot failed when all was measured; a shape that can't be, once the machine was."""

    def fail(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(machine_module, "measure_machine", fail)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for what, options, words in (
        ("sample", ["--out", str(tmp_path)], "plots are drawn by matplotlib: pip install"),
        ("train", ["--dim", "100", "--heads", "3"], "dalle.dim 100 must be heads 3 times a multiple of 4"),
        ("train", ["--grid", "200"], "data.image_size: Input should be less than or equal to 1024"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", what, *options])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_bad_batches_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "1,x", ""):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "sample", "--batches", text])
        assert stopped.value.code == 2
        assert "write whole numbers like 1,8,32" in capsys.readouterr().err
