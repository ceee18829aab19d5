"""The report's part on single samples: most and least significant, and suspected wrong labels."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ast_dist.report_page import bullets, paragraph, table
from ast_dist.report_run import Run, as_number
from ast_dist.report_samples import (
    SIDE_PX,
    Gallery,
    Memory,
    Sample,
    find_index,
    hard_tail,
    least_significant,
    most_significant,
    with_pictures,
)

_NO_GUARD = (
    "This run's gate watched for none: gate.hard_tail_share is 0. What is most significant above may be mislabelled as "
    "well as hard; a run with gate.hard_tail_share above 0 tells which samples stay there with flat loss."
)


def samples(run: Run, memory: Memory | None, said: Sequence[str], data_train: Sequence[Path], level: int) -> str:
    """The samples of a run, as pictures where its shards are found.

    memory: None where there is none, and then `said` holds why. level: of the headings.
    """
    if memory is None:
        return bullets(said, "alarm")
    galleries = {
        "Most significant": most_significant(memory),
        "Least significant": least_significant(memory),
        "Suspected wrong labels (hard tail)": hard_tail(memory),
    }
    index, why_none = find_index(run, data_train, memory.significance.size)
    if index is not None:
        galleries = {title: found and with_pictures(found, index, run.classes) for title, found in galleries.items()}
    known = galleries["Most significant"]
    seen = known.count if known else 0
    intro = (
        f"Significance as checkpoint {memory.checkpoint} remembers it: {seen:,} of {memory.significance.size:,} "
        "samples were trained at least once. It is each sample's value, in nats, from when it was last trained."
    )
    parts = [bullets(said, "alarm"), paragraph(intro), paragraph(why_none) if why_none else ""]
    for title, gallery in galleries.items():
        parts.append(f"<h{level}>{escape(title)}</h{level}>\n")
        if title.startswith("Suspected"):
            parts.append(paragraph(_about_suspects(run, gallery)))
        if gallery and gallery.samples:
            parts.append(_tiles(gallery.samples) if index is not None else _listed(title, gallery.samples))
    return "".join(parts)


def _about_suspects(run: Run, gallery: Gallery | None) -> str:
    share, visits = (as_number(run.setting(f"gate.hard_tail_{name}")) for name in ("share", "visits"))
    if gallery is None or not share:
        return _NO_GUARD
    rule = (
        f"{gallery.count:,} samples were in the top {100 * share:g} % at {visits:g} visits in a row or more, with flat "
        "loss, when the gate last planned an epoch. "
    )
    return rule + ("Look at their labels." if gallery.count else "So there is no suspect.")


def _tiles(found: Sequence[Sample]) -> str:
    return f'<div class="thumbs">\n{"".join(map(_tile, found))}</div>\n'


def _tile(sample: Sample) -> str:
    if sample.image:
        small = ' class="small"' if sample.side < SIDE_PX else ""
        words = f"sample {sample.key}, labelled {sample.class_name}"
        picture = f'<img src="{sample.source}" alt="{escape(words)}" width="{SIDE_PX}" height="{SIDE_PX}"{small}>'
    else:
        picture = f'<div class="lost">{escape(sample.problem)}</div>'
    # A name may hold letters that turn the direction of what follows: bdi keeps that inside.
    return (
        f"<figure>{picture}<figcaption><b><bdi>{escape(sample.class_name)}</bdi></b>"
        f"<bdi>{escape(sample.key)}</bdi>"
        + "".join(f"<span>{escape(line)}</span>" for line in _measures(sample))
        + "</figcaption></figure>\n"
    )


def _measures(sample: Sample) -> list[str]:
    lines = [f"{sample.significance:.3g} nats", f"{sample.visits:,} visit{'' if sample.visits == 1 else 's'}"]
    return [*lines, f"{sample.streak:,} at the top"] if sample.streak else lines


def _listed(title: str, found: Sequence[Sample]) -> str:
    """The samples as numbers, where there are no pictures."""
    rows = [
        (f"{sample.sample_id}", f"{sample.significance:.3g}", f"{sample.visits:,}", f"{sample.last_epoch + 1:,}")
        for sample in found
    ]
    return table(title, ("sample id", "significance, nats", "visits", "last trained in epoch"), rows, range(1, 4))
