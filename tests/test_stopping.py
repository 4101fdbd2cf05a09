"""SIGTERM and Ctrl-C: at once where nothing is lost, after the step where something would be."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dalle_mini_impl.training.stopping import ECHO_SEC, StopSignal
from tests.processes import command_in_process
from tests.test_training_faults import command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_at_once_and_is_only_noted_where_it_is_waited_for(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        with stop, stop.waiting():
            signal.raise_signal(number)
            assert stop.requested
        assert signal.getsignal(number) != before, "leaving an inner one leaves the handlers"
    assert signal.getsignal(number) == before
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(number)


def test_an_echo_of_a_signal_is_no_second_one() -> None:
    now = 100.0
    stop = StopSignal(lambda: now)
    with stop, stop.waiting():
        signal.raise_signal(signal.SIGTERM)
        now += ECHO_SEC / 2
        signal.raise_signal(signal.SIGTERM)  # `timeout` sends one to the process and one to its group
        now += ECHO_SEC
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("point", ["stop-in-pictures", "stop-in-step:2"])
def test_a_command_that_was_told_to_stop_ends_with_status_0(tmp_path: Path, point: str) -> None:
    out = tmp_path / "run"
    assert command_in_process(command(out, "--stage", "vae"), point) == 0
    assert (out / "state" / "vae" / "index.json").is_file() == point.startswith("stop-in-step")
    assert not (out / "state" / "vae" / "finished.json").exists()
