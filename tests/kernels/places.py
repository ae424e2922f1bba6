"""A kernel that records where `tiles.locate` puts the pixels of one tile."""

import triton
import triton.language as tl

from biper_engine.kernels import tiles


@triton.jit(do_not_specialize=("tile", "pixels", "height", "width"))
def places_kernel(place_ptr, valid_ptr, tile, pixels, height, width, ROWS: tl.constexpr):
    first, image0, image, row, column, valid = tiles.locate(tile, pixels, height, width, ROWS)
    lane = tl.arange(0, ROWS)
    places = ((image0 + image) * height + row) * width + column
    starts_inside = (image0 * height * width <= first) & (row < height)
    tl.store(place_ptr + lane, tl.where(starts_inside, places, -1))
    tl.store(valid_ptr + lane, valid.to(tl.int32))
