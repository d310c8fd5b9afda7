"""What a call costs the host, on inputs so small that nothing else counts: checks, dispatch, autograd's bookkeeping and launches.

On a GPU calls are issued without waiting for any. On the CPU the little work there is counts too. It says below which size of
work a few plain operations are as good as a fused one.
"""

from fastmix.bench import bench_batches, bench_ops
from fastmix.bench.case import BOTH, F32, FORWARD

CALLS = 30
BATCH = (8, 3, 8, 8)


def _tiny(case):
    case.title = f"{case.suite}, {case.title}"
    case.suite, case.moved, case.calls = "host cost", 0, CALLS
    return case


bench_batches.CLASSES[BATCH] = 10
LAPTOP = [
    *(_tiny(bench_ops.mix((8, 16), F32, mode)) for mode in (FORWARD, BOTH)),
    _tiny(bench_ops.mix((8, 16), F32, BOTH, lam_gradient=True)),
    *(_tiny(bench_ops.loss((8, 10), F32, mode)) for mode in (FORWARD, BOTH)),
    _tiny(bench_ops.hard_loss((8, 10), F32)),
    *(_tiny(bench_batches._batches(question, BATCH)) for question in ("mixup, one lambda", "mixup or CutMix per row")),
]
ALL = LAPTOP


def test_host_cost(measure, case, name):
    measure(case, name)
