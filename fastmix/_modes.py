"""A model in another mode for a while."""

import contextlib


@contextlib.contextmanager
def running_mode(model, training):
    """Runs the model in eval mode, or in training mode. In a model that trains already, modules that are kept in eval mode (frozen
    statistics) stay so."""
    before = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
