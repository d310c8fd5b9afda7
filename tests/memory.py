"""What an op allocates, as the tests of the torch backend see it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Fresh(TorchDispatchMode):
    """Collects the bytes of every tensor that torch makes inside: `.sizes`. Results written into a given tensor, and views, are not
    new."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in given]
        return out
