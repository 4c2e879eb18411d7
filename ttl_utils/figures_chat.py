"""The curve of stage 05: the loss on the answers, and where each epoch ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ttl_utils.figures import OURS, draw, draws, label
from ttl_utils.figures_pretraining import loss_curve, with_findings
from ttl_utils.health import findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ttl_utils.run import Run


def chat_curve(run: Run, records: list[dict], vocab_size: int | None = None) -> Figure:
    """Training and validation loss over tokens seen; a ring is around the lowest validation loss."""
    found = with_findings(records, findings(records, vocab_size, run.params.chat.warmup_steps))
    return draw(run, "05_chat_loss", found.assign(faithful=run.params.chat.faithful))


@draws("05_chat_loss")
def _chat_loss(data: pd.DataFrame) -> Figure:
    padded = "Chat fine-tuning, padded: training loss on all slots, validation loss on the answers"
    figure = loss_curve(data, label(padded if data.faithful.iloc[0] else "Chat fine-tuning: loss on the answers"))
    axes = figure.axes[0]
    ends = data[data.validation_loss.notna()]
    if len(ends) > 1:
        best = ends.loc[ends.validation_loss.idxmin()]
        axes.plot(best.tokens, best.validation_loss, "o", ms=11, mfc="none", color=OURS, label=label("lowest"))
        axes.legend()
        top = axes.secondary_xaxis("top")
        top.set_xticks(ends.tokens, [label("epoch {}", f"{epoch:.0f}") for epoch in ends.epoch])
    return figure
