"""A step captured as a CUDA graph: what is compiled is compiled before, and each replay draws a mix of its own."""

import torch

import fastmix

if torch.cuda.is_available():
    mixup = fastmix.Mixup(0.2, seed=0)
    x, y = torch.randn(16, 192, device="cuda"), torch.arange(16, device="cuda") % 4
    layer = torch.nn.Linear(192, 4, device="cuda")

    fastmix.warmup((16, 192), (16, 4))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fastmix.soft_cross_entropy(layer(mixup(x, y)[0]), mixup(x, y)[1]).backward()
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        mixed, target = mixup(x, y)
        loss = fastmix.soft_cross_entropy(layer(mixed), target)
        loss.backward()
    graph.replay()
else:
    print("a CUDA graph needs a GPU")
