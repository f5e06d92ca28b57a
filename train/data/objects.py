"""The objects of a run: batches to train on, and held-out views to look at and to score."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from train.config import Config
from train.data.batch import Batch, collate
from train.data.dataset import Dataset, embedded
from train.data.loader import loader
from train.data.sampler import Sampler
from train.run.machine import Machine

GALLERY = {"held-out views": 5, "held-out objects": 3}  # objects in a sample picture
MEASURED = 128  # most objects whose features are measured before the first step


class Objects:
    """The data of one rank: training batches, and held-out views and objects.

    Views are held out of training objects, and other objects are held out whole. Raises ValueError
    for a dataset that cannot be used (train.data.dataset says why).
    """

    def __init__(self, config: Config, here: Machine, meshes: bool = False):
        roots = config.data or [embedded(config.resolution)]
        self.config = config
        self.here = here
        common = dict(
            resolution=config.resolution,
            features=config.features,
            image_size=config.image_size,
            seed=config.seed,
            holdout_views=config.holdout_views,
            cache=not config.data,
            meshes=meshes,
        )
        self.train = Dataset(roots, num_views=config.views, augment=config.augment, **common)
        self.all = {
            views: Dataset(roots, split=None, views=views, **common)
            for views in ("train", "holdout")
        }
        self.channels = self.train.channels
        own = set(self.train.names)
        order = np.random.default_rng(config.seed).permutation(len(self.all["train"])).tolist()
        names = [self.all["train"].names[i] for i in order]
        self.groups = {  # names of the objects that are scored, by what is held out of them
            "held-out views": [name for name in names if name in own][: config.eval_objects],
            "held-out objects": [name for name in names if name not in own][: config.eval_objects],
        }
        self.held_out = len(names) - len(own)
        # by which a run that goes on knows its data, wherever they are then
        self.digest = hashlib.sha256("\n".join(self.train.names).encode()).hexdigest()
        self.sampler = Sampler(
            len(self.train),
            config.batch_size,
            micro_batch=config.micro_batch,
            seed=config.seed,
            rank=here.rank,
            world=here.world,
        )
        # what is wrong with every object, or with what is looked at, shows before the first step
        self.train[0]
        self.gallery()

    def summary(self) -> str:
        """Say in a line what is trained on and what is held out."""
        voxels = f"{self.config.features} features [{self.channels}] at {self.config.resolution}^3"
        held = (
            f"held out: the last {self.config.holdout_views} views, {self.held_out} whole objects"
        )
        return f"{self.train.summary()}; {voxels}; {held}"

    def steps(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of every step that the run still has to do."""
        left = self.config.steps - self.sampler.step
        pin = self.here.device.type == "cuda"
        with closing(loader(self.train, self.sampler, self.config.workers, pin)) as batches:
            for _ in range(left):
                yield [next(batches) for _ in range(self.config.micro_batches(self.here.world))]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean [C] and covariance [C, C] of the training features, over voxels, in float64.

        Of a large dataset, objects spread evenly over it stand for all.
        """
        total = torch.zeros(self.channels, dtype=torch.float64)
        square = torch.zeros(self.channels, self.channels, dtype=torch.float64)
        voxels = 0
        step = -(-len(self.train) // MEASURED)
        for index in range(0, len(self.train), step):
            features = self.train.voxels(index)[1].double()
            total += features.sum(0)
            square += features.T @ features
            voxels += len(features)
        mean = total / max(voxels, 1)
        return mean, square / max(voxels, 1) - torch.outer(mean, mean)

    def views(self, name: str, views: str) -> Batch:
        """Read all "train" or all "holdout" views of one object."""
        return collate([self.all[views].item(name)]).to(self.here.device)

    def captions(self, batch: Batch) -> list[str]:
        """Caption the objects of a batch: file stems, and which are held out whole."""
        held_out = set(self.groups["held-out objects"])
        return [
            self.all["holdout"].title(name) + ("\n(unseen)" if name in held_out else "")
            for name in batch.names
        ]

    def gallery(self) -> Batch:
        """Read one fixed held-out view of a few objects, for sample pictures."""
        names = [name for group, count in GALLERY.items() for name in self.groups[group][:count]]
        return collate([self.all["holdout"].item(name, [0]) for name in names]).to(self.here.device)
