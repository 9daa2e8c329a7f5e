"""Which method may rescale which input channels of an output (see `quantkit.quantizers.rescaling`), and hidden units of
routed experts, which are rescaled when their batch is at hand. The layer's other channels: `quantkit.convert.rescale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from quantkit.arch.base import Producer
from quantkit.calibrate.inputs import InputImportance
from quantkit.convert.outputs import Linears, OutputChoice
from quantkit.quantizers.rescaling import ChannelReader, Channels, Rescaled, RescalingMethod

PartsOf = Callable[[str], tuple[str, ...]]
"""A linear's name -> it, and the names of its parts."""


def alone(name: str) -> tuple[str, ...]:
    """The linear without parts."""
    return (name,)


def rescaled_by(output: OutputChoice, producer: Producer, parts_of: PartsOf) -> RescalingMethod | None:
    """The method of an output that may rescale the inputs of a producer's readers, None if there is none.

    It must be the only one of their methods that rescales, and every tensor that would change must be written anew.
    """
    named = [name for reader in producer.readers for name in parts_of(reader)]
    methods = {output.methods[name][1] for name in named if name in output.methods}
    rescaling = [method for method in methods if isinstance(method, RescalingMethod)]
    if len(rescaling) != 1 or not output.verbatim.isdisjoint((producer.tensor, *producer.readers)):
        return None
    return rescaling[0]


def with_rescaled(output: OutputChoice, rescaled: Sequence[Rescaled]) -> OutputChoice:
    """The output with more of its channels rescaled."""
    return replace(output, folding=output.folding.extended(rescaled)) if rescaled else output


def asked(method: RescalingMethod, channels: Channels) -> tuple[Rescaled, ...]:
    """What a method makes of some producers' channels."""
    factors = method.rescale(channels)
    if factors is None:
        return ()
    return tuple(Rescaled(*pair) for pair in zip(channels.producers, factors, strict=True))


def rescale_hidden(output: OutputChoice, down: Linears, stats: InputImportance) -> tuple[Rescaled, ...]:
    """Ask a method for factors of the hidden units of some experts, which an output treats alike. ``stats``: (B, inter)
    of each of them."""
    if not down.producers or down.names[0] not in output.methods:
        return ()
    method = rescaled_by(output, down.producers[0], alone)
    if method is None:
        return ()
    scheme, _ = output.methods[down.names[0]]
    return asked(method, Channels(down.producers, stats, lambda: iter([ChannelReader(scheme, down.weight, stats)])))
