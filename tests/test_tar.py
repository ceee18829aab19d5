"""data_prep.tar: the writer writes what webdataset's own writes."""

import io
import warnings

from hypothesis import given
from hypothesis import strategies as st
from webdataset.writer import TarWriter as WebDatasetWriter

from data_prep.tar import TarWriter, tar_bytes

KEYS = st.text("abcXYZ019-_", min_size=1, max_size=80)


@given(st.lists(st.tuples(KEYS, st.binary(max_size=40), st.integers(0, 30_000)), max_size=12))
def test_the_bytes_are_those_of_webdatasets_writer(samples):
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = TarWriter(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        reference = WebDatasetWriter(theirs, user="", group="", mode=0o444, mtime=0, encoder=False, compress=False)
        for key, start, size in samples:
            cls, image = str(size).encode(), start.ljust(size, b"\xa5")
            before = tar.offset
            offsets = tar.write([(f"{key}.cls", cls), (f"{key}.jpg", image)])
            reference.write({"__key__": key, "jpg": image, "cls": cls})
            assert tar.offset - before == tar_bytes(len(image))
            assert [ours.getvalue()[at : at + len(data)] for at, data in zip(offsets, (cls, image), strict=True)] == [
                cls,
                image,
            ]
        reference.close()
    tar.close()
    assert ours.getvalue() == theirs.getvalue()
