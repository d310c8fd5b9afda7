import torch


def needed(ctx, wanted=None):
    """Which inputs this backward has to give a gradient to: bools of the Function's tensors, or of those that `wanted`
    (default: `ctx.needs_input_grad`, where the tensors come first) begins with.

    Those that require a gradient and whose node autograd is going to run: `needs_input_grad` stays true for all that could
    ever be asked for, so `torch.autograd.grad(loss, lam)` would form gradients of the whole batch and throw them away. Asked of
    autograd in the backward itself, the answer is right for each backward over a retained graph, and where lam enters at several
    places.
    """
    wanted = ctx.needs_input_grad if wanted is None else wanted
    if sum(wanted) == 1:  # that one, or this backward would not run
        return list(wanted)
    return [need and (node is None or _runs(node)) for need, (node, _) in zip(wanted, ctx.next_functions, strict=False)]


def _runs(node):
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for by itself, or a backward that autograd does not run (a trace)
        return True
