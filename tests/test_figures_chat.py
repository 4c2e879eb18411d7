"""The curve of stage 05: where epochs end, the lowest loss, and the authors' way."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ttl_utils import figures
from ttl_utils.figures_chat import chat_curve

LOSSES = (5.0, 4.0, 4.4)


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(
        figures=tmp_path, params=SimpleNamespace(chat=SimpleNamespace(warmup_steps=2, faithful=False))
    )


def records() -> list[dict]:
    rows = []
    for step in range(0, 11):
        row = {"step": step, "tokens": 100 * step}
        rows += [row | {"epoch": step // 5, "validation_loss": LOSSES[step // 5]}] if step % 5 == 0 else []
        rows += [row | {"loss": 5 - 0.2 * step, "learning_rate": 1e-3}] if step else []
    return rows


def test_epochs_and_the_lowest_loss_are_marked(run) -> None:
    figure = chat_curve(run, records())
    axes = figure.axes[0]
    (ring,) = [line for line in axes.lines if line.get_label() == "lowest"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (500, 4.0)
    (top,) = axes.child_axes
    assert [text.get_text() for text in top.get_xticklabels()] == ["epoch 0", "epoch 1", "epoch 2"]
    assert pd.read_csv(run.figures / "05_chat_loss.csv").validation_loss.dropna().tolist() == list(LOSSES)
    plt.close("all")


def test_what_is_saved_draws_the_same_in_portuguese(run) -> None:
    chat_curve(run, records())
    data = figures.read_table((run.figures / "05_chat_loss.csv").read_text())
    with figures.style_of("pt"):
        figure, _ = figures.drawn("05_chat_loss", data)
        assert figure.axes[0].get_title(loc="left").startswith("Ajuste fino")
    plt.close("all")


def test_the_authors_way_is_named(run) -> None:
    run.params.chat.faithful = True
    assert "padded" in " ".join(chat_curve(run, records()).axes[0].get_title(loc="left").split())
    plt.close("all")


@pytest.mark.parametrize("rows", [records()[:1], records()[1:2], [{"step": 0, "tokens": 0, "stalled_s": 99.0}]])
def test_short_and_odd_records_are_drawn(run, rows) -> None:
    chat_curve(run, rows)
    plt.close("all")
