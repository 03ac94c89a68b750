"""The table that `KDHandle.summary` returns."""

from collections.abc import Sequence

from torch import nn

from kdlayers._layer.layer import worthwhile
from kdlayers._step.sites import slots
from kdlayers._step.slot import Slot
from kdlayers._step.terms import Term
from kdlayers._utils import chunks
from kdlayers._utils.table import table


def summarise(student: nn.Module, terms: Sequence[Term]) -> str:
    """Table of the KD layers with their inference cost, and of the losses with their points."""
    layers = slots(student)
    lines = [f"KD layers in {type(student).__name__} (kept at inference)"]
    if layers:
        added = sum(p.numel() for slot in layers.values() for p in slot.parameters())
        own = sum(p.numel() for p in student.parameters()) - added
        lines[0] += f": {added:,} parameters on top of its own {own:,}"
    head = ("point", "channels", "templates", "alpha", "parameters", "positions", "MACs")
    rows: list[tuple[str, ...]] = [(*head, "training")]
    for name, slot in layers.items():
        positions = next((t.positions for t in terms if t.scores and t.point == name), None)
        size = slot.head.in_channels * slot.head.num_templates
        macs = "-" if positions is None else f"{2 * size * positions:,}"
        count = f"{sum(p.numel() for p in slot.parameters()):,}"
        cells = (slot.head.in_channels, slot.head.num_templates, slot.alpha)
        seen = "-" if positions is None else str(positions)
        rows.append((name, *map(str, cells), count, seen, macs, _path(slot)))
    lines.append(table(rows) if layers else "none")
    if any(term.scores for term in terms):
        lines.append("positions and MACs: for one image of the size of attach_kd's example")
    if layers:
        lines.append(
            "training: plain torch operations, or fused operators, which are faster with many "
            "scores; the results are the same"
        )
    if terms:
        lines += ["", "Losses (training only)", table(_loss_rows(terms))]
    return "\n".join(lines)


def _path(slot: Slot) -> str:
    """Which implementation the layer uses in training."""
    plain = slot.why_plain(slot.norm.weight.device)
    if plain is not None:
        return f"plain ({plain})"
    how = "scores stored" if slot.keeps_scores() else "scores recomputed"
    if slot.memory == "low":
        return f"fused, {how}"
    templates = slot.head.num_templates
    if not worthwhile(2**62, slot.head.in_channels, templates):
        return f"plain (under {chunks.LEAST_RATIO} templates per channel)"
    return f"fused from {-(-chunks.LEAST_SCORES // templates)} positions per batch, {how}"


def _loss_rows(terms: Sequence[Term]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("term", "student", "teacher", "weight", "parameters", "state")]
    for term in terms:
        weight = term.loss.weight
        count = sum(p.numel() for p in term.loss.parameters() if p.requires_grad)
        rows.append(
            (
                term.name,
                term.point or "logits",
                term.tap or "logits",
                "scheduled" if callable(weight) else f"{weight:g}",
                f"{count:,}",
                "ready" if term.loss.fitted else "not fitted",
            )
        )
    return rows
