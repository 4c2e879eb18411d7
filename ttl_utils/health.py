"""The failure signatures of a training run, found in its records."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

# losses in nats; deviations are those of single records, so that one rule holds for any logging_steps, and a record is
# compared with those of its own interval alone. Records in one comparison: enough for a deviation, few enough to
# follow a curve that falls
WINDOW, FEW = 50, 5
# above the median of its window, of which so many records must stand: a bad batch, or a rate near its limit
SPIKE_NATS, SPIKE_DEVIATIONS, SPIKE_RECORDS = 0.5, 8.0, 20
# one step far off hardly moves the mean of a long interval, but its spread: nats, times the usual, least steps
SPIKE_SPREAD_NATS, SPIKE_SPREAD, SPIKE_STEPS = 0.3, 4.0, 10
# a curve that comes from the loss of guessing has mean + spread less than this above it, even if it falls at once
SPIKE_UNIFORM_NATS = 1.0
# the spread of the newest WINDOW records against up to twice as many before them: nats, times
SPREAD_NATS, SPREAD_GROWTH = 0.1, 3.0
# the median of FEW records (a jump) or of WINDOW records (a slow rise) above the lowest such median: nats, deviations;
# the 460m's curve in figure 1(a) rises by 0.06 and falls again. No noise is 20 times the perplexity
RISES, RISE_CEILING = {FEW: (0.5, 10.0), WINDOW: (0.2, 2.5)}, 3.0
# so many steps after the warm-up a model that learns is below the loss of guessing, ln(vocab_size), and after so many
# it tells texts apart, from when on the loss differs from batch to batch
GUESSING_STEPS, SETTLED_STEPS = 20, 100
# the mean loss while the tokens doubled against the one before. A rate far too high may end in a model that knows
# the words' frequencies alone: 0.7 to 0.9 of the loss of guessing, where one that learns falls by 0.7 and more
STANDSTILL_NATS, STANDSTILL_SHARE = 0.2, 0.6
# perplexity 1% lower is progress: the published runs gain 1.6% even in their last evaluation. None while the tokens
# grew by half, in three evaluations: worth a note, since more of the same will hardly help
PLATEAU_NATS, PLATEAU_GROWTH, PLATEAU_EVALUATIONS = 0.01, 1.5, 3
# perplexity 5% above its best twice in a row, or 10% once; at the peak rate it wanders by half of that
WORSE_NATS = 0.05
# half the usual speed, or a fifth of the time spent waiting, for so many records and seconds in a row: what is
# compiled in the first step, or another program's burst, is no finding
LOW_SPEED, DATA_SHARE, LASTING_RECORDS, LASTING_S = 0.5, 0.2, 3, 10.0
# the median distance between neighbours is 0.954 deviations of a normal noise, and hardly sees a trend
FROM_DISTANCE = 1 / 0.954


@dataclass(frozen=True)
class Finding:
    kind: str
    step: int
    tokens: int
    evidence: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.kind.replace('_', ' ')}: {self.evidence}"


class Health:
    """Sees the records of a run in order and says, once an episode, what is wrong.

    A key that is missing or null is not judged: older runs have fewer. What is kept does not grow with the run.
    """

    def __init__(self, vocab_size: int | None = None, warmup_steps: int = 0):
        self.uniform = math.log(vocab_size) if vocab_size else math.inf
        self.warmup_steps = warmup_steps
        self.open: set[str] = set()  # kinds whose episode lasts
        self.held: dict[str, tuple[bool, int, float]] = {}  # kind: whether it is so, for how many records and seconds
        self.step = self.tokens = self.steps = 0  # of the newest record with a loss, and of its interval
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spreads: deque[float] = deque(maxlen=3 * WINDOW)
        self.speeds: deque[float] = deque(maxlen=WINDOW)
        self.lowest: dict[int, tuple[float, int]] = {}  # records: their lowest median, and where
        self.least = (math.inf, 0)  # loss of a record of many steps, and where
        self.doubling = (0, 0, 0.0, 0)  # first step, its tokens, sum of losses, records
        self.mean_before: float | None = None
        self.best = (math.inf, 0, math.inf)  # validation loss, step, training loss
        self.progress = (math.inf, 0, 0, 0)  # validation loss, step, tokens, evaluations since
        self.evaluated = -math.inf

    def see(self, record: dict) -> list[Finding]:
        """The new findings of a record."""
        record = {key: value for key, value in record.items() if value is not None}
        self.at, self.found = (record["step"], record["tokens"]), []
        logged, bad = "loss" in record, record.get("not_finite", "")
        for name in ("loss", "validation_loss"):
            if not math.isfinite(record.get(name, 0)):
                bad = f"{name} {record[name]}"
        self._judge("not_finite", bool(bad), bad, over=logged)
        if bad:
            return self.found
        waited = record.get("stalled_s", 0)
        self._judge("stalled", waited > 0, f"no data for {waited:,.0f} s", over=True)
        if logged:
            self._see_speed(record)
            self._see_variance(record["loss"], record.get("loss_std"))
            self._see_level()
            self._see_doubling(record["loss"])
            self.step, self.tokens = self.at
        if "validation_loss" in record:
            self._see_evaluation(record["validation_loss"])
        return self.found

    def _judge(self, kind: str, bad: bool, evidence: str, over: bool) -> None:
        """An episode begins with a finding and lasts until it is over."""
        if bad and kind not in self.open:
            self.open.add(kind)
            self.found.append(Finding(kind, *self.at, evidence))
        elif over and not bad:
            self.open.discard(kind)

    def _judge_lasting(self, kind: str, bad: bool, seconds: float, evidence: str) -> None:
        was, records, lasted = self.held.get(kind, (bad, 0, 0.0))
        records, lasted = (records + 1, lasted + seconds) if was == bad else (1, seconds)
        self.held[kind] = bad, records, lasted
        lasts = records >= LASTING_RECORDS and lasted >= LASTING_S
        self._judge(kind, bad and lasts, evidence, over=lasts)

    def _see_speed(self, record: dict) -> None:
        speed = record.get("tokens_per_second", 0)
        if speed <= 0:
            return
        seconds = (record["tokens"] - self.tokens) / speed
        if len(self.speeds) >= LASTING_RECORDS:
            usual = median(self.speeds)
            share = f" ({record['share_of_peak']:.1%} of peak)" if "share_of_peak" in record else ""
            evidence = f"{speed:,.0f} tokens/s{share}, usually {usual:,.0f}"
            self._judge_lasting("low_utilisation", speed < LOW_SPEED * usual, seconds, evidence)
        self.speeds.append(speed)
        waiting = record.get("data_share", 0)
        self._judge_lasting("slow_data", waiting > DATA_SHARE, seconds, f"{waiting:.0%} of the time waits for data")

    def _see_variance(self, loss: float, spread: float | None) -> None:
        """Spikes and growing spread."""
        step, _ = self.at
        before, self.steps = self.steps, step - self.step
        if before and self.steps != before:
            # the mean of another number of steps has another noise
            for seen in (self.losses, self.spreads, self.lowest):
                seen.clear()
        if self.steps < SPIKE_STEPS:
            # so few have no spread worth the name
            spread = None
        evidence, over = "", True
        if loss + (spread or 0) > self.uniform + SPIKE_UNIFORM_NATS:
            evidence = f"loss {loss:.2f}, spread {spread or 0:.2f}: far above the {self.uniform:.2f} of guessing"
        if spread is not None and len(self.spreads) >= SPIKE_RECORDS:
            usual = median(self.spreads)
            margin = max(SPIKE_SPREAD_NATS, SPIKE_SPREAD * usual)
            over = spread < margin / 2
            if spread > margin:
                evidence = f"the loss of {self.steps} steps spreads by {spread:.2f}, usually {usual:.2f}"
        if len(self.losses) >= SPIKE_RECORDS:
            usual = median(self.losses)
            margin = max(SPIKE_NATS, SPIKE_DEVIATIONS * self._deviation())
            over = over and loss < usual + margin / 2
            if loss > usual + margin:
                evidence = f"loss {loss:.2f}, usually {usual:.2f}"
        diverged = "divergence" in self.open
        self._judge("loss_spike", bool(evidence) and not diverged, evidence, over)
        if step >= self.warmup_steps + SETTLED_STEPS and self.losses:
            self.spreads.append(abs(loss - self.losses[-1]) if spread is None else spread)
        self.losses.append(loss)
        if len(self.spreads) >= 2 * WINDOW:
            spreads = list(self.spreads)
            now, usual = median(spreads[-WINDOW:]), median(spreads[:-WINDOW])
            margin = max(SPREAD_NATS, SPREAD_GROWTH * usual)
            evidence = f"the loss spreads by {now:.2f}, {usual:.2f} before"
            self._judge("loss_spread", now > margin and not diverged, evidence, over=now < margin / 2)

    def _deviation(self) -> float:
        """Of single records from their trend."""
        distances = [abs(one - other) for one, other in pairwise(self.losses)]
        return FROM_DISTANCE * median(distances) if distances else 0.0

    def _level(self, records: int) -> float:
        return median(list(self.losses)[-records:])

    def _see_level(self) -> None:
        """Divergence: above the lowest loss so far, or above that of guessing."""
        step, _ = self.at
        evidence, over, deviation = "", True, self._deviation()
        newest = self.losses[-1]
        if self.steps >= SPIKE_STEPS and step < self.warmup_steps + SETTLED_STEPS:
            # back above guessing in the warm-up: the rate has grown too high for what was learned at its beginning
            least, where = self.least = min((newest, step), self.least)
            if newest > max(self.uniform, least + RISES[FEW][0]):
                evidence = (
                    f"loss {newest:.2f}, above the {self.uniform:.2f} of guessing, was {least:.2f} at step {where:,}"
                )
        if len(self.losses) < FEW:
            self._judge("divergence", bool(evidence), evidence, over=newest < self.uniform)
            return
        for records, (nats, deviations) in RISES.items():
            if len(self.losses) >= records:
                level = self._level(records)
                lowest, where = self.lowest[records] = min((level, step), self.lowest.get(records, (level, step)))
                margin = min(max(nats, deviations * deviation), RISE_CEILING)
                over = over and level < lowest + margin / 2
                if level > lowest + margin:
                    evidence = evidence or f"loss {level:.2f}, was {lowest:.2f} at step {where:,}"
        level = self._level(FEW)
        if not evidence and step >= self.warmup_steps + GUESSING_STEPS and level > self.uniform:
            evidence = f"loss {level:.2f}, above the {self.uniform:.2f} of guessing"
        over = over and level < self.uniform - RISES[FEW][0] / 2
        self._judge("divergence", bool(evidence), evidence, over)

    def _see_doubling(self, loss: float) -> None:
        """A loss that stands still near that of guessing. Means over doubled tokens: less noise as progress slows."""
        step, tokens = self.at
        first, began, total, records = self.doubling
        total, records = total + loss, records + 1
        self.doubling = first, began, total, records
        if step <= self.warmup_steps:
            self.doubling = step, tokens, 0.0, 0
        elif tokens >= 2 * began and step >= first + SETTLED_STEPS and records >= FEW:
            mean, before = total / records, self.mean_before
            self.doubling, self.mean_before = (step, tokens, 0.0, 0), mean
            if before is not None and math.isfinite(self.uniform):
                still = mean > max(before - STANDSTILL_NATS, STANDSTILL_SHARE * self.uniform)
                evidence = f"mean loss {mean:.2f} since step {first:,}, {before:.2f} before: it does not learn"
                self._judge("loss_plateau", still and "divergence" not in self.open, evidence, over=True)

    def _see_evaluation(self, loss: float) -> None:
        step, tokens = self.at
        training = self._level(FEW) if self.losses else math.inf
        if not self.losses:
            # the first records may be high already: this is where they come from
            self.lowest.setdefault(FEW, (loss, step))
        best, where, training_then = self.best
        evidence = f"perplexity {_perplexity(loss)}, was {_perplexity(best)} at step {where:,}"
        if math.isfinite(training_then):
            evidence += f"; training loss {training:.2f}, was {training_then:.2f}"
            fell = training < min(training_then - WORSE_NATS, STANDSTILL_SHARE * self.uniform)
            evidence += ": overfitting" if fell else ""
        bad = min(loss, self.evaluated) > best + WORSE_NATS or loss > best + 2 * WORSE_NATS
        self._judge("perplexity_rise", bad, evidence, over=loss < best + WORSE_NATS)
        self.best, self.evaluated = min(self.best, (loss, step, training)), loss
        if step < self.warmup_steps or tokens == 0:
            return
        reached, where, began, since = self.progress
        if loss < reached - PLATEAU_NATS:
            self.progress = loss, step, tokens, 0
            self.open.discard("perplexity_plateau")
            return
        self.progress = reached, where, began, since + 1
        bad = since + 1 >= PLATEAU_EVALUATIONS and tokens >= PLATEAU_GROWTH * began
        evidence = f"perplexity {_perplexity(loss)}, was {_perplexity(reached)} at step {where:,}"
        self._judge("perplexity_plateau", bad and "perplexity_rise" not in self.open, evidence, over=False)


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 99))
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def findings(records: list[dict], vocab_size: int | None = None, warmup_steps: int = 0) -> list[Finding]:
    """All findings of a run: a pure function of its records, so that a resumed run finds the same."""
    health = Health(vocab_size, warmup_steps)
    return [finding for record in records for finding in health.see(record)]
