"""A clip rendered by another process is the same clip, and the process ends when nobody wants it any more."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusers_endora.data.corpora.rendering import render_beside_others
from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.transcode import Cancelled, cancelled_when

ARGUMENTS = {"seed": 4, "num_frames": 2, "height": 16, "width": 24, "polyp": True, "instrument": False, "fps": 8}


def in_thread(function, *arguments, **keywords):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments, **keywords).result()


def test_the_same_clip():
    expected = render_phantom_clip(**ARGUMENTS)
    for clip in (render_beside_others(**ARGUMENTS), in_thread(render_beside_others, **ARGUMENTS)):
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(clip, name), value)


def test_a_process_that_fails():
    with pytest.raises(RuntimeError, match="num_frames=0: expected a positive integer"):
        in_thread(render_beside_others, **ARGUMENTS | {"num_frames": 0})


def test_cancelling_ends_the_process():
    stopped = threading.Event()

    def render():
        with cancelled_when(stopped.is_set):
            render_beside_others(**ARGUMENTS | {"num_frames": 100_000})

    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(render)
        time.sleep(0.5)
        assert future.running()
        stopped.set()
        with pytest.raises(Cancelled):
            future.result()
    assert time.perf_counter() - start < 20  # it would take an hour
