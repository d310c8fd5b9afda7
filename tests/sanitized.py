"""Calls every function of the native library on small arrays, without torch: run by test_native.py, with a library that was built with
sanitizers."""

import ast
import ctypes
import itertools
import mmap
import pathlib
import sys

import numpy as np

LIBRARY = pathlib.Path(__file__).parent.parent / "fastmix" / "_native" / "library.py"
TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}
DTYPES = (np.float32, np.float64, np.uint16, np.float16)  # bfloat16 as bits


def signatures():
    """What library.py says, which cannot be imported without torch."""
    for node in ast.parse(LIBRARY.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "SIGNATURES":
            return ast.literal_eval(node.value)
    raise AssertionError("library.py has no SIGNATURES")


class Room:
    """Memory between two pages that may not be touched: arrays lie at its start, or end where it ends."""

    SIZE = 1 << 19

    def __init__(self):
        page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
        self.whole = mmap.mmap(-1, self.SIZE + 2 * page)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.whole)) + page
        for guard in (self.start - page, self.start + self.SIZE):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0

    def put(self, array, at_end):
        """Returns a copy of an array that lies here."""
        address = self.start + (self.SIZE - array.nbytes if at_end else 0)
        memory = (ctypes.c_char * array.nbytes).from_address(address)
        copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
        copy[...] = array
        return copy


class Native:
    def __init__(self, path):
        self.library, self.signatures = ctypes.CDLL(path), signatures()
        self.rooms = [Room() for _ in range(40)]

    def __call__(self, name, *arguments):
        """Calls a function with arrays for pointers, and lists of arrays for arrays of pointers. Arrays that fit lie in rooms: once at
        their starts, once at their ends. Both calls have to write the same bits."""
        result, _, letters = self.signatures[name].rpartition("-")
        function = getattr(self.library, name)
        function.restype, fields = TYPES[result] if result else None, [TYPES[letter] for letter in letters.strip("[]")]
        if letters.startswith("["):
            function.argtypes = [ctypes.c_void_p]
        else:
            function.argtypes = fields
        given = {id(a): a for b in arguments for a in (b if isinstance(b, list) else [b]) if isinstance(a, np.ndarray)}
        given = {key: a for key, a in given.items() if a.flags.c_contiguous and a.size}
        results = []
        for at_end in (False, True):
            placed = {
                key: room.put(a, at_end) if a.nbytes <= Room.SIZE else a.copy()
                for (key, a), room in zip(given.items(), self.rooms, strict=False)
            }

            def address(a, placed=placed):
                return placed.get(id(a), a).ctypes.data if isinstance(a, np.ndarray) else a

            lists = [np.array([address(a) or 0 for a in b]) if isinstance(b, list) else b for b in arguments]
            values = [address(a) for a in lists]
            if letters.startswith("["):  # arguments that are left out are 0
                named = [(f"_{k}", field) for k, field in enumerate(fields)]
                packed = type("Packed", (ctypes.Structure,), {"_fields_": named})(*values)
                values = [ctypes.addressof(packed)]
            found = function(*values)
            results.append({key: a.tobytes() for key, a in placed.items()})
        assert results[0] == results[1], name
        for key, written in results[0].items():
            if given[key].flags.writeable:
                given[key][...] = np.frombuffer(written, given[key].dtype).reshape(given[key].shape)
        print(name)
        return found


def stored(values, dtype):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if dtype == 2 else values.astype(DTYPES[dtype])


def exact(values, dtype):
    wide = (values.astype(np.uint32) << 16).view(np.float32) if dtype == 2 else values
    return wide.astype(np.float64)


def close(found, truth, dtype):
    limit = (2e-5, 1e-12, 2e-2, 3e-3)[dtype]
    assert np.abs(exact(found, dtype) - truth).max(initial=0) <= limit * max(1, np.abs(truth).max(initial=0)), (
        dtype,
        found,
        truth,
    )


