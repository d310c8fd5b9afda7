"""The random numbers of one batch."""

import torch


class Draws:
    """The random numbers of one batch."""

    def __init__(self, rows, dtype, device, generator):
        self.rows = rows
        self.generator = generator
        self.options = {"dtype": dtype, "device": device}
        # naming the default generator would make torch.compile specialise on the number of rows
        self.source = {} if generator is None else {"generator": generator}

    def permutation(self):
        return torch.randperm(self.rows, device=self.options["device"], **self.source)

    def uniform(self, *shape):
        return torch.rand((self.rows, *shape), **self.options, **self.source)

    def beta_logit(self, a, b, *sizes):
        """Returns log(lam / (1-lam)) of lam ~ Beta(a, b), [N, *sizes]: the difference of two logs of Gamma variables, each drawn as
        log(Gamma(a+1)) - Exponential/a. For small a the plain ratio of two Gammas underflows to ties and 0/0."""
        return self.log_gamma(a, *sizes) - self.log_gamma(b, *sizes)

    def log_gamma(self, shape, *sizes):
        """Returns logarithms of Gamma variables of this shape parameter, [N, *sizes]."""
        gamma = torch._standard_gamma(torch.full((self.rows, *sizes), shape + 1, **self.options), **self.source)
        wait = torch.empty((self.rows, *sizes), **self.options).exponential_(**self.source)
        return gamma.log() - wait / shape

    def beta(self, a, b, *sizes):
        return torch.sigmoid(self.beta_logit(a, b, *sizes))
