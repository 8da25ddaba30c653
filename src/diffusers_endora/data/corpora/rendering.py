"""Renders phantom clips beside others: each in a process of its own, as numpy's indexing holds Python's lock.

The process loads `phantom.py` and nothing else of the package, which makes 50 MB of it and not 500.
"""

import pickle
import subprocess
import sys
import threading
from typing import Any

from .. import phantom
from ..phantom import PhantomClip, render_phantom_clip
from ..transcode import check_not_cancelled

_PATIENCE = 0.2  # seconds between two looks whether to go on

# Loads a module by its path, which spares the package's own imports, and renders what it is asked for
_RENDER = """
import importlib.util, pickle, sys
spec = importlib.util.spec_from_file_location("phantom", sys.argv[1])
module = sys.modules["phantom"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
clip = module.render_phantom_clip(**pickle.load(sys.stdin.buffer))
pickle.dump(vars(clip), sys.stdout.buffer)
"""


def render_beside_others(**arguments: Any) -> PhantomClip:
    """`render_phantom_clip`; in a thread other than the main one by a process, which leaves the other threads alone.

    Raises:
        RuntimeError: the process failed.
        Cancelled: see `cancelled_when`.
    """
    if threading.current_thread() is threading.main_thread():
        return render_phantom_clip(**arguments)
    # In a group of its own: Ctrl-C reaches this process alone, which tells
    process = subprocess.Popen(
        [sys.executable, "-c", _RENDER, phantom.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    with process:
        try:
            content, errors = _answer(process, pickle.dumps(arguments))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"rendering with {arguments} failed: {errors.decode(errors='replace')}")
    return PhantomClip(**pickle.loads(content))


def _answer(process: subprocess.Popen, question: bytes) -> tuple[bytes, bytes]:
    """The whole output and the errors of a process."""
    to_send: bytes | None = question
    while True:
        try:
            return process.communicate(to_send, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            to_send = None  # the first call goes on with it
            check_not_cancelled()
