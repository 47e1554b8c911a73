"""Who watches a run: a progress line, a log with times, DVCLive, TensorBoard, W&B, and pictures of what the model sees.

None of it touches weights, random states or the curve. In a run of several processes the first one writes.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.machine import WandbMode
from pipeline.training.distributed import leads
from pipeline.training.pictures import save_regions

Row = dict[str, float]
PICTURES = 8  # images whose regions are painted


class Watch:
    """Everything that is told of a run's rows and checkpoints."""

    def __init__(
        self,
        name: str,
        key: str,
        rows: Sequence[Row],
        *,
        log: Path,
        live: Path | None,
        board: Path | None,
        wandb: WandbMode,
        pictures: Path | None,
    ) -> None:
        """`rows`: the curve so far; the others as in `Run`."""
        self._name, self._pictures, self._quiet = name, pictures, not leads()
        self._pixels: Tensor | None = None
        self._log: TextIO | None = None
        self._plots: list[LivePlot | Board | Wandb] = []
        if self._quiet:
            return
        if board is not None:
            self._plots.append(Board(board, rows))
        if wandb != "no":
            self._plots.append(Wandb(f"{name}-{key}", log.parent, wandb, self.say))
        if live is not None:
            known = _rates(log)
            self._plots.append(LivePlot(live, [row | known.get(int(row["step"]), {}) for row in rows]))
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        if not self._quiet:
            print(f"{self._name}: {line}", file=sys.stderr, flush=True)

    def write(self, event: str, **values: Any) -> None:
        """A line of the log."""
        if self._log is not None:
            line = {"time": round(time.time(), 3), "event": event, **values}
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()

    def row(self, row: Row, rates: Row, model: nn.Module) -> None:
        """A row of the curve, its rates, and the model's counts (`watch`, see `pipeline.methods`)."""
        if self._quiet:
            return
        counts = {name: value.tolist() for name, value in getattr(model, "watch", dict)().items()}
        self.write("row", **row, **rates, **({"counts": counts} if counts else {}))
        for plot in self._plots:
            plot.log(row | rates, counts)

    def picture(self, model: nn.Module, batch: Any, images: int, device: torch.device) -> None:
        """Paint the regions of the first images that this process was shown, for a model that knows regions."""
        folder = self._pictures
        if self._quiet or folder is None or not hasattr(model, "regions"):
            return
        pixels: Tensor = batch.to(device).pixels if self._pixels is None else self._pixels
        self._pixels = pixels[:PICTURES].detach().clone()
        save_regions(folder / f"{images:012d}.png", model, self._pixels)

    def close(self) -> None:
        """Close the files."""
        for plot in self._plots:
            plot.close()
        if self._log is not None:
            self._log.close()


class LivePlot:
    """DVCLive's files for `dvc plots` and editors; rebuilt from the curve when a run resumes."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        from dvclive.live import Live

        self._live: Any = Live(dir=str(folder), save_dvc_exp=False, dvcyaml=None)
        for row in rows:
            self.log(row, {})

    def log(self, row: Row, counts: Mapping[str, list[float]]) -> None:
        """A point of every curve; counts as the bars of the newest row."""
        self._live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._live.log_metric(name, value)
        for name, values in counts.items():
            bars = [{"number": str(number), name: value} for number, value in enumerate(values)]
            self._live.log_plot(name, bars, x=name, y="number", template="bar_horizontal")

    def close(self) -> None:
        """Finish the files."""
        self._live.end()


class Board:
    """TensorBoard's event files, a point per image seen."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        """What another run wrote after the last of `rows`, the curve so far, TensorBoard shows no more."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput("machine.yaml", "tensorboard: it is not installed", "`pip install tensorboard`") from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=int(rows[-1]["images"]) + 1 if rows else 0)

    def log(self, row: Row, counts: Mapping[str, list[float]]) -> None:
        """A point of every curve; counts each under its number."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, int(row["images"]))
        for name, values in counts.items():
            for number, value in enumerate(values):
                self._writer.add_scalar(f"{name}/{number}", value, int(row["images"]))

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, a point per image seen; one that goes on has the name of the one before."""

    def __init__(self, name: str, folder: Path, mode: Literal["offline", "online"], say: Callable[[str], None]) -> None:
        """Its files lie in FOLDER/wandb. Without a key or a network it is an offline one, and `say` is told why."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # an offline run, too, would ask the network
        try:
            import wandb
        except ImportError as error:
            raise BadInput("machine.yaml", "wandb: it is not installed", "`pip install wandb`") from error
        folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(console="off", silent=True)
        begin = partial(wandb.init, project="tessera", id=name, name=name, dir=folder, resume="allow", settings=quiet)
        try:
            self._run: Any = begin(mode=mode)
        except wandb.Error as error:
            say(f"Weights & Biases goes on offline, `wandb sync` uploads it later: {error}")
            self._run = begin(mode="offline")
        self._run.define_metric("*", step_metric="images")

    def log(self, row: Row, counts: Mapping[str, list[float]]) -> None:
        """A point of every curve; counts each under its number."""
        bars = {f"{name}/{number}": value for name, values in counts.items() for number, value in enumerate(values)}
        self._run.log({**row, **bars})

    def close(self) -> None:
        """Finish the files."""
        self._run.finish()


def _rates(log: Path) -> dict[int, Row]:
    """What the log knows of every step beside the curve; of a step that was done twice, the last."""
    found: dict[int, Row] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if entry.get("event") == "row":
            found[entry["step"]] = {name: entry[name] for name in RATES if name in entry}
    return found


def gpu_memory(device: torch.device) -> Row:
    """Largest bytes of a GPU's memory in use so far; nothing on a CPU."""
    return {"memory": float(torch.cuda.max_memory_allocated(device))} if device.type == "cuda" else {}


RATES = ("images_per_second", "data_wait", "mfu", "memory")
