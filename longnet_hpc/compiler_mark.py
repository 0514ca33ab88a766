"""A mark for torch.compile that does not load the compiler, which takes longer than all else that a start needs."""

from collections.abc import Callable
from typing import TypeVar

__all__ = ["assume_constant_result"]

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(function: F) -> F:
    """Let torch.compile call a function while it traces, and take its result for a constant.

    Does what `torch.compiler.assume_constant_result` does in torch 2.11 to 2.13; a test compares them.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
