"""What Python objects hold is put back, also where threads meet."""

from __future__ import annotations

import threading

from lnp.state.preserve import preserve_state


def test_threads_put_back_one_after_another():
    """Without a lock the second would take the first one's count for what the user had, and put that back last."""
    counts, second_is_in, first_is_out = [0], threading.Event(), threading.Event()

    def second():
        with preserve_state(counts):
            second_is_in.set()
            first_is_out.wait(10)

    thread = threading.Thread(target=second)
    with preserve_state(counts):
        counts[0] += 1
        thread.start()
        assert not second_is_in.wait(0.2)
    first_is_out.set()
    thread.join()
    assert counts == [0]
