"""A sample on its way from the reader to a decoder."""

from dataclasses import dataclass

from ast_dist.data.read import DamagedSampleError


@dataclass(frozen=True)
class Encoded:
    """An encoded image, and what is known of it before it is decoded.

    data: the file's bytes. height, width: pixels, from which its crop was drawn. key: for messages.
    """

    data: bytes
    sample_id: int
    key: str
    height: int
    width: int

    def wrong_size(self, height: int, width: int) -> DamagedSampleError:
        """The error of a sample whose pixels are not as many as were stated."""
        return DamagedSampleError(
            self.sample_id,
            f"sample {self.key} (id {self.sample_id}) has {height}×{width} pixels (height × width), but the "
            f"index states {self.height}×{self.width}, from which its crop was drawn",
        )
