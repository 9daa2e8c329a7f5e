"""Weights of the original model, as a Fisher pass computes with them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.calibrate.weight_cache import WeightCache
from quantkit.documents.sensitivity import FisherJob
from quantkit.formats.model_source import ModelSource
from quantkit.plan.machine import Machine


def original_weights(source: ModelSource, machine: Machine, job: FisherJob) -> WeightCache:
    """On the machine's device, in the dtype in which calibration computes with them."""
    infos = source.infos()

    def read(name: str) -> Tensor:
        narrow = infos[name].dtype == "BF16" and job.dtype == "BF16"
        return source.read_on(name, machine.device).to(torch.bfloat16 if narrow else torch.float32)

    room = machine.device_bytes // 20 if machine.device.type == "cuda" else machine.budget // 4
    return WeightCache(read, room)
