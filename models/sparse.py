"""SparseTensor: a feature row for each of N voxels of a batch of scenes."""

from einops import repeat
from torch import Tensor

from kernels import SpatialCache, pool, pooling, unpool
from kernels.checks import check_tensors


class SparseTensor:
    """Features [N, C] on voxels [N, 4] int32, whose columns are batch, x, y, z.

    The rows of one sample are contiguous. Tensors over the same voxels share one SpatialCache, so
    what is derived from coordinates (windows, neighbours, position embeddings) is made once.
    `batch_size` keeps empty samples at the end of a batch; without it the last sample is the one of
    the last row. Raises ValueError for coordinates that SpatialCache rejects and for a row count
    that differs from the features'; TypeError for what is no tensor.
    """

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor | None = None,
        batch_size: int | None = None,
        cache: SpatialCache | None = None,
    ):
        if cache is None:
            if coords is None:
                raise ValueError(
                    "a SparseTensor needs coords or the cache of another tensor over the same "
                    "voxels"
                )
            cache = SpatialCache(coords, batch_size)
        elif coords is not None or batch_size is not None:
            raise ValueError("coords and batch_size belong to the cache: give the cache alone")
        check_tensors(feats=feats)
        if feats.ndim != 2 or len(feats) != len(cache.coords):
            raise ValueError(
                f"feats {tuple(feats.shape)} must be [N, C] with a row for each of "
                f"{len(cache.coords)} coords"
            )
        if feats.device != cache.coords.device:
            raise ValueError(f"feats are on {feats.device}, coords on {cache.coords.device}")
        self.feats = feats
        self.cache = cache

    @property
    def coords(self) -> Tensor:
        return self.cache.coords

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    def replace(self, feats: Tensor) -> "SparseTensor":
        """Put other features on the same voxels."""
        return SparseTensor(feats, cache=self.cache)

    def pool(self, factor: int = 2) -> "SparseTensor":
        """Merge voxels into coarser ones, each with the mean of its children's features.

        Raises ValueError for a factor below 1.
        """
        coarse, _ = self.cache.pool(factor)
        return SparseTensor(pool(self.feats, self.cache.get(pooling, factor)), cache=coarse)

    def unpool(self, factor: int = 2) -> "SparseTensor":
        """Return to the voxels that were pooled into these, each with its parent's features.

        Raises ValueError for voxels that no `pool(factor)` made.
        """
        fine, _ = self.cache.unpool(factor)
        return SparseTensor(unpool(self.feats, fine.get(pooling, factor)), cache=fine)

    def subdivide(self) -> "SparseTensor":
        """Split every voxel into its 8 children at twice the resolution, with its features.

        Raises ValueError where a child would lie beyond the largest coordinate.
        """
        feats = repeat(self.feats, "n c -> (n children) c", children=8)
        return SparseTensor(feats, cache=self.cache.subdivide())

    def split(self) -> tuple[Tensor, ...]:
        """The feature rows of each sample, empty ones included."""
        return self.feats.split(self.cache.counts)

    def __len__(self) -> int:
        return len(self.feats)

    def __repr__(self) -> str:
        return (
            f"SparseTensor({len(self)} voxels, {self.feats.shape[1]} channels, "
            f"{self.batch_size} samples, {self.feats.dtype})"
        )
