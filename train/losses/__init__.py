"""Losses of pictures and of surfaces, and the objective that weights them."""

from train.losses.objective import Objective as Objective
from train.losses.pictures import Loss as Loss
from train.losses.pictures import PictureLoss as PictureLoss
