"""AugMix's operations and their weighted sum, image by image."""

import numpy as np


def augmix_operation(image, name, level):
    """An operation on one image [C, H, W] of bytes, as Pillow computes it. Levels: degrees (counter-clockwise), factors of a shear,
    pixels of a translation, bits of posterize, the threshold of solarize; none of autocontrast and equalize."""
    image = np.asarray(image)
    _, H, W = image.shape
    if name in ("autocontrast", "equalize", "posterize", "solarize"):
        return np.stack([_by_table(channel, name, level) for channel in image])
    if name == "rotate":
        angle = -np.radians(level)
        cosine, sine = round(float(np.cos(angle)), 15), round(float(np.sin(angle)), 15)
        matrix = [[cosine, sine], [-sine, cosine]]
        offset = [row[0] * (-W / 2) + row[1] * (-H / 2) + half for row, half in zip(matrix, (W / 2, H / 2), strict=True)]
    else:
        kind, axis = name.split("_")
        matrix, offset = [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]
        line = "xy".index(axis)
        if kind == "shear":
            matrix[line][1 - line] = level
        else:
            offset[line] = level
    out = np.zeros_like(image)
    for y in range(H):
        for x in range(W):
            at = [row[0] * (x + 0.5) + row[1] * (y + 0.5) + more for row, more in zip(matrix, offset, strict=True)]
            if 0 <= at[0] < W and 0 <= at[1] < H:
                for c, channel in enumerate(image):
                    out[c, y, x] = int(_bilinear(channel.astype(np.float64), at[0] - 0.5, at[1] - 0.5))
    return out


def _bilinear(channel, x, y):
    left, top = int(np.floor(x)), int(np.floor(y))

    def pixel(line, column):
        return channel[min(max(line, 0), channel.shape[0] - 1), min(max(column, 0), channel.shape[1] - 1)]

    def between(line):
        a = pixel(line, left)
        return a + (pixel(line, left + 1) - a) * (x - left)

    return between(top) + (between(top + 1) - between(top)) * (y - top)


def _by_table(channel, name, level):
    if name == "posterize":
        return (channel.astype(int) // 2 ** (8 - level) * 2 ** (8 - level)).astype(np.uint8)
    if name == "solarize":
        return np.where(channel < level, channel, 255 - channel)
    used = sorted(set(channel.flat))
    table = {value: int(value) for value in used}
    if name == "autocontrast" and len(used) > 1:
        scale = 255.0 / (int(used[-1]) - int(used[0]))
        table = {value: min(max(int(int(value) * scale + -int(used[0]) * scale), 0), 255) for value in used}
    if name == "equalize" and len(used) > 1:
        counts = {value: int(np.sum(channel == value)) for value in used}
        step = (channel.size - counts[used[-1]]) // 255
        if step:
            table = {v: min((step // 2 + sum(counts[u] for u in used if u < v)) // step, 255) for v in used}
    return np.array([table[value] for value in channel.flat], dtype=np.uint8).reshape(channel.shape)


def augmix(images, chains, weights, mean, std, scale=1 / 255):
    """Views of images [N, C, H, W]: [views, N, C, H, W] in float64. chains[n][view][k] is a list of (operation, level); weights [N, views,
    1 + width] are those of the image and of its chains."""
    images, weights = np.asarray(images), np.asarray(weights, dtype=np.float64)
    mean, std = (np.asarray(values, dtype=np.float64).reshape(-1, 1, 1) for values in (mean, std))

    def normalized(image):
        return (image * scale - mean) / std

    views = [np.zeros(images.shape) for _ in range(weights.shape[1])]
    for n, image in enumerate(images):
        for view, of_chain in enumerate(chains[n]):
            total = weights[n, view, 0] * normalized(image)
            for k, chain in enumerate(of_chain):
                moved = image
                for name, level in chain:
                    moved = augmix_operation(moved, name, level)
                total = total + weights[n, view, 1 + k] * normalized(moved)
            views[view][n] = total
    return np.stack(views)
