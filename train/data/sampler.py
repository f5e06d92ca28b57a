"""The order in which objects come: endless, shuffled, the same for every number of ranks."""

from collections.abc import Iterator, Mapping

import numpy as np

from models.reading import entry, shown


class Sampler:
    """The objects of each step, without end, reshuffled every epoch.

    The order is the same for every number of ranks. Yields lists of (object, epoch), the key that
    Dataset picks its views by: one micro-batch of this rank after the other (without `micro_batch`,
    the rank's whole share of a step). Step s takes `batch_size` consecutive places of the stream of
    shuffled epochs, rank r the r-th part of them, so ranks share no place and get lists of one
    length. Raises ValueError where the sizes do not divide.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if length < 1 or not 0 <= rank < world:
            raise ValueError(
                f"there is nothing to sample for rank {rank} of {world} from {length} objects"
            )
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size {batch_size} is not a multiple of {world} ranks")
        self.share = batch_size // world
        self.micro_batch = micro_batch or self.share
        if self.share % self.micro_batch:
            raise ValueError(
                f"a rank's {self.share} objects of a step are not a multiple of micro_batch "
                f"{self.micro_batch}"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.step = 0

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = order = None
        while True:
            first = self.step * self.batch_size + self.rank * self.share
            keys = []
            for place in range(first, first + self.share):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = self._order(epoch)
                keys.append((order[place % self.length], epoch))
            self.step += 1
            for i in range(0, self.share, self.micro_batch):
                yield keys[i : i + self.micro_batch]

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """The state to go on from after `step` steps; by default after those handed out.

        A loader fetches ahead of training, so training says how many steps it has done.
        """
        sizes = {"length": self.length, "batch_size": self.batch_size, "seed": self.seed}
        return {"step": self.step if step is None else step} | sizes

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue exactly from a state.

        Raises ValueError where the saved order is of other objects, another batch or seed, and for
        what is no such state.
        """
        where = "the sampler's state"
        for name in ("length", "batch_size", "seed"):
            if (saved := entry(dict(state), name, int, where)) != getattr(self, name):
                what = "number of objects" if name == "length" else name
                raise ValueError(
                    f"{what} {getattr(self, name)} is not the saved order's {shown(saved)}"
                )
        step = entry(dict(state), "step", int, where)
        if step < 0:
            raise ValueError(f"{where}: step is {shown(step)}, below 0")
        self.step = step