def check_mix(native, random):
    for dtype in range(4):
        acc = np.float64 if dtype == 1 else np.float32
        for rows, sides in ((1, (1, 1, 1)), (3, (2, 5, 7)), (5, (1, 33, 17)), (4, (3, 50, 61)), (2, (1, 130, 131))):
            numel = int(np.prod(sides))
            x, g = (stored(random.standard_normal((rows, numel)), dtype) for _ in range(2))
            lam, index = random.random(rows).astype(acc), random.integers(0, rows, rows)
            lam[0] = 1
            corners = random.integers(-2, 40, (rows, 4))
            for boxes in (None, corners):
                geometry = np.array([2, sides[2], sides[1], 0, 1, sides[2], 1])
                out, dx, dlam = np.zeros_like(x), np.zeros_like(x), np.zeros(rows, acc)
                weight = np.repeat(lam[:, None].astype(np.float64), numel, 1).reshape(rows, *sides)
                inside = np.zeros((rows, *sides), bool)
                for row in range(rows) if boxes is not None else ():
                    y0, x0, y1, x1 = np.maximum(corners[row], 0)
                    inside[row, :, y0:y1, x0:x1] = True
                weight, inside = np.where(inside, 0, weight).reshape(rows, numel), inside.reshape(rows, numel)
                how = lam, 1, index, 1, boxes, None if boxes is None else geometry
                native("fm_mix_forward", dtype, 3, rows, numel, x, numel, None, 0, *how, out, numel)
                wide, grad = exact(x, dtype), exact(g, dtype)
                close(out, weight * wide + (1 - weight) * wide[index], dtype)
                assert native("fm_mix_backward", dtype, 2, rows, numel, x, numel, g, numel, *how, dx, numel, dlam) == 0
                truth = weight * grad
                np.add.at(truth, index, (1 - weight) * grad)
                close(dx, truth, dtype)
                products = np.where(inside, 0, grad * (wide - wide[index]))
                assert np.all(np.abs(dlam - products.sum(1)) <= 1e-5 * np.abs(products).sum(1) + 1e-12)
                assert native("fm_mix_backward", dtype, 2, rows, numel, None, 0, g, numel, *how, dx, numel) == 0


def check_convex_combination(native, random):
    for dtype in range(4):
        acc = np.float64 if dtype == 1 else np.float32
        for rows, numel, count in ((1, 1, 1), (3, 700, 2), (5, 17, 16), (2, 9001, 3)):
            sources = [stored(random.standard_normal((rows, numel)), dtype) for _ in range(count)]
            g, weights = stored(random.standard_normal((rows, numel)), dtype), random.random((rows, count)).astype(acc)
            weights[0, 0] = 0
            gradients = [np.zeros_like(g) for _ in range(count)]
            slopes = [None if k == 1 else a for k, a in enumerate(gradients)]  # one that is not needed
            strides, out, dweights = np.full(count, numel), np.zeros_like(g), np.zeros((rows, count), acc)
            how = weights, count, 1
            native("fm_combine_forward", dtype, 2, rows, numel, count, sources, strides, *how, out, numel)
            wide, grad = [exact(source, dtype) for source in sources], exact(g, dtype)
            close(out, sum(weights[:, k : k + 1].astype(np.float64) * wide[k] for k in range(count)), dtype)
            head = dtype, 2, rows, numel, count, g, numel
            assert native("fm_combine_backward", *head, sources, strides, *how, slopes, numel, dweights) == 0
            for k in range(count):
                close(gradients[k], 0 * grad if k == 1 else weights[:, k : k + 1].astype(np.float64) * grad, dtype)
                assert np.all(np.abs(dweights[:, k] - (grad * wide[k]).sum(1)) <= 1e-5 * np.abs(grad * wide[k]).sum(1) + 1e-12)
            assert native("fm_combine_backward", *head, None, None, *how, slopes, numel, None) == 0


def check_large_pages(native, random):
    memory = random.integers(0, 256, 5 << 20, dtype=np.uint8)
    before = memory.copy()
    for start, size in ((0, 5 << 20), (1, 3 << 20), (4096, 100), (0, 0)):
        native("fm_large_pages", memory.ctypes.data + start, size)
    assert np.array_equal(memory, before)


