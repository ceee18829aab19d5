"""The loaders that `benchmarks.loader` measures, one module each, and the process that measures one of them.

A module has `open_source(job)`, which gives a `Source`, and where the loader wants a format of its own,
`convert(images, folder)`. Importing the module imports the loader's package, so that no import falls into a timed
part.
"""
