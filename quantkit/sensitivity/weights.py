"""Weights of the original model, as a Fisher pass computes with them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.calibrate.weight_cache import WeightCache
from quantkit.documents.sensitivity import FisherJob
from quantkit.formats.model_source import ModelSource


def original_weights(source: ModelSource, device: torch.device, job: FisherJob, room: int) -> WeightCache:
    """On the device, in the dtype in which calibration computes with them. ``room``: bytes of the latest that stay."""
    infos = source.infos()

    def read(name: str) -> Tensor:
        narrow = infos[name].dtype == "BF16" and job.dtype == "BF16"
        return source.read_on(name, device).to(torch.bfloat16 if narrow else torch.float32)

    return WeightCache(read, room)
