"""architecture.svg: the way of a sample through the system, and what holds it together."""

from ast_dist.diagram_numbers import GateNumbers
from ast_dist.diagram_svg import PALE, SHEET, TEXT_PX, Drawing

WIDTH = 460.0
LEFT, INNER = 56.0, 340.0
FRAME, LOOP_X, RESUME_X = 12.0, 428.0, 32.0
GAP = 22.0


def architecture_svg(numbers: GateNumbers | None) -> str:
    """The drawing as a file's text. numbers: of a run, whose sizes are written into the boxes; None leaves them out."""
    drawing = Drawing(WIDTH)
    y = drawing.lines(24, 38, WIDTH - 48, "ast_dist: the way of a sample", 22, is_bold=True)
    subtitle = f"with the sizes of run {numbers.run}" if numbers else "each arrow goes one way"
    y = drawing.lines(24, y, WIDTH - 48, subtitle) - 8
    edges: dict[str, tuple[float, float]] = {}
    for name, title, texts in _parts(numbers):
        if name == "order":
            y += 44  # for the frames' titles
        if name != "shards":
            x = LEFT + INNER - 16 if name == "order" else LEFT + INNER / 2  # past the frames' titles
            drawing.arrow([(x, edges[next(reversed(edges))][1]), (x, y)])
        fill = SHEET if name in ("shards", "index") else PALE
        bottom = drawing.box(LEFT, y, INNER, title, *(text for text in texts if text), fill=fill)
        edges[name] = (y, bottom)
        y = bottom + GAP
    _loop(drawing, edges)
    outer, inner = edges["order"][0] - 60, edges["order"][0] - 32
    drawing.frame(FRAME, outer, WIDTH - 2 * FRAME, y + 4, "supervise: starts the agent again when it dies")
    drawing.frame(FRAME + 8, inner, WIDTH - 2 * FRAME - 16, y - 6, "torchrun: restarts all ranks when one fails")
    return drawing.svg(
        "The architecture of ast_dist",
        "Shards, index, order, read, decode, distributed workers, gate, checkpoint, track: each feeds the next. The "
        "gate thins the next epoch's order, and a checkpoint is where a run goes on from.",
    )


def _parts(numbers: GateNumbers | None) -> list[tuple[str, str, tuple[str, ...]]]:
    """The boxes from the top down: name, title, texts."""
    run = {"samples": "", "batch": "", "gate": "", "checkpoint": ""}
    if numbers:
        run["samples"] = f"{numbers.num_samples:,} training samples" if numbers.num_samples else ""
        ranks = f"{numbers.ranks} {'rank' if numbers.ranks == 1 else 'ranks'}" if numbers.ranks else ""
        batch = f"global batch {numbers.global_batch_size:,}" if numbers.global_batch_size else ""
        run["batch"] = ", ".join(filter(None, (str(numbers.model or ""), ranks, batch)))
        run["gate"] = f"policy {numbers.policy}"
        if numbers.threshold is not None:
            run["gate"] += f", threshold {numbers.threshold:.3g} nats"
        run["checkpoint"] = f"newest: {numbers.checkpoint}" if numbers.checkpoint else ""
    return [
        ("shards", "Shards", ("WebDataset tars with their SHA-256, shuffled once", run["samples"])),
        ("index", "Index", ("one memory-mapped array a field: shard, offset, size, label, …",)),
        ("order", "Order", ("(seed, epoch) gives one permutation on all ranks, thinned to the gate's plan",)),
        ("read", "Read", ("by shard and offset: a skipped sample is not read",)),
        ("decode", "Decode", ("DALI or torch; crops drawn from (seed, epoch, sample)",)),
        ("workers", "DDP workers", (run["batch"] or "rank 0 … rank W − 1", "the true global mean of the loss")),
        ("gate", "Gate", ("histograms of all ranks summed, 480 integers: one threshold", run["gate"])),
        ("checkpoint", "Checkpoint", ("written beside the training, hashed, renamed last", run["checkpoint"])),
        ("track", "Track", ("metrics.jsonl first; then console, W&B, dashboard.png, report.html, status",)),
    ]


def _loop(drawing: Drawing, edges: dict[str, tuple[float, float]]) -> None:
    """The two ways back: the gate's plan to the order, and a checkpoint to the order where a run goes on."""
    middle = {name: (top + bottom) / 2 for name, (top, bottom) in edges.items()}
    right = LEFT + INNER
    gate, order = middle["gate"], middle["order"]
    drawing.arrow([(right, gate), (LOOP_X - 14, gate), (LOOP_X - 14, order), (right, order)])
    drawing.text(LOOP_X + 4, (gate + order) / 2, "the next epoch's plan", TEXT_PX, "middle", turned=True)
    saved = middle["checkpoint"]
    drawing.arrow([(LEFT, saved), (RESUME_X + 14, saved), (RESUME_X + 14, order), (LEFT, order)], is_dashed=True)
    drawing.text(RESUME_X + 6, (saved + order) / 2, "resume, in the middle of an epoch", TEXT_PX, "middle", turned=True)
