"""How fast work can be at most on a GPU whose ceilings were measured: bytes, bits and floats.

Work is what one fused kernel cannot avoid: to read each of its inputs and its weights once, to
write each of its outputs once, and to do its multiply-accumulates, padded taps counted. Of the
three times that take, the longest is the floor. Parameters of a channel, 20 bytes at most, are not
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = ["Ceilings", "Conv", "Work", "share", "total"]

WORD_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the GPU does at most; None where that was not measured.

    Attributes:
        copy_bytes: a second, read and written, between buffers that no cache holds.
        l2_copy_bytes: the same between buffers that L2 holds.
        l2_bytes: size of L2.
        binary_macs: bit-MACs a second of the 1-bit matrix instruction.
        popcount_macs: the same of popcounts.
        int8_macs: MACs a second of the matrix instruction on bytes.
        float_macs: MACs a second of a large float16 product.
        launches: empty kernels of a CUDA graph a second, each behind the one before.
    """

    copy_bytes: float | None = None
    l2_copy_bytes: float | None = None
    l2_bytes: int | None = None
    binary_macs: float | None = None
    popcount_macs: float | None = None
    int8_macs: float | None = None
    float_macs: float | None = None
    launches: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Ceilings:
        """Take them from JSON values, in which others may be."""
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})

    def bytes_per_second(self, nbytes: float) -> float | None:
        """Return the copy rate for so many bytes: that of L2 where half of it holds them."""
        fits = self.l2_bytes is not None and nbytes <= self.l2_bytes / 2
        return self.l2_copy_bytes if fits and self.l2_copy_bytes else self.copy_bytes

    def bit_macs_per_second(self, *, grouped: bool) -> float | None:
        """Return the rate of the fastest unit for bits; convolutions in groups have popcounts."""
        if grouped:
            return self.popcount_macs
        rates = [self.binary_macs, self.int8_macs, self.popcount_macs]
        return next((rate for rate in rates if rate), None)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What some kernels have to do, together.

    Attributes:
        nbytes: read and written.
        bit_macs, grouped_bit_macs: multiply-accumulates of bits; of those in groups.
        float_macs: multiply-accumulates of floats.
    """

    nbytes: float = 0
    bit_macs: float = 0
    grouped_bit_macs: float = 0
    float_macs: float = 0

    def times(self, ceilings: Ceilings) -> dict[str, float]:
        """Return the least seconds for "bytes", "bits" and "floats": what there is to do of them.

        What has no known rate is left out.
        """
        dense, grouped = (ceilings.bit_macs_per_second(grouped=each) for each in (False, True))
        bits = [(self.bit_macs, dense), (self.grouped_bit_macs, grouped)]
        found = {
            "bytes": _seconds((self.nbytes, ceilings.bytes_per_second(self.nbytes))),
            "bits": _seconds(*bits),
            "floats": _seconds((self.float_macs, ceilings.float_macs)),
        }
        return {name: seconds for name, seconds in found.items() if seconds}

    def floor(self, ceilings: Ceilings) -> tuple[float, str] | None:
        """Return the least seconds and what bounds them; None where no rate of it is known."""
        times = self.times(ceilings)
        if not times:
            return None
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def _seconds(*parts: tuple[float, float | None]) -> float | None:
    if any(amount and not rate for amount, rate in parts):
        return None
    return sum(amount / rate for amount, rate in parts if rate)


def total(works: Iterable[Work], ceilings: Ceilings) -> float | None:
    """Return the sum of floors of kernels that run one after another; None if one is unknown."""
    floors = [work.floor(ceilings) for work in works]
    return sum(floor[0] for floor in floors if floor) if floors and all(floors) else None


def share(floor_s: float | None, measured_s: float) -> float | None:
    """Return how much of the measured time the floor is: 1 is the roofline."""
    return None if floor_s is None else floor_s / measured_s


def words(channels: int) -> int:
    return -(-channels // WORD_BITS)


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A binary convolution of a network with what leaves it.

    Attributes:
        name: of the layer, such as "l1 64@56".
        network: that it is of.
        geometry: of the convolution.
        size: height and width of the input.
        residual: whether a float map is added.
        want_float, want_bits: what leaves.
        pool: of the accumulators.
        count: how often the network has it.
    """

    name: str
    network: str
    geometry: Conv2dGeometry
    size: tuple[int, int]
    residual: bool = False
    want_float: bool = False
    want_bits: bool = True
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    count: int = 1

    def output_size(self) -> tuple[int, int]:
        """Return height and width of what leaves."""
        return self.pool.output_size(*self.geometry.output_size(*self.size))

    def work(self, batch: int, float_bytes: int) -> Work:
        """Return what it has to do.

        Args:
            batch: images.
            float_bytes: of one value of a float map, 4 or 2.
        """
        geometry, (rows, columns) = self.geometry, self.output_size()
        pixels = batch * rows * columns
        packed_in = 4 * batch * self.size[0] * self.size[1] * words(geometry.in_channels)
        weights = 4 * geometry.out_channels * geometry.taps * words(geometry.group_channels)
        floats = float_bytes * pixels * geometry.out_channels * (self.residual + self.want_float)
        packed_out = 4 * pixels * words(geometry.out_channels) * self.want_bits
        macs = batch * geometry.macs(*self.size)
        grouped = geometry.groups > 1
        return Work(
            nbytes=packed_in + weights + floats + packed_out,
            bit_macs=0 if grouped else macs,
            grouped_bit_macs=macs if grouped else 0,
        )
