"""Hand-written SVG: boxes with text in them, arrows between them, on a white sheet. Standard library alone.

The sheet is as wide as a phone's screen, so that its letters are not scaled down there; text stays text. It paints its
own background, and so looks the same on light and dark pages; shapes and hatching, not colours, tell things apart.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

INK, QUIET, ACCENT, PALE, SHEET = "#1B1F24", "#4B5159", "#0072B2", "#F1F4F7", "#FFFFFF"
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
TITLE_PX, TEXT_PX, LINE_PX, PAD_PX = 17, 14, 19, 12
# Widths of DejaVu Sans in em, rounded up; it is the widest of the common sans-serif fonts.
_EM = {
    0.35: " 'IJijl,./:;\\f|·",
    0.45: "()-[]rt!",
    0.55: '"*_`?csz',
    0.6: "FLTkvxy",
    0.7: "BCKRVXZ",
    0.8: "ANU&DGHOQ",
    0.9: "#+<=>^w~→←×−≥≤M",
    1.0: "%@Wm—…",
}
_WIDTHS = {letter: width for width, letters in _EM.items() for letter in letters}
_OTHER, _WIDE, _BOLD = 0.65, 1.0, 1.14


def text_width(text: str, size: float, *, is_bold: bool = False) -> float:
    """Pixels that a line takes at most in a common sans-serif font of a size, estimated letter by letter."""
    widths = (_WIDTHS.get(letter, _OTHER if ord(letter) < 0x2000 else _WIDE) for letter in text)
    return size * sum(widths) * (_BOLD if is_bold else 1.0)


def wrapped(text: str, width: float, size: float = TEXT_PX, *, is_bold: bool = False) -> list[str]:
    """A text in lines that fit a width, broken between words; a word that is too long itself is cut, with "…"."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size, is_bold=is_bold) <= width:
            lines[-1] = joined
            continue
        lines.append(word)
        while text_width(lines[-1], size, is_bold=is_bold) > width and len(lines[-1]) > 2:
            lines[-1] = lines[-1].rstrip("…")[:-1] + "…"
    return lines


class Drawing:
    """A sheet of a width, drawn from the top down; `height` is as low as anything was drawn."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.height = 0.0
        self._parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, size: float = TEXT_PX, anchor: str = "start", *, is_bold: bool = False,
        fill: str = INK, turned: bool = False,
    ) -> None:  # fmt: skip
        """One line of text, its baseline at y; turned reads upwards, around its own anchor."""
        weight = ' font-weight="bold"' if is_bold else ""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{weight}{turn}>'
            f"{escape(text)}</text>"
        )
        self._reach(y + 4)

    def lines(
        self, x: float, y: float, width: float, text: str, size: float = TEXT_PX, *, is_bold: bool = False,
        fill: str = INK,
    ) -> float:  # fmt: skip
        """A text over as many lines as it takes, the first one's baseline at y. Returns the next line's baseline."""
        for line in wrapped(text, width, size, is_bold=is_bold):
            self.text(x, y, line, size, is_bold=is_bold, fill=fill)
            y += LINE_PX * max(1.0, size / TEXT_PX)
        return y

    def rectangle(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        """A rectangle; style: SVG attributes, "_" for "-"."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{_attributes(style)}/>')
        self._reach(y + height)

    def path(self, points: Sequence[tuple[float, float]], **style: object) -> None:
        """A line through points."""
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{joined}" fill="none"{_attributes(style)}/>')
        self._reach(max(y for _, y in points))

    def arrow(self, points: Sequence[tuple[float, float]], *, is_dashed: bool = False) -> None:
        """A line through points with a head at the last one."""
        dashes = {"stroke_dasharray": "6 4"} if is_dashed else {}
        self.path(points, stroke=INK, stroke_width=2, marker_end="url(#head)", **dashes)

    def box(self, x: float, y: float, width: float, title: str, *texts: str, fill: str = PALE) -> float:
        """A box around a title and texts, as high as they need. Returns the y of its lower edge."""
        self._parts.append('<g class="box">')
        at = len(self._parts)
        below = self.lines(x + PAD_PX, y + 25, width - 2 * PAD_PX, title, TITLE_PX, is_bold=True)
        for text in texts:
            below = self.lines(x + PAD_PX, below, width - 2 * PAD_PX, text)
        bottom = below - LINE_PX + PAD_PX + 2
        frame = {"rx": 7, "fill": fill, "stroke": INK, "stroke-width": 1.5}
        self._parts.insert(
            at, f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{bottom - y:g}"{_attributes(frame)}/>'
        )
        self._parts.append("</g>")
        self._reach(bottom)
        return bottom

    def frame(self, x: float, y: float, width: float, bottom: float, title: str) -> None:
        """A dashed frame around what lies below its title, which stands in its upper left corner."""
        style = {"rx": 10, "fill": "none", "stroke": QUIET, "stroke_width": 1.5, "stroke_dasharray": "4 4"}
        self.rectangle(x, y, width, bottom - y, **style)
        self.text(x + PAD_PX, y + 19, title, TEXT_PX, fill=QUIET)

    def svg(self, title: str, description: str) -> str:
        """The whole file. title, description: for those who hear it read aloud."""
        height = self.height + 16
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {height:g}" width="100%" '
            f'style="max-width:{1.4 * self.width:g}px;height:auto" font-family={quoteattr(FONT)} role="img" '
            'aria-labelledby="title description">\n'
            f'<title id="title">{escape(title)}</title>\n<desc id="description">{escape(description)}</desc>\n'
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker>'
            '<pattern id="hatched" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            f'<rect width="5" height="5" fill="{SHEET}"/><path d="M0 0V5" stroke="{INK}" stroke-width="2"/></pattern>'
            "</defs>\n"
            f'<rect width="{self.width:g}" height="{height:g}" rx="8" fill="{SHEET}"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )

    def _reach(self, y: float) -> None:
        self.height = max(self.height, y)


def _attributes(style: "dict[str, object]") -> str:
    return "".join(f" {name.replace('_', '-')}={quoteattr(str(value))}" for name, value in style.items())