def check_mix_masked(native, random):
    for dtype in range(4):
        acc = np.float64 if dtype == 1 else np.float32
        for rows, planes, (height, width), (h, w) in (
            (1, 1, (1, 1), (1, 1)), (3, 2, (6, 10), (3, 2)), (2, 3, (5, 33), (5, 33)), (3, 1, (40, 56), (10, 7)), (2, 2, (8, 300), (4, 3)),
        ):  # fmt: skip
            sides, cell = (rows, planes, height, width), (height // h, width // w)
            x, g = (stored(random.standard_normal((rows, planes * height * width)), dtype) for _ in range(2))
            mask, index = random.random((rows, h, w)).astype(acc), random.integers(0, rows, rows)
            mask[0, 0, 0] = 1
            plans = [np.stack([random.permutation(h * w) for _ in range(rows)]) for _ in range(2)]
            geometry = np.array([width, cell[1], w, width, height, cell[0], 1, w, h * w])
            wide, grad = exact(x, dtype).reshape(sides), exact(g, dtype).reshape(sides)
            weight = np.kron(mask.astype(np.float64), np.ones(cell))[:, None]
            numel, threads = x.shape[1], 2

            def moved(values, plan, cell=cell, count=(h, w)):
                found = values.copy()
                for row, blocks in enumerate(plan):
                    for to, source in enumerate(blocks):
                        (y, x), (v, u) = divmod(to, count[1]), divmod(source, count[1])
                        block = values[row, :, v * cell[0] : (v + 1) * cell[0], u * cell[1] : (u + 1) * cell[1]]
                        found[row, :, y * cell[0] : (y + 1) * cell[0], x * cell[1] : (x + 1) * cell[1]] = block
                return found

            head = dtype, threads, rows, numel
            for given in ((None, None), (plans[0], None), plans):
                out, own, other = np.zeros_like(x), wide, wide[index]
                own = own if given[0] is None else moved(own, given[0])
                other = other if given[1] is None else moved(other, given[1])
                native("fm_mix_masked_forward", *head, x, numel, mask, geometry, index, 1, *given, out, numel)
                close(out.reshape(sides), weight * own + (1 - weight) * other, dtype)
            dx, dmask = np.zeros_like(x), np.zeros_like(mask)
            back = [
                None if plan is None else np.argsort(plan, 1) for plan in (None, *plans)
            ]  # moves blocks where they came from
            for of_own, of_partner in ((0, 0), (1, 0), (1, 2)):
                given = tuple(None if k == 0 else plans[k - 1] for k in (of_own, of_partner))
                how = mask, geometry, index, 1, *given
                assert native("fm_mix_masked_backward", *head, g, numel, x, numel, *how, dx, numel, dmask) == 0
                own, other, to_own, to_other = wide, wide[index], weight * grad, (1 - weight) * grad
                if of_own:
                    own, to_own = moved(own, given[0]), moved(to_own, back[of_own])
                if of_partner:
                    other, to_other = moved(other, given[1]), moved(to_other, back[of_partner])
                np.add.at(to_own, index, to_other)
                close(dx.reshape(sides), to_own, dtype)
                products = (grad * (own - other)).reshape(rows, planes, h, cell[0], w, cell[1])
                assert np.all(np.abs(dmask - products.sum((1, 3, 5))) <= 1e-5 * np.abs(products).sum((1, 3, 5)) + 1e-12)


def check_mix_images(native, random):
    for dtype, (rows, channels, height, width), last in itertools.product(
        (0, 2, 3), ((1, 1, 1, 1), (3, 3, 5, 7), (2, 2, 3, 700)), (False, True)
    ):
        images = random.integers(0, 256, (rows, channels, height, width)).astype(np.uint8)
        held = np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if last else images
        seen = held.transpose(0, 3, 1, 2) if last else held
        factor, shift = random.random((2, channels)).astype(np.float32)
        lam, index = random.random(rows).astype(np.float32), random.integers(0, rows, rows)
        flip, corners = random.integers(0, 2, rows).astype(np.uint8), random.integers(-2, 9, (rows, 4))
        x = images * factor[:, None, None].astype(np.float64) + shift[:, None, None]
        x = np.where(flip.astype(bool)[:, None, None, None], x[..., ::-1], x)
        weight = np.repeat(lam[:, None, None, None].astype(np.float64), height, 2).repeat(width, 3)
        for row in range(rows):
            y0, x0, y1, x1 = np.maximum(corners[row], 0)
            weight[row, :, y0:y1, x0:x1] = 0
        shape, strides = np.array(images.shape), np.array(seen.strides)
        out = np.zeros(images.shape, DTYPES[dtype])
        steps = np.array(out.strides) // out.itemsize
        head = dtype, 2, shape, held, strides, factor, shift
        native("fm_mix_images", *head, flip, 1, lam, 1, index, 1, corners, *[None] * 4, out, steps)
        close(out, weight * x + (1 - weight) * x[index], dtype)
        down, across = (2 if size % 2 == 0 else 1 for size in (height, width))
        cells, size = np.array((down, across)), (height // down, width // across)
        mask = random.random((rows, down, across)).astype(np.float32)
        plans = random.integers(0, down * across, (2, rows, down * across))
        weight = np.repeat(mask.astype(np.float64), size[0], 1).repeat(size[1], 2)[:, None]
        y, at = np.arange(height)[:, None], np.arange(width)
        block = plans[:, :, y // size[0] * across + at // size[1]]
        place = (block // across * size[0] + y % size[0]) * width + block % across * size[1] + at % size[1]
        own, other = (
            np.take_along_axis(values.reshape(rows, channels, -1), p.reshape(rows, 1, -1), 2).reshape(images.shape)
            for values, p in zip((x, x[index]), place, strict=True)
        )
        native("fm_mix_images", *head, flip, 1, None, 0, index, 1, None, mask, cells, *plans, out, steps)
        close(out, weight * own + (1 - weight) * other, dtype)
        behind = np.zeros((rows, height, width, channels), DTYPES[dtype])
        steps = np.array(behind.strides)[[0, 3, 1, 2]] // behind.itemsize
        native("fm_mix_images", *head, flip, 1, None, 0, None, 0, *[None] * 5, behind, steps)
        close(behind.transpose(0, 3, 1, 2), x, dtype)


def check_sample(native, random):
    """Partners are one cycle, or pairs; boxes lie in the image, masks in [0, 1], and targets are of a row and its partner."""
    kinds = (1, 0), (1, 1), (2, 0), (3, 2), (4, 0), (4, 2)  # lam, boxes, boxes of drawn sides, masks; by row, pair and batch
    for (kind, per), rows, wide in itertools.product(kinds, (0, 1, 2, 7, 65, 200), (0, 1)):
        acc, dims, cells = (np.float32, np.float64)[wide], (2 if kind in (2, 3) else 0), (15 if kind == 4 else 0)
        for a, b in ((0.3, 0.3), (0.4, 2.0)):
            leaf = np.array([kind, 0, per, per, 0, 0, a, b, 0.9, 1, 0.2, 0.7, -1, 0, 0], np.float64)
            either = np.array([5, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, -1, 0, 0], np.float64)
            half = np.array([2**52, 2**53], np.float64)
            children = [np.concatenate((leaf[:12], [0, *limits])) for limits in ((0, half[0]), half)]
            for table in (leaf[None], np.stack([either, *children])):
                state, y = random.integers(1, 2**62, 4), random.integers(0, 9, (rows, 2))[:, 0]
                state[2:] = 5, 0
                lam, own, index = np.zeros(rows, acc), np.zeros(rows, acc), np.zeros(rows, np.int64)
                box, mask = np.zeros((rows, 2 * dims), np.int64), np.zeros((rows, cells), acc)
                classes, weights = np.zeros((rows, 2), np.int64), np.zeros((rows, 2), acc)
                failed = native(
                    "fm_sample", [state], 1, 1, table, len(table), rows, 1, None, np.array([9, 5]), dims,
                    cells, wide, 2, lam, index, own, box if dims else None, mask if cells else None, y, 2, classes, weights,
                )  # fmt: skip
                assert not failed
                assert state[2] == 6
                assert sorted(index) == list(range(rows))
                assert per != 1 or rows % 2 or np.array_equal(index[index], np.arange(rows))
                assert rows == 1 or np.all(index != np.arange(rows))
                assert np.all((lam >= 0) & (lam <= 1) & (own >= 0) & (own <= 1))
                assert np.array_equal(classes, np.stack((y, y[index]), 1))
                close(weights, np.stack((own, 1 - own), 1), wide)
                if dims:
                    assert np.all((box[:, :2] >= 0) & (box[:, :2] <= box[:, 2:]) & (box[:, 2:] <= (9, 5)))
                    close(own, 1 - (box[:, 2:] - box[:, :2]).prod(1) / 45, wide)
                if cells:
                    close(lam, mask.mean(1, dtype=np.float64), wide)
    flipped = np.array([1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, -1, 0, 0], np.float64)
    nothing = None, None, None, None, 0, None, None
    head = [state], 1, 0, flipped, 1, 2, 0, None, None, 0, 0, 1, 1
    assert native("fm_sample", *head, lam, index, *nothing) == 0
    assert index[:2].tolist() == [1, 0]


def check_dirichlet(native, random):
    for rows, ways, skip in ((0, 2, None), (3, 1, None), (7, 5, None), (4, 3, np.array([0.5, 2.0]))):
        weights = np.zeros((rows, ways + (skip is not None)))
        native("fm_dirichlet", random.integers(1, 2**62, 4), rows, ways, 0.3, skip, weights)
        assert np.all(weights >= 0)
        assert np.abs(weights.sum(1) - 1).max(initial=0) < 1e-12


def check_scale(native, random):
    for dtype, n in itertools.product((0, 1), (0, 1, 37, 100_000)):
        values = random.standard_normal(n).astype(DTYPES[dtype])
        values[::3] = 0
        scaled, infinite = values.copy(), values.copy()
        native("fm_scale", dtype, 2, n, scaled, 0.5)
        native("fm_scale", dtype, 2, n, infinite, np.inf)
        assert np.array_equal(scaled, 0.5 * values)
        assert np.array_equal(infinite, np.copysign(np.where(values == 0, 0, np.inf), values))


def check_out_of_range(native, random):
    for n in (0, 1, 7, 8, 33, 1000):
        index = random.integers(0, 5, n)
        assert native("fm_out_of_range", index, n, 5, 0) == 0
        for wrong in (-1, 5, -(2**63), 2**63 - 1) if n else ():
            index[-1] = wrong
            assert native("fm_out_of_range", index, n, 5, 0) == 1
            assert native("fm_out_of_range", index, n, 5, wrong) == 0


def check_exp_log(native, random):
    for what, truth in enumerate((np.exp, np.log, np.log1p, np.expm1)):
        x = random.random(37).astype(np.float32)
        out = np.zeros_like(x)
        native("fm_exp_log", what, x, out, len(x))
        close(out, truth(x.astype(np.float64)), 0)


def check_cross_entropy(native, random):
    """Sums over rows, and over the pixels of images; with smoothing and class weights."""
    sizes = ((1, 1, 1, 1), (3, 1, 10, 2), (5, 1, 37, 3), (40, 1, 1000, 2), (1, 2, 3, 1), (2, 17, 10, 2), (2, 75, 19, 3))
    for dtype, (images, pixels, classes, named) in itertools.product(range(4), sizes):
        acc, e, rows = np.float64 if dtype == 1 else np.float32, 0.1, images * pixels

        def by_class(t, images=images, pixels=pixels):
            return t.reshape(images, pixels, -1).transpose(0, 2, 1).copy()

        def by_row(t, rows=rows):
            return t.transpose(0, 2, 1).reshape(rows, -1)

        z = stored(random.standard_normal((rows, classes)), dtype)
        c, a = random.integers(0, classes, (rows, named)), random.random((rows, named)).astype(acc)
        w, rows_of = random.random(classes).astype(acc), stored(random.random((rows, classes)), dtype)
        losses, loss, stats, slopes = (
            np.zeros(rows, acc),
            np.zeros(1, acc),
            np.zeros((3, rows), acc),
            by_class(np.zeros_like(a)),
        )
        wide = exact(z, dtype)
        nll = np.log(np.exp(wide).sum(1, keepdims=True)) - wide
        hot = np.zeros((rows, classes))
        np.add.at(hot, (np.arange(rows)[:, None], c), a)
        t = w * ((1 - e) * hot + e / classes * a.sum(1, keepdims=True, dtype=np.float64))
        z, gradient, again, step = by_class(z), by_class(z), by_class(z), classes * pixels
        options, hot_target = (w, -100, e, 1), (by_class(c), by_class(a))
        head = dtype, 2, rows, classes, named, pixels, z, step, *options
        there = losses, loss, None, stats, slopes, None, 0, gradient, step
        assert native("fm_cross_entropy", *head, *there, *hot_target) == 0
        close(loss, (t * nll).sum(keepdims=True)[0], 0)
        close(by_row(gradient), t.sum(1, keepdims=True) * np.exp(-nll) - t, dtype)
        upstream = random.random(rows).astype(acc)
        back = None, None, None, stats, None, upstream, 1, again, step
        assert native("fm_cross_entropy", *head, *back, *hot_target) == 0
        close(by_row(again), (t.sum(1, keepdims=True) * np.exp(-nll) - t) * upstream[:, None], dtype)
        lam, index = random.random(images).astype(acc), random.integers(0, images, images)
        own = exact(rows_of, dtype).reshape(images, pixels, classes)
        share = lam.astype(np.float64)[:, None, None]
        for mixing, values in (((None, 0, None), own), ((lam, 1, index), share * own + (1 - share) * own[index])):
            t = w * ((1 - e) * values.reshape(rows, classes) + e / classes)
            dense_target = None, None, by_class(rows_of), step, dtype, *mixing
            there = losses, loss, None, stats, None, None, 0, gradient, step
            assert native("fm_cross_entropy", *head, *there, *dense_target) == 0
            close(loss, (t * nll).sum(keepdims=True)[0], 0)
            close(by_row(gradient), t.sum(1, keepdims=True) * np.exp(-nll) - t, dtype)
            slopes = np.zeros((images, classes, pixels), acc)
            assert native("fm_cross_entropy", *head, *back, *dense_target, slopes) == 0
            close(by_row(again), (t.sum(1, keepdims=True) * np.exp(-nll) - t) * upstream[:, None], dtype)
            close(by_row(slopes), (1 - e) * w * nll * upstream[:, None], 0)


def check_binary_cross_entropy(native, random):
    """Sums over rows and classes; with smoothing, weights, and a row that is mixed with its partner."""
    for dtype, (rows, classes, named) in itertools.product(range(4), ((1, 1, 1), (3, 10, 2), (5, 37, 3), (40, 1100, 2))):
        acc, e = np.float64 if dtype == 1 else np.float32, 0.1
        z = stored(random.standard_normal((rows, classes)), dtype)
        c, a = random.integers(0, classes, (rows, named)), random.random((rows, named)).astype(acc)
        w, p = random.random((2, classes)).astype(acc)
        values, lam = stored(random.random((rows, classes)), dtype), random.random(rows).astype(acc)
        losses, loss, slopes = np.zeros(rows, acc), np.zeros(1, acc), np.zeros_like(a)
        wide, index, upstream = exact(z, dtype), random.integers(0, rows, rows), random.random(rows).astype(acc)
        below, above = np.log1p(np.exp(-wide)), np.log1p(np.exp(wide))
        hot = np.zeros((rows, classes))
        np.add.at(hot, (np.arange(rows)[:, None], c), a)
        mixed = lam[:, None] * exact(values, dtype) + (1 - lam[:, None]) * exact(values, dtype)[index]
        for weights in ((None, None), (w, p)):
            cw, pw = (1 if given is None else given.astype(np.float64) for given in weights)
            head = dtype, 2, rows, classes, named, z, classes, *weights, e, np.nan, 1, 1
            targets = {"hot": (c, a), "dense": (None, None, values, classes, dtype, lam, 1, index)}
            for t, kind in ((hot * (1 - e) + e / classes, "hot"), (mixed * (1 - e) + e / 2, "dense")):
                truth = cw * (pw * t * below + (1 - t) * above)
                slope = cw * ((1 - t) / (1 + np.exp(-wide)) - pw * t / (1 + np.exp(wide)))
                gain = np.broadcast_to((1 - e) * cw * (pw * below - above), wide.shape)
                gradient, again, dtarget = np.zeros_like(z), np.zeros_like(z), np.zeros((rows, classes), acc)
                there = losses, loss, slopes if kind == "hot" else None, None, 0, gradient, classes
                native("fm_binary_cross_entropy", *head, *there, *targets[kind])
                back = *head, None, None, None, upstream, 1, again, classes, *targets[kind]
                native("fm_binary_cross_entropy", *back, *([] if kind == "hot" else [dtarget]))
                if kind == "hot":
                    close(slopes, np.take_along_axis(gain, c, 1), 0)
                else:
                    close(dtarget, gain * upstream[:, None], 0)
                close(losses, truth.sum(1), 0)
                close(loss, truth.sum(keepdims=True)[0], 0)
                close(gradient, slope, dtype)
                close(again, slope * upstream[:, None], dtype)


def check_js_divergence(native, random):
    """Sums over rows, of sets that are far apart and nearly equal; one set needs no gradient."""
    for dtype, (sets, rows, classes), apart in itertools.product(
        range(4), ((1, 1, 1), (3, 3, 37), (16, 2, 5), (2, 40, 1100)), (2, 1e-2)
    ):
        acc = np.float64 if dtype == 1 else np.float32
        z = [stored(apart * random.standard_normal((rows, classes)), dtype) for _ in range(sets)]
        wide = np.stack([exact(given, dtype) for given in z])
        p = np.exp(wide) / np.exp(wide).sum(2, keepdims=True)
        ratio = np.log(p / p.mean(0))
        kl = (p * ratio).sum(2, keepdims=True)
        truth = p * (ratio - kl) * 12 / sets
        losses, loss, stats = np.zeros(rows, acc), np.zeros(1, acc), np.zeros((3, sets, rows), acc)
        gradients, again = ([np.zeros_like(given) for given in z] for _ in range(2))
        strides = np.full(sets, classes)
        slopes = [None if k == 1 else a for k, a in enumerate(gradients)]
        head = dtype, 2, rows, classes, sets, z, strides, 12.0, 1
        assert native("fm_js_divergence", *head, losses, loss, stats, None, 0, slopes) == 0
        close(losses, 12 * kl.mean(0)[:, 0], 0)
        close(loss, losses.sum(keepdims=True), 0)
        upstream = random.random(rows).astype(acc)
        assert native("fm_js_divergence", *head, None, None, stats, upstream, 1, again) == 0
        for k in range(sets):
            close(gradients[k], 0 * truth[k] if k == 1 else truth[k], dtype)
            close(again[k], truth[k] * upstream[:, None], dtype)
        assert native("fm_js_divergence", *head, losses, loss, None, None, 0, None) == 0


if __name__ == "__main__":
    native, random = Native(sys.argv[1]), np.random.default_rng(0)
    for check in [found for name, found in sorted(globals().items()) if name.startswith("check_")]:
        check(native, random)
    print("right")
