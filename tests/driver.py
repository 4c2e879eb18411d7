"""Whole runs of `pretrain` in processes of their own, which start at once: one process imports, then forks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# no meter and no measured peak: they take longer than a tiny run. Orders come on standard input
DRIVER = """
import contextlib, json, os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoTokenizer, LlamaForCausalLM
from ttl_utils import carbon, devices
from ttl_utils.params import load_params
from ttl_utils.pretraining import pretrain
from ttl_utils.run import Run

carbon.track = lambda *_, **__: contextlib.nullcontext(carbon.EnergySession())
devices.peak = lambda hardware: devices.Peak(None, "unknown device")

def work(order):
    exec(order["before"], {})
    try:
        pretrain(Run(load_params(order["parameters"])))
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        raise

for line in sys.stdin:
    order = json.loads(line)
    if "ended" in order:
        found = os.waitid(os.P_PID, order["ended"], os.WEXITED | os.WNOWAIT | os.WNOHANG)
        killed = found and found.si_code != os.CLD_EXITED
        print(json.dumps(found and (-found.si_status if killed else found.si_status)), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        if order["processes"] == 1:
            work(order)
        else:
            # what torchrun does with its command line
            config = LaunchConfig(
                1, 1, order["processes"], run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
                start_method="fork", max_restarts=0, monitor_interval=0.1,
            )
            elastic_launch(config, work)(order)
        os._exit(0)
    except BaseException:
        os._exit(3)
"""


class Driver:
    """`start` gives a process's id, `until` its exit status once it has ended, `said` what all of them printed."""

    def __init__(self, outputs: Path, cache: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TTL_OUTPUTS": str(outputs), "TTL_CACHE": str(cache)}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        self.outputs, self.started = outputs, []
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _send(self, **order: object) -> int | None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, parameters: dict, processes: int = 1, before: str = "", **environment: str) -> int:
        order = {"parameters": parameters, "processes": processes, "before": before, "environment": environment}
        # one each: two that write at once into one file may lose a line
        self.started.append(self._send(log=str(self.outputs / f"log-{len(self.started):02}"), **order))
        return self.started[-1]

    def until(self, pid: int, condition: Callable[[], object] = lambda: False, seconds: float = 60) -> int | None:
        """Wait until it holds, or the process has ended; its exit status then."""
        end = time.monotonic() + seconds
        while not condition():
            if (status := self._send(ended=pid)) is not None:
                return status
            assert time.monotonic() < end, f"not in {seconds} s: {self.said()}"
            time.sleep(0.001)
        return None

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.outputs.glob("log-*")))

    def close(self) -> None:
        for pid in self.started:
            if self._send(ended=pid) is None:
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()
