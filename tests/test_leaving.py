"""How a process that fails leaves others that it is connected to; test_launch.py has processes that really are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch
import typer

from dalle_mini_impl.cli import processes
from dalle_mini_impl.cli.app import reporting_errors
from dalle_mini_impl.cli.processes import ending_at_once, leaving_together


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Has the process look as if it were connected to others by a backend; returns what is done to them."""

    def to_others(backend: str) -> list[str]:
        done: list[str] = []

        class State:
            def wait_for_everyone(self) -> None:
                done.append("waited")

            def destroy_process_group(self) -> None:
                done.append("closed")

        def end(status: int) -> None:
            raise Ended(status)

        monkeypatch.setattr(processes, "_are_connected", lambda: "closed" not in done)
        monkeypatch.setattr(processes, "process_state", State)
        monkeypatch.setattr(processes, "_LET_GO_SEC", 0.0)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
        monkeypatch.setattr(os, "_exit", end)
        return done

    return to_others


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("no such thing"), 2, "error: no such thing"),
        (MemoryError("too much"), 1, "error: too much"),
        (RuntimeError("a kernel"), 1, "RuntimeError: a kernel"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
)
def test_where_closing_would_wait_a_failure_is_said_and_ends_the_process(
    error: BaseException, status: int, said: str, connect: Callable[[str], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """NCCL closes when all that is queued is done, which the others' collective never is: they would wait for good."""
    done = connect("nccl")
    with pytest.raises(Ended) as ended, ending_at_once(), reporting_errors():
        raise error
    assert ended.value.args == (status,) and done == []
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(("backend", "left"), [("nccl", Ended), ("gloo", typer.Exit)])
def test_connections_that_the_command_itself_has_opened_are_left_as_well(
    backend: str, left: type[BaseException], connect: Callable[[str], list[str]]
) -> None:
    done: list[str] = []
    with pytest.raises(left), ending_at_once(), reporting_errors():
        done = connect(backend)
        raise ValueError("no such thing")
    assert done == ([] if backend == "nccl" else ["closed"])


def test_gloo_closes_at_once_and_the_failure_goes_its_way(connect: Callable[[str], list[str]]) -> None:
    done = connect("gloo")
    with pytest.raises(typer.Exit) as ended, ending_at_once(), reporting_errors():
        raise ValueError("no such thing")
    assert ended.value.exit_code == 2 and done == ["closed"]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_whoever_is_done_waits_for_the_others_and_closes(backend: str, connect: Callable[[str], list[str]]) -> None:
    done = connect(backend)
    with ending_at_once(), reporting_errors():
        pass
    assert done == ["waited", "closed"]


def test_alone_everything_goes_its_way() -> None:
    with pytest.raises(SystemExit), ending_at_once(), leaving_together():
        sys.exit(3)


def test_a_process_that_lost_another_says_so_in_one_line(
    connect: Callable[[str], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    done = connect("gloo")
    with pytest.raises(typer.Exit) as ended, ending_at_once(), reporting_errors():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:29500")
    error = capfd.readouterr().err
    assert ended.value.exit_code == 1 and done == ["closed"]
    assert error.startswith("error: another process has ended") and error.count("\n") == 1
