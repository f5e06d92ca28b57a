"""Compositing of projected Gaussians on a CPU, in vectorised torch.

P pairs (a Gaussian seen by a view), V views of H x W pixels; N instances (a pair in a 4 x 4 tile
that it may touch) and S tiles, from kernels.gaussian.binning_cpu. Every tile has a list of
instances, near to far. All lists are walked together, SEGMENT instances at a time; a tile leaves
when all its pixels are finished. Tiles with lists of like length form chunks [T, 16 pixels, L
instances] of about COLUMNS instances, few enough for a cache, in buffers that are reused: beyond
the lists memory does not grow with N. Numbers of instances are planes [., T, L], gathered from
planes [., P] of pairs, and the backward pass adds planes back to those of pairs: sums of rows, or
of columns sorted by pair, take several times as long.

With e the exponent, alpha = opacity exp(e), r = alpha / (1 - alpha) and T the transmittance behind
an instance, w = r T is its weight. For an upstream gradient g let a = <color, g>: the gradient of e
is w a - r B, where B, the light that arrives from behind, is the sum of w a over the instances
behind plus T_final (<background, g> + g_T). So the backward pass is one cumulative sum and three
small matrix products. Where it follows, the numbers of the first chunks are kept for it, KEPT at
most (it computes those of the others again): a gain where the allocator keeps freed memory,
otherwise none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gaussian.binning_cpu import ALPHA_MIN, TILE, Lists, bin_torch

PIXELS = TILE * TILE
SEGMENT = 128  # instances of one tile at a time
COLUMNS = 8192  # instances of one chunk
ROOM = 2 * PIXELS + 5  # numbers of an instance: weights, ratios, offset and color
KEPT = 1 << 26  # numbers that are kept for the backward pass at most
ALPHA_MAX, T_MIN = 0.99, 1e-4
LOG2_E = 1.4426950408889634


def composite_torch(
    mean: Tensor,  # [P, 2] pixels
    conic: Tensor,  # [P, 3] (c11, c12, c22)
    opacity: Tensor,  # [P]
    color: Tensor,  # [P, 3]
    depth: Tensor,  # [P]
    rect: Tensor,  # [P, 4] int32 (x0, y0, x1, y1) in 16 x 16 tiles, end exclusive
    view: Tensor,  # [P] int64
    V: int,
    H: int,
    W: int,
    background: Tensor,  # [V, 3]
    keep: bool = False,  # whether a backward pass follows: it is right without, but slower
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Blend front to back.

    Returns the image [V, 3, H, W], the final transmittance [V, H, W] and what the backward pass
    needs.

    Pixel (i, j) takes pair p if its 16 x 16 tile is inside rect[p], with d = mean - (i, j), e =
    -(c11 dx^2 + c22 dy^2) / 2 - c12 dx dy, alpha = min(0.99, opacity exp(e)); skipped where e > 0
    or alpha < 1/255. Order is by depth, then by index. A pixel is finished, without blending the
    pair, when its transmittance would fall below 1e-4.
    """
    lists = bin_torch(mean, conic, opacity, depth, rect, view, V, H, W, SEGMENT)
    shade = _Shader(mean, conic, opacity, color, rect, lists.tile, H, W)
    S = len(lists.tile)
    blended = mean.new_zeros(S, 3, PIXELS)
    final = mean.new_ones(S, PIXELS)
    light = mean.new_ones(S, PIXELS)  # transmittance so far, 0 where the pixel is finished
    count = lists.count.clone()
    passed = [light[:0]]
    walked = [lists.pair[:0]]
    segment = 0
    kept = _Kept(_memory(lists, mean) if keep else mean.new_empty(0))
    while len((walk := _Walk(count, segment)).live):
        entering = light[walk.live]
        gained = mean.new_empty(len(walk.live), 3, PIXELS)
        start = lists.start[walk.live] + segment * SEGMENT
        passed.append(entering)
        leaving, smallest = torch.empty_like(entering), torch.empty_like(entering)
        for part, L in walk.parts:
            pair = walk.pairs(lists.pair, start, part, L)
            walked.append(pair.view(-1))
            piece, leaving[part], smallest[part] = shade(
                pair, walk.live[part], entering[part], kept.take(pair.numel())
            )
            torch.bmm(piece.color, piece.weight.transpose(1, 2), out=gained[part])
        blended.index_add_(0, walk.live, gained)
        final[walk.live] = torch.minimum(final[walk.live], smallest)
        light[walk.live] = leaving
        segment += 1
        count[walk.live[leaving.amax(1) == 0]] = segment * SEGMENT  # what is behind is not seen
    image, final_T = _untile(blended, final, lists.tile, V, H, W)
    image.addcmul_(final_T[:, None], background[:, :, None, None])
    count = torch.minimum(count, lists.count)
    walked, passed = torch.cat(walked), torch.cat(passed)
    saved = (walked, lists.tile, count, passed, final, kept.memory[: kept.used])
    return image, final_T, saved


