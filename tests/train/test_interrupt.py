"""The first Ctrl-C asks, the second one interrupts."""

from __future__ import annotations

import signal
import threading

import pytest

from dcx_kernels.train.interrupt import Interrupt


def test_interrupt_first_sets_the_flag_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.raise_if_requested()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_if_requested()
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_in_another_thread_does_nothing() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupt() as interrupt:
                interrupt.raise_if_requested()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
