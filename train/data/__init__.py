"""Datasets in the published layout: objects, batches of them, and the order in which they come."""

from train.data.batch import Batch as Batch
from train.data.batch import collate as collate
from train.data.dataset import EMBEDDED as EMBEDDED
from train.data.dataset import EMBEDDED_32 as EMBEDDED_32
from train.data.dataset import Dataset as Dataset
from train.data.sampler import Sampler as Sampler
