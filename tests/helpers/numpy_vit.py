"""A vision transformer in numpy, float64, for comparison with models.dinov2.

Written from the papers and from what torch documents of its resampling; it shares nothing with the
model but the names of the weights.
"""

import math

import numpy as np

EPS = 1e-6
PATCH = 14


def cubic(distance: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(distance)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return a * (((x - 5) * x + 8) * x - 4)
    return 0.0


def interpolation(before: int, after: int, scale: float) -> np.ndarray:
    """Bicubic interpolation as a matrix [after, before]: four taps, a = -0.75, edges repeated.

    `scale` is what positions are divided by.
    """
    matrix = np.zeros((after, before))
    for i in range(after):
        position = (i + 0.5) / scale - 0.5
        first = math.floor(position)
        for tap in range(first - 1, first + 3):
            matrix[i, min(max(tap, 0), before - 1)] += cubic(position - tap, -0.75)
    return matrix


def filtering(before: int, after: int) -> np.ndarray:
    """Bicubic resampling with antialiasing as a matrix [after, before]: a = -0.5.

    The kernel is as wide as an output pixel where that is larger; taps outside are left out.
    """
    matrix = np.zeros((after, before))
    ratio = before / after
    wide = max(ratio, 1.0)
    for i in range(after):
        center = (i + 0.5) * ratio
        for tap in range(before):
            matrix[i, tap] = cubic((tap + 0.5 - center) / wide, -0.5)
    return matrix / matrix.sum(1, keepdims=True)


def positions(
    stored: np.ndarray, rows: int, columns: int, antialias: bool, offset: float
) -> np.ndarray:
    """Resample position embeddings [S, S, C] to [rows, columns, C]."""
    before = stored.shape[0]
    if rows == columns == before:
        return stored
    if antialias:
        down, across = filtering(before, rows), filtering(before, columns)
    else:
        down = interpolation(before, rows, (rows + offset) / before)
        across = interpolation(before, columns, (columns + offset) / before)
    return np.einsum("ry,cx,yxd->rcd", down, across, stored)


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Layer norm of the last axis."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + EPS) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact GELU."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x: np.ndarray, w: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """Self-attention of tokens [T, C], one head after the other."""
    channels = x.shape[1] // heads
    query, key, value = np.split(x @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=1)
    parts = []
    for h in range(heads):
        own = slice(h * channels, (h + 1) * channels)
        score = query[:, own] @ key[:, own].T / math.sqrt(channels)
        weight = np.exp(score - score.max(1, keepdims=True))
        parts.append(weight / weight.sum(1, keepdims=True) @ value[:, own])
    return np.concatenate(parts, 1) @ w["proj.weight"].T + w["proj.bias"]


def under(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The weights whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def forward(
    weights: dict[str, np.ndarray],
    picture: np.ndarray,
    *,
    blocks: int,
    heads: int,
    registers: int,
    antialias: bool,
    offset: float,
) -> np.ndarray:
    """Compute the patch tokens [H / 14, W / 14, C] of a picture [3, H, W] after `blocks` blocks."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
    kernel = weights["patch_embed.proj.weight"].reshape(-1, 3 * PATCH * PATCH)
    stored = weights["pos_embed"][0]
    side = math.isqrt(len(stored) - 1)
    place = positions(stored[1:].reshape(side, side, -1), rows, columns, antialias, offset)
    tokens = [weights["cls_token"][0, 0] + stored[0]]
    tokens += list(weights["register_tokens"][0]) if registers else []
    for r in range(rows):
        for c in range(columns):
            patch = picture[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            tokens.append(kernel @ patch.ravel() + weights["patch_embed.proj.bias"] + place[r, c])
    x = np.stack(tokens)
    for i in range(blocks):
        w = under(weights, f"blocks.{i}.")
        y = norm(x, w["norm1.weight"], w["norm1.bias"])
        x = x + w["ls1.gamma"] * attention(y, under(w, "attn."), heads)
        y = norm(x, w["norm2.weight"], w["norm2.bias"])
        y = gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + w["ls2.gamma"] * (y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    return x[1 + registers :].reshape(rows, columns, -1)