def composite_torch_backward(
    saved: tuple[Tensor, ...],
    mean: Tensor,
    conic: Tensor,
    opacity: Tensor,
    color: Tensor,
    depth: Tensor,
    rect: Tensor,
    view: Tensor,
    V: int,
    H: int,
    W: int,
    background: Tensor,
    image: Tensor,
    final_T: Tensor,
    grad_image: Tensor,  # [V, 3, H, W]
    grad_final_T: Tensor,  # [V, H, W]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mean [P, 2], conic [P, 3], opacity [P] and color [P, 3].

    The arguments are those of `composite_torch`.

    The clamp at 0.99 passes the gradient; nothing flows through thresholds, order or rectangles.
    """
    walked, tile, count, passed, final, memory = saved
    shade = _Shader(mean, conic, opacity, color, rect, tile, H, W)
    grad_behind = torch.addcmul(grad_final_T, grad_image[:, 0], background[:, 0, None, None])
    for k in (1, 2):
        grad_behind.addcmul_(grad_image[:, k], background[:, k, None, None])
    upstream = _tiled(torch.cat([grad_image, grad_behind[:, None]], 1), tile)
    upstream, arriving = upstream[:3].transpose(0, 1).contiguous(), final * upstream[3]
    x = torch.arange(TILE, dtype=mean.dtype, device=mean.device) - (TILE - 1) / 2
    x, y = x.repeat(TILE), x.repeat_interleave(TILE)
    # about the middle of a tile: nothing cancels
    powers = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y])
    walks = [
        _Walk(count, segment)
        for segment in range(-(-int(count.max()) // SEGMENT) if len(count) else 0)
    ]
    shapes = [(part.stop - part.start, L) for walk in walks for part, L in walk.parts]
    pairs = walked.split([T * L for T, L in shapes])
    kept = _Kept(memory)
    chunks = [
        (pair.view(shape), kept.take(len(pair))) for pair, shape in zip(pairs, shapes, strict=True)
    ]
    # of every pair: sums of slope times 1, d and d^2 (d = mean - pixel), then of its color's
    # gradient
    sums = mean.new_zeros(9, len(mean) + 1)
    for walk in reversed(walks):
        entering = passed[len(passed) - len(walk.live) :]
        passed = passed[: len(passed) - len(walk.live)]
        behind, gradient = arriving[walk.live], upstream[walk.live]
        for part, _ in reversed(walk.parts):
            pair, room = chunks.pop()
            g = gradient[part]
            if room is None:
                piece, _, _ = shade(pair, walk.live[part], entering[part])
            else:
                piece = _Piece.of(room, *pair.shape)
            grad_color = torch.bmm(g, piece.weight)  # [T, 3, L]
            slope, light = shade.scratch(*pair.shape)
            torch.bmm(g.transpose(1, 2), piece.color, out=slope).mul_(piece.weight)
            total = torch.cumsum(slope, 2, out=light)[..., -1:] + behind[part, :, None]
            behind[part] = total[..., 0]
            # past the clamp alpha is 0.99, and its derivative is that of opacity exp(e)
            if shade.bright:
                slope.mul_((piece.ratio / shade.ratio_max).clamp_(min=1))
            slope.addcmul_(piece.ratio, torch.sub(total, light, out=light), value=-1)
            moments = torch.bmm(powers.expand(len(slope), 6, PIXELS), slope).transpose(0, 1)
            own = pair.view(-1).long()
            _add_to_pairs(sums, own, moments, piece.offset, grad_color.transpose(0, 1))
        arriving[walk.live] = behind
    s, sx, sy, sxx, syy, sxy = sums[:6, :-1]
    c11, c12, c22 = conic.unbind(1)
    return (
        torch.stack([-(c11 * sx + c12 * sy), -(c12 * sx + c22 * sy)]).t(),
        torch.stack([sxx * -0.5, -sxy, syy * -0.5]).t(),
        torch.where(s == 0, 0, s / opacity),
        sums[6:, :-1].t(),
    )


class _Piece(NamedTuple):
    """One chunk, T tiles of L instances; the next one overwrites it unless it is kept."""

    weight: Tensor  # [T, 16, L] what a pixel takes of an instance's color
    ratio: Tensor  # [T, 16, L] opacity exp(e) / (1 - alpha), 0 where the instance is skipped
    planes: Tensor  # [5, T, L] those of offset and color
    offset: Tensor  # [2, T, L] mean - middle of the tile
    color: Tensor  # [T, 3, L]

    @classmethod
    def of(cls, room: Tensor, T: int, L: int) -> "_Piece":
        """The piece whose numbers stand in `room` [T L ROOM]."""
        weight, ratio, planes = room.view(ROOM, -1).split([PIXELS, PIXELS, 5])
        planes = planes.view(5, T, L)
        shape = T, PIXELS, L
        return cls(
            weight.view(shape), ratio.view(shape), planes, planes[:2], planes[2:].transpose(0, 1)
        )


class _Kept:
    """Room for the numbers of chunks, one after the other in the order of the walk."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        self.used = 0
        self.full = False

    def take(self, instances: int) -> Tensor | None:
        """[instances ROOM] for a chunk; None from the first chunk on that has no room."""
        begin = self.used
        end = self.used + instances * ROOM
        self.full = self.full or end > len(self.memory)
        if self.full:
            return None
        self.used = end
        return self.memory[begin:end]


def _memory(lists: Lists, like: Tensor) -> Tensor:
    """Enough for all chunks or KEPT numbers: what a segment is padded with is less than a chunk."""
    segments = -(-int(lists.count.max()) // SEGMENT) if len(lists.count) else 0
    return like.new_empty(min(KEPT, ROOM * (len(lists.pair) + segments * COLUMNS)))


class _Shader:
    """Evaluates chunks: what is the same for all of them, and the buffers."""

    def __init__(self, mean, conic, opacity, color, rect, tile: Tensor, H: int, W: int):
        half = conic.new_tensor([[-0.5], [1], [-0.5]]) * LOG2_E  # 2^x takes half the time of e^x
        planes = torch.cat([mean.t(), color.t(), conic.t() * half, opacity.log2()[None]])
        self.planes = torch.nn.functional.pad(planes, (0, 1))
        self.planes[8, -1] = -torch.inf  # the last pair has opacity 0
        rows, columns = -(-H // TILE), -(-W // TILE)
        corner = torch.stack([tile % columns, tile // columns % rows])[..., None] * TILE
        self.middle = corner.to(mean.dtype) + (TILE - 1) / 2  # [2, S, 1]
        steps = torch.arange(TILE, dtype=mean.dtype, device=mean.device) - (TILE - 1) / 2
        self.steps = steps[:, None]  # [4, 1]
        # e > 0 comes from rounding only, and only where the quadratic form is nearly or not
        # positive definite
        c11, c12, c22 = conic.unbind(1)
        plain = (
            (c11 > 0) & (c22 > 0) & (c12 * c12 < (1 - 64 * torch.finfo(mean.dtype).eps) * c11 * c22)
        )
        drawn = (rect[:, 2] > rect[:, 0]) & (rect[:, 3] > rect[:, 1])
        self.steep = bool((drawn & ~plain).any())
        self.bright = bool((drawn & (opacity > ALPHA_MAX)).any())
        self.ratio_max = (mean.new_tensor(ALPHA_MAX) / (1 - mean.new_tensor(ALPHA_MAX))).item()
        below = torch.nextafter(mean.new_tensor([ALPHA_MIN, T_MIN]), mean.new_zeros(()))
        self.alpha_skip, self.light_skip = below.tolist()  # the largest values that are skipped
        most = max(COLUMNS, SEGMENT)
        self.room = mean.new_empty(most * ROOM)
        self.buffers = mean.new_empty(2 * PIXELS * most)

    def scratch(self, T: int, L: int) -> Tensor:
        """Two planes [2, T, 16, L] that hold nothing."""
        return self.buffers[: 2 * T * PIXELS * L].view(2, T, PIXELS, L)

    def __call__(
        self, pair: Tensor, tile: Tensor, entering: Tensor, room: Tensor | None = None
    ) -> tuple[_Piece, Tensor, Tensor]:
        """Shade a chunk of tiles.

        pair [T, L] int32, tile [T] its index, entering [T, 16] transmittance in front of the chunk.

        With the piece, whose numbers stand in `room` if it is given, comes the transmittance behind
        the chunk [T, 16], 0 where the pixel is finished, and behind the last instance that was
        blended.
        """
        T, L = pair.shape
        piece = _Piece.of(self.room[: T * L * ROOM] if room is None else room, T, L)
        weight = piece.weight
        ratio = piece.ratio
        light = self.scratch(T, L)[0]
        own = pair.view(-1)
        torch.index_select(self.planes[:5], 1, own, out=piece.planes.view(5, -1))
        piece.offset.sub_(self.middle[:, tile])
        d = piece.offset.transpose(0, 1)[:, :, None] - self.steps  # [T, 2, 4, L] mean - pixel
        dx, dy = d.unbind(1)
        shape = self.planes[5:].index_select(1, own).view(4, T, 1, L)
        c11, c12, c22, strength = shape  # [T, 1, L]
        exponent = ratio.view(T, TILE, TILE, L)  # [T, y, x, L]
        across = (c11 * dx).mul_(dx)
        if not self.steep:
            across.add_(strength)
        torch.add(across[:, None], (c22 * dy).mul_(dy)[:, :, None], out=exponent)
        exponent.addcmul_((c12 * dx)[:, None], dy[:, :, None], value=-1)
        if self.steep:
            ratio.masked_fill_(ratio > 0, -torch.inf).add_(strength)
        alpha = torch.threshold_(ratio.exp2_(), self.alpha_skip, 0)
        torch.sub(1, alpha.clamp(max=ALPHA_MAX) if self.bright else alpha, out=light)
        ratio.div_(light)
        light[..., 0].mul_(entering)
        leaving = smallest = light.cumprod_(2)[..., -1].contiguous()
        if len(leaving) > 0 and leaving.min().item() <= self.light_skip:
            torch.threshold_(light, self.light_skip, 0)
            ratio.mul_(light.ceil())
            leaving = light[..., -1].contiguous()
            smallest = torch.where(light == 0, 1, light).amin(2)
        torch.mul(ratio.clamp(max=self.ratio_max) if self.bright else ratio, light, out=weight)
        return piece, leaving, smallest


class _Walk:
    """One segment of all lists: the tiles that reach it, and parts of these of like length."""

    def __init__(self, count: Tensor, segment: int):
        live = (count > segment * SEGMENT).nonzero().squeeze(1)
        self.length, order = (
            (count[live] - segment * SEGMENT).clamp_(max=SEGMENT).sort(descending=True, stable=True)
        )
        self.live = live[order]
        lengths = self.length.tolist()
        a = 0
        self.parts: list[tuple[slice, int]] = []  # which of `live`, longest list
        while a < len(lengths):
            b = min(len(lengths), a + COLUMNS // lengths[a])
            self.parts.append((slice(a, b), lengths[a]))
            a = b

    def pairs(self, pair: Tensor, start: Tensor, part: slice, L: int) -> Tensor:
        """[T, L] int32: `pair` from every live tile's `start` on, filled up with its last entry."""
        rows = pair.unfold(0, L, 1).index_select(0, start[part])
        if self.length[part.stop - 1] < L:
            step = torch.arange(L, dtype=torch.int32, device=pair.device)
            rows.masked_fill_(step >= self.length[part, None], pair[-1])
        return rows


def _add_to_pairs(
    sums: Tensor, pair: Tensor, moments: Tensor, offset: Tensor, color: Tensor
) -> None:
    """Add a chunk's sums over pixels to those of its pairs [9, P + 1].

    pair [T L]; moments [6, T, L] of 1, x, y, x^2, y^2, xy about a tile's middle; offset [2, T, L],
    the mean less that middle; color [3, T, L].
    """
    once = moments[0]
    linear = moments[1:3]
    planes = moments.new_empty(9, *once.shape)
    planes[0] = once
    first, second = planes[1:3], planes[3:5]
    torch.mul(offset, once, out=first).sub_(linear)
    torch.addcmul(moments[3:5], offset, first - linear, out=second)
    mixed = torch.addcmul(moments[5], offset[1], first[0], out=planes[5])
    mixed.addcmul_(offset[0], linear[1], value=-1)
    planes[6:] = color
    for total, plane in zip(sums, planes, strict=True):
        total.scatter_add_(0, pair, plane.view(-1))


def _tiled(image: Tensor, tile: Tensor) -> Tensor:
    """[V, C, H, W] -> planes of the tiles asked for [C, S, 16], zero outside the image."""
    _, C, H, W = image.shape
    height, width = (-(-n // TILE) * TILE for n in (H, W))
    planes = torch.nn.functional.pad(image.transpose(0, 1), (0, width - W, 0, height - H))
    step = torch.arange(TILE, device=tile.device)
    columns = width // TILE
    first = (tile // columns * width + tile % columns) * TILE
    pixels = first[:, None] + (step[:, None] * width + step).view(-1)  # [S, 16]
    return planes.reshape(C, -1).index_select(1, pixels.view(-1)).view(C, -1, PIXELS)


def _untile(
    blended: Tensor, final: Tensor, tile: Tensor, V: int, H: int, W: int
) -> tuple[Tensor, Tensor]:
    """Tiles -> image [V, 3, H, W] and transmittance [V, H, W]: 0 and 1 where there is no tile."""
    rows, columns = -(-H // TILE), -(-W // TILE)
    planes = []
    for values, empty in ((blended, 0), (final[:, None], 1)):
        whole = values.new_full((V * rows * columns, values.shape[1], PIXELS), empty)
        whole[tile] = values
        whole = whole.view(V, rows, columns, values.shape[1], TILE, TILE).permute(0, 3, 1, 4, 2, 5)
        planes.append(
            whole.reshape(V, values.shape[1], rows * TILE, columns * TILE)[..., :H, :W].contiguous()
        )
    return planes[0], planes[1][:, 0]
