"""Says what fastmix runs on here, and checks every op once against the float64 oracle: python -m fastmix [--json]

`python -m fastmix build` builds the native library of the CPU and says where it is, or why there is none. The exit status is 1 if a result is wrong. Put what it prints into a bug report.
"""

import argparse
import json
import os
import sys

import numpy as np
import torch

import fastmix
from fastmix.bench import numerics, results

from . import _backend, _native


def devices():
    """[{"device", "name", "backend", "why"}]; `why` plain torch runs there, or None."""
    found = [torch.device("cpu")] + [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    found += [
        torch.device(kind) for kind in ("mps", "xpu") if getattr(torch, kind, None) and getattr(torch, kind).is_available()
    ]
    rows = []
    for device in found:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        try:
            backend = _backend.name(device)
            why = (_backend._why_not_native if device.type == "cpu" else _backend._why_not_triton)(device)
        except (RuntimeError, ValueError) as error:  # a backend is forced that cannot run there
            backend, why = None, str(error)
        rows.append(
            {"device": str(device), "name": name, "backend": backend, "why": None if backend in ("triton", "native") else why}
        )
    return rows


def checks():
    """A row for each result of each op, on small shapes: {"op", "result", "backend", "error", "limit", "ok"}."""
    with np.errstate(all="ignore"):
        rows = list(numerics.table(numerics.backends(False)[0], numerics.first_cases(), [torch.float32], small=True))
    return [{**{key: row[key] for key in ("op", "result", "backend", "limit")}, "error": row["fastmix"],
             "ok": row["fastmix"] <= row["limit"]} for row in rows]  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("build",), help="build the native library, and do nothing else")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(argv)
    if options.command == "build":
        try:
            print(_native.build.path())
        except _native.build.Unavailable as error:
            print(f"fastmix: no native library: {error}", file=sys.stderr)
            return 1
        return 0
    forced = {name: os.environ[name] for name in ("FASTMIX_BACKEND", "TRITON_INTERPRET", "FASTMIX_DEBUG") if name in os.environ}
    head, changed = results.commit()
    about = {"fastmix": fastmix.__version__, "commit": head, "changed": changed, "platform": sys.platform, **results.machine()}
    found = {**about, "environment": forced, "devices": devices(), "checks": checks()}
    broken = [row for row in found["checks"] if not row["ok"]]
    if options.json:
        print(json.dumps(results.finite(found), indent=1))
        return int(bool(broken))
    where = f" at {head[:12]}{' and changes' if changed else ''}" if head else ""
    print(
        f"fastmix {fastmix.__version__}{where}; {results.describe(about)}, Python {about['python']}, NumPy {about['numpy']}, {sys.platform}"
    )
    for name, value in forced.items():
        print(f"{name}={value}")
    for row in found["devices"]:
        reason = f" ({row['why']})" if row["why"] else ""
        print(f"{row['device']:<8}{row['name']}: {row['backend'] or 'nothing'}{reason}")
    print("Each op once, its value and gradients against float64, the error and its limit:")
    for row in found["checks"]:
        verdict = "ok" if row["ok"] else "WRONG"
        print(f"  {row['op']:<26}{row['result']:<22}{row['backend']:<8}{row['error']:>9.1e}{row['limit']:>9.1e}  {verdict}")
    print(f"{len(broken)} wrong of {len(found['checks'])}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
