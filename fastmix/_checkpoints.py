"""Blocks that hook modules, and that torch's checkpointing can open again when it runs a part of a model again in the backward."""

import contextlib
import copy
import inspect
import sys
from contextvars import ContextVar

import torch
from torch.utils import checkpoint as _checkpoint

_open_blocks: ContextVar[tuple] = ContextVar("fastmix_blocks", default=())
_reopened_blocks: ContextVar[tuple] = ContextVar("fastmix_blocks_reopened", default=())  # the originals of copies that are open


class Block:
    """A `with` block that hooks modules. A subclass has `_hook()` and `_unhook()`; it calls `_open()` and `_close()` at the ends of
    the block, `_is_reopened()` in a hook, and `_refuses()` to know whether the call will be run again without the block."""

    def _open(self):
        self._depth = depth()  # calls of checkpointing around a module that are allowed
        self._depth_without_grad = 0  # the same under no_grad, where torch does not enter the context of the forward
        self._hook()
        _open_blocks.set((*_open_blocks.get(), self))

    def _close(self):
        self._unhook()  # first: the block may be left in another context, or not in order
        _open_blocks.set(tuple(block for block in _open_blocks.get() if block is not self))

    def _is_reopened(self):
        """Whether a checkpoint has opened this block again while it is still open itself."""
        return not torch.compiler.is_compiling() and self in _reopened_blocks.get()

    def _refuses(self):
        """Whether the caller is within a checkpoint that does not open this block again."""
        if torch.compiler.is_compiling():  # a traced checkpoint has the hook in it
            return False
        return depth() > (self._depth if torch.is_grad_enabled() else max(self._depth, self._depth_without_grad))


def depth():
    """Returns how many calls of torch's checkpointing the caller is in. (Its generators are on the stack only while a part is
    entered.)"""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        code = frame.f_code
        count += code.co_filename == _checkpoint.__file__ and not code.co_flags & inspect.CO_GENERATOR
        frame = frame.f_back
    return count


def context_fn():
    """Returns the two contexts that `torch.utils.checkpoint.checkpoint` asks for: of the forward and of its repetition, which opens
    the blocks again that are open now."""
    blocks, here = _open_blocks.get(), depth()
    if not torch.is_grad_enabled():  # nothing will be run again, and torch does not enter what is returned
        for block in blocks:
            if here - 1 <= max(block._depth, block._depth_without_grad):  # nor is this within a checkpoint that will be
                block._depth_without_grad = here
    return _allow_one_more(blocks), _Repeatedly(lambda: _open_again(blocks))


@contextlib.contextmanager
def _allow_one_more(blocks):
    """The context of the forward: one checkpoint, which opens these blocks again, may be entered."""
    for block in blocks:
        block._depth += 1
    try:
        yield
    finally:
        for block in blocks:
            block._depth -= 1


class _Repeatedly:
    """A context that is made anew each time it is entered: every backward over a retained graph enters it."""

    def __init__(self, make):
        self.make, self.entered = make, []

    def __enter__(self):
        context = self.make()
        context.__enter__()
        self.entered.append(context)

    def __exit__(self, *error):
        return self.entered.pop().__exit__(*error)


@contextlib.contextmanager
def _open_again(blocks):
    """The context of the repetition. The originals may still be open, and this may run in another thread."""
    copies = [copy.copy(block) for block in blocks]
    before, opened = _reopened_blocks.set((*_reopened_blocks.get(), *blocks)), _open_blocks.set((*_open_blocks.get(), *copies))
    try:
        for block in copies:
            block._handles, block._depth = [], depth()
            block._hook()
        yield
    finally:
        for block in copies:
            block._unhook()
        _open_blocks.reset(opened)
        _reopened_blocks.reset(before)
