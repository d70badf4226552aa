"""SamplingParams to and from its wire form; the two have the same fields, and a test keeps it so."""

import dataclasses

import msgspec

from hmad.facts.sampling import SamplingParams
from hmad.wire.messages import Sampling


def sampling_to_wire(params: SamplingParams) -> Sampling:
    return Sampling(**{field.name: getattr(params, field.name) for field in dataclasses.fields(params)})


def sampling_from_wire(sampling: Sampling) -> SamplingParams:
    return SamplingParams(**msgspec.structs.asdict(sampling))
