"""A converted network: conversion makes it, files hold it and engines run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.reading import output_values
from biper_engine.graph.signature import Signature
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport

__all__ = ["BYTES", "ConvertedNetwork", "ProgramSection", "Proof"]

BYTES = 256


@dataclass(frozen=True)
class Proof:
    """What the reference backend computed from a seed when a network was saved.

    Attributes:
        seed: seed of the inputs; see `biper_engine.serialization.example_inputs`.
        maps: SHA-256 of every packed map, int32 little endian, by node name, in order.
        outputs: SHA-256 of every output's bytes, None for an output that is not a tensor.
        values: the outputs that are small enough to store, by position.
        bound: integers of the inputs are below this number.
    """

    seed: int
    maps: Mapping[str, str]
    outputs: tuple[str | None, ...]
    values: Mapping[int, Tensor]
    bound: int = BYTES


@dataclass(frozen=True, eq=False)
class ConvertedNetwork:
    """A converted network, and what is known about it.

    Attributes:
        graph_module: the network, which consists only of operators.
        signature: how it is called.
        report: what conversion did to every layer.
        metadata: preprocessing and labels, or None.
        provenance: where the weights came from, or None.
        options: the arguments of the `convert` call, as JSON values.
        proof: proof of the file that it was read from, or None.

    Raises:
        ValueError: `signature` does not fit the graph.
    """

    graph_module: fx.GraphModule
    _: KW_ONLY
    signature: Signature
    report: ConversionReport
    metadata: Metadata | None = None
    provenance: Provenance | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof | None = None

    def __post_init__(self) -> None:
        graph = self.graph_module.graph
        names = [node.name for node in graph.nodes if node.op == "placeholder"]
        wanted = [spec.name for spec in self.signature.inputs]
        if names != wanted:
            raise ValueError(f"`signature` names the inputs {wanted}, but the graph's are {names}.")
        leaves, outputs = self.signature.out_spec.num_leaves, len(output_values(graph))
        if outputs != leaves:
            raise ValueError(
                f"`signature.out_spec` has {leaves} leaves, but the graph returns {outputs} values."
            )

    @property
    def device(self) -> torch.device | None:
        """Device of its tensors; None for a network without tensors."""
        tensors = chain(self.graph_module.buffers(), self.graph_module.parameters())
        return next((tensor.device for tensor in tensors), None)


@dataclass(frozen=True)
class ProgramSection:
    """What a file holds of a network's native program, for loaders without Python.

    Attributes:
        entry: JSON values; see `biper_engine.runtime.program_section`.
        tensors: those of the program that are no views of a tensor of the graph, by name.
    """

    entry: dict[str, Any]
    tensors: dict[str, Tensor]
