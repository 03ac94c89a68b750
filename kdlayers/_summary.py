"""The table that `KDHandle.summary` returns."""

from collections.abc import Sequence

from torch import nn

from kdlayers._points import table
from kdlayers._sites import slots
from kdlayers._terms import Term


def summarise(student: nn.Module, terms: Sequence[Term]) -> str:
    """KD layers with their cost at inference, and the losses with what they read."""
    layers = slots(student)
    lines = [f"KD layers in {type(student).__name__} (kept at inference)"]
    rows: list[tuple[str, ...]] = [
        ("point", "channels", "templates", "alpha", "parameters", "MACs")
    ]
    for name, slot in layers.items():
        positions = next((t.positions for t in terms if t.scores and t.point == name), None)
        size = slot.head.in_channels * slot.head.num_templates
        macs = "-" if positions is None else f"{2 * size * positions:,}"
        count = f"{sum(p.numel() for p in slot.parameters()):,}"
        cells = (slot.head.in_channels, slot.head.num_templates, slot.alpha)
        rows.append((name, *map(str, cells), count, macs))
    lines.append(table(rows) if layers else "none")
    if terms:
        lines += ["", "Losses (training only)", table(_loss_rows(terms))]
    return "\n".join(lines)


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
