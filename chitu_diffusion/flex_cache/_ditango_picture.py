"""The picture of DiTango's decisions: a column a step, a row for each group of each layer."""

from chitu_diffusion.flex_cache._picture import Picture

FORCED, ANCHOR, COMPUTED, REUSED = range(4)
PALETTE = ((160, 160, 160), (30, 180, 80), (50, 120, 230), (250, 210, 70))  # grey, green, blue, yellow
STRENGTH = (ANCHOR, FORCED, COMPUTED, REUSED)  # of the branches' codes the first of these is shown
CELL = 8  # pixels
THIN, THICK = (245, 245, 245), (30, 30, 30)  # one row of pixels above a group, two above a layer


class Cells:
    """Codes by step, layer and group."""

    def __init__(self, layers: int, groups: int) -> None:
        self._layers, self._groups = layers, groups
        self._codes: dict[tuple[int, int, int], int] = {}

    def mark(self, step: int, layer: int, group: int, code: int) -> None:
        """Colour a cell; of several codes the strongest stays."""
        key = (step, layer, group)
        self._codes[key] = min(code, self._codes.get(key, code), key=STRENGTH.index)

    def picture(self, stem: str) -> Picture | None:
        """The cells, those without a code as forced ones; None for a run of no steps."""
        if not self._codes:
            return None
        steps = max(step for step, _, _ in self._codes) + 1
        width, lines = steps * CELL, []
        for row in range(self._layers * self._groups):
            layer, group = divmod(row, self._groups)
            codes = (self._codes.get((step, layer, group), FORCED) for step in range(steps))
            cells = b"".join(bytes(PALETTE[code]) * CELL for code in codes)
            separators = [bytes(THIN) * width] if group else [bytes(THICK) * width] * 2
            lines += [*separators, *[cells] * (CELL - len(separators))]
        return Picture(stem, width, len(lines), b"".join(lines))
