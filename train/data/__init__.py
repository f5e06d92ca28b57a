"""Datasets in the published layout: objects, batches of them, and the order in which they come."""

from train.data.dataset import EMBEDDED as EMBEDDED
from train.data.dataset import Batch as Batch
from train.data.dataset import Dataset as Dataset
from train.data.dataset import Sampler as Sampler
from train.data.dataset import collate as collate
