"""Reading by a thread while something else works on what was read before."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def read_ahead(read: Callable[[T], U], items: Iterable[T], count: int) -> Iterator[U]:
    """`read` of each item, in their order, by one thread, up to `count` ahead of whoever takes them."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        remaining = iter(items)
        ahead = [thread.submit(read, item) for item in islice(remaining, count)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [thread.submit(read, item) for item in islice(remaining, 1)]
                yield result
        finally:
            for future in ahead:
                future.cancel()
