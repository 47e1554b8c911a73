"""The chain on a few images: every stage's own code in small checkouts, timed.

A checkout of 4 images pays for what a process does once; another of 4, one of 64 and one as large as a shard show what
an image costs beyond that. A stage that would exceed its time on the next larger one is not asked to. Nothing is asked
of another machine: for a list of links, pictures are made (`standins`), and their links lie in a folder.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import chain
from pipeline.artifacts.files import BadInput, list_files
from pipeline.datasets.preparing import SampleFailed
from pipeline.encoders.released import TRAIN
from pipeline.engine import Counts, ShardStage, StageFailed, Task, out_of_memory, run
from pipeline.evaluation.pairs import SCENES
from pipeline.machine import Machine
from pipeline.params import ParamsError
from pipeline.planning import amounts, scoring, standins, vocabulary
from pipeline.planning.launching import LAUNCH, SINGLE, launch_sample
from pipeline.planning.samples import Measured, Sample, Watch, by_kind, counting
from pipeline.project import Project
from pipeline.selftraining.runner import Job, obtain
from pipeline.training.steps import NonFiniteLoss

SMALL, MIDDLE, LARGE = 4, 64, 1000  # images of a checkout
VAL_IMAGES = 8  # of a checkout's generated val set and tune set; more in the largest
HEAVY = ("features", "teacher")  # stages with a network, whose operations are counted
SLACK = 4.0  # by which a training's first, small, counted batches may overrate an image
IMAGES = (".jpg", ".png")  # of generated val and tune sets; those of training are in tars
START = 2  # images of a batch that only pays for the start
STEPS = 6  # of a rehearsed training; the second half is measured


@dataclass(slots=True)
class Rehearsal:
    """Small checkouts below `root` and what was measured in them.

    Attributes:
        seconds: core-seconds; a stage is not asked for a larger checkout on which it would take more.
        measured: by stage; trainings as `train.<method>` and `encoders.<name>`; `launch.<stage>` of its workers.
        notes: what stood in for what, and what could not be rehearsed.
        tokens: of the captions that the whole run keeps; None before they were counted.
    """

    real: Project
    root: Path
    seconds: float
    measured: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokens: int | None = None

    def all(self) -> "Rehearsal":
        """Rehearse the shard stages, the encoders and the trainings."""
        checkouts = [self._checkout(number, rows) for number, rows in enumerate(self._sizes())]
        for name in chain.SHARD_STAGES:
            if name == "features":
                self._encoders(checkouts)
            self._shards(name, checkouts)
        for method in self.real.params["train"]:
            self._training(f"train.{method}", checkouts, partial(_train, method))
        self._scoring(checkouts)
        return self

    def _sizes(self) -> list[int]:
        block = "scenes" if self.real.params["download"]["source"] == "scenes" else "download"
        whole = min(self.real.params[block]["rows_per_shard"], LARGE, self._rows())
        return [SMALL, SMALL, *sorted({min(MIDDLE, whole), whole})]

    def _rows(self) -> int:
        rows = amounts.of_download(self.real).rows
        if not rows:
            raise BadInput("params.yaml", "asks for no images", "Set scenes.num_train or download.source")
        return rows

    def _checkout(self, number: int, rows: int) -> Project:
        """A checkout of one shard. Only amounts, batches and places differ from the real parameters."""
        root = self.root / f"{number}-{rows}"
        values = copy.deepcopy(self.real.params)
        scenes, download = values["scenes"], values["download"]
        val = min(rows, VAL_IMAGES if rows < LARGE else VAL_IMAGES * 8)
        for name in ("num_tune", "num_val"):
            scenes[name] = min(scenes[name], val)
        if download["source"] == "scenes":
            scenes |= {"num_train": rows, "rows_per_shard": rows}
        else:
            scenes["num_train"] = 0
            download |= self._lists(root, rows)
            download |= {"rows_per_shard": rows}
        for entry in values["evaluate"]["benchmarks"]:
            if entry["root"] != SCENES:
                entry["root"] = str(self.real.path(entry["root"]).resolve())
        features, teacher = values["features"], values["teacher"]
        features["batch_size"] = min(features["batch_size"], rows)
        views = sum(n * n for n in teacher["scales"])
        teacher["batch_size"] = min(teacher["batch_size"], rows * views)
        return Project(root, values, replace(self.real.machine, runner="inline", retries=0, remote=""))

    def _lists(self, root: Path, rows: int) -> dict[str, Any]:
        """The `download` block's source: the first rows of a list that is here, or a folder of made pictures."""
        from pipeline.sources.download import Config

        found = self.real.config("download", Config)
        alike = [x for x in found.lists if x.source != "shards" or found.source == "shards"]
        if alike and not amounts.on_the_web(self.real):
            first = alike[0]
            images = str(self.real.path(first.images)) if first.images else ""
            places = {"annotations": str(self.real.path(first.annotations)), "images": images}
            return {"source": first.source, "mix": [], "limit": rows, **places}
        folder = root / "pictures"
        standins.write_pictures(folder, rows)
        self._note(f"pictures of {standins.SIDES[0]} x {standins.SIDES[1]} px stand in for the links' images")
        places = {"annotations": str(folder / "captions.txt"), "images": str(folder / "images")}
        return {"source": "flickr8k", "mix": [], "limit": None, **places}

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)

    def _shards(self, name: str, checkouts: list[Project]) -> None:
        stage = chain.shard_stage(name)
        samples: list[Sample] = []
        for place, project in enumerate(checkouts):
            self._say(name, project)
            count = name in HEAVY and place == 0
            try:
                found = _shard_sample(stage, project, count)
            except (BadInput, StageFailed) as error:  # what comes before it was left out here
                if not samples and place == len(checkouts) - 1:
                    self._note(f"{name}: not rehearsed ({str(error).splitlines()[0]})")
                continue
            if found is None:
                return
            samples.append(found)
            if place == 0 and name not in SINGLE and self.real.machine.runner == "process":
                self.measured[f"{LAUNCH}.{name}"] = Measured((launch_sample(stage, project, self.real.machine),))
            following = checkouts[place + 1] if place + 1 < len(checkouts) else None
            if following and place and self._too_long(samples, rows_of(project), rows_of(following)):
                break
        if samples:
            self.measured[name] = Measured(tuple(samples))

    def _too_long(self, samples: list[Sample], rows: int, following: int) -> bool:
        line = Measured(tuple(samples)).line("core_seconds")
        return line(samples[-1].rows * following / rows, 1) > self.seconds

    def _say(self, name: str, project: Project) -> None:
        print(f"plan: {name} on {rows_of(project)} images", file=sys.stderr)

    def _encoders(self, checkouts: list[Project]) -> None:
        """Give every checkout its towers; those to train are trained for a few steps, in the largest that has both."""
        for name in ("dino", "clip"):
            if self.real.params["encoders"][name]["source"] != TRAIN:
                self._note(standins.provide_tower(checkouts[0], self.real, name))
            else:
                self._training(f"encoders.{name}", checkouts, partial(_train_encoder, name))
            made = checkouts[0].encoder(name)
            for project in checkouts:
                made = project.encoder(name) if (project.encoder(name) / "config.json").exists() else made
            for project in checkouts:
                if not project.encoder(name).exists():
                    project.encoder(name).parent.mkdir(parents=True, exist_ok=True)
                    project.encoder(name).symlink_to(made.resolve())

    def _training(self, name: str, checkouts: list[Project], train: Callable[[Project], Any]) -> None:
        """A few steps of 4 images with the operations counted, then of more and of whole batches if there is time."""
        largest = self._with_targets(name, checkouts)
        if largest is None:
            self._note(f"{name}: not rehearsed (its targets were not)")
        else:
            self._paced(name, largest, train)

    def _paced(self, name: str, largest: Project, train: Callable[[Project], Any]) -> None:
        samples: list[Sample] = []
        whole = max(_batch_sizes(self.real.params, name))
        batches = sorted({min(batch, whole) for batch in (SMALL, MIDDLE // 2, whole)})
        for place, batch in enumerate(batches):
            project = _short(largest, name, batch)
            self._say(f"{name}, {STEPS} steps of {batch}", project)
            try:
                with counting(batch == SMALL) as flops:
                    watch = Watch()
                    train(project)
                    spent = watch.read()
            except Exception as error:
                if not _foreseen(error):
                    raise
                said = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
                self._note(f"{name}: not rehearsed ({said[:180]})")
                break
            files = self._files(places(project, name)[1])
            samples.append(_training_sample(project, self.real.params, name, spent, sum(flops), batch, files))
            following = batches[min(place + 1, len(batches) - 1)]
            if samples[-1].core_seconds * following / batch > self.seconds * (1 if place else SLACK):
                break
        if samples:
            self.measured[name] = Measured(tuple(samples))

    def _files(self, folder: Path) -> list[tuple[str, int]]:
        """A model's files and their bytes, its table of tokens as long as the whole run's captions make it."""
        found = []
        for name in list_files(folder):
            size = (folder / name).stat().st_size
            if table := vocabulary.table(folder / name):
                if self.tokens is None:
                    keeps = [self.measured[stage].keeps for stage in ("download", "filter")]
                    self.tokens = vocabulary.count(self.real, keeps[0] * keeps[1])
                known, row = table
                size += max(0, self.tokens - known) * row
            found.append((name, size))
        return found

    def _scoring(self, checkouts: list[Project]) -> None:
        """Students and the evaluation, in the largest checkout, with the models of all of them and the real ones."""
        place = checkouts[-1]
        for project in (*reversed(checkouts[:-1]), self.real):
            for model in project.model("").glob("*") if project.model("").is_dir() else ():
                if not place.model(model.name).exists() and model.name not in ("encoders", "selftrain"):
                    place.model(model.name).symlink_to(model.resolve())
        found = scoring.Scoring(place, self.seconds, lambda what: print(f"plan: {what}", file=sys.stderr))
        for job in found.students(place):
            name = f"{scoring.STUDENT}.{scoring.name_of(job)}"
            _student(job, _short(place, name, START))  # writes the labels, which are not the training's
            self._paced(name, place, partial(_student, job))
        found.pairs()
        self.measured |= found.measured
        for note in found.notes:
            self._note(note)

    def _with_targets(self, name: str, checkouts: list[Project]) -> Project | None:
        """The largest checkout in which everything that the training reads was made."""
        from pipeline import methods

        kind, _, method = name.partition(".")
        needed = ("filter", *(methods.get(method).TARGETS if kind == "train" else ()))
        whole = [p for p in checkouts if all(p.manifest_path(stage).exists() for stage in needed)]
        return whole[-1] if whole else None


def _foreseen(error: Exception) -> bool:
    """Whether inputs, parameters, numbers or memory are to blame: then the rest of the plan holds. Else it is a bug."""
    if isinstance(error, SampleFailed):  # from nothing where the system ended the loader's worker
        return error.__cause__ is None
    return isinstance(error, BadInput | ParamsError | StageFailed | NonFiniteLoss | OSError) or out_of_memory(error)


def rows_of(project: Project) -> int:
    """Images of a rehearsal's checkout."""
    return int(project.root.name.partition("-")[2])


def _shard_sample(stage: ShardStage, project: Project, count: bool) -> Sample | None:
    """Run the stage in the checkout; None where the parameters ask for no task."""
    tasks = stage.tasks(project)
    if not tasks:
        return None
    operations: list[float] = []

    def compute(task: Task, folder: Path, machine: Machine) -> Counts:
        with counting(count) as found:
            counts = stage.compute(task, folder, machine)
        operations.extend(found)
        return counts

    watch = Watch()
    manifest = run(replace(stage, compute=compute), project)
    seconds, cores = watch.read()
    files = [
        (name, entry["bytes"])
        for row in manifest.rows
        for name, entry in (project.store.describe(stage.name, row.key) or {})["files"].items()
    ]
    rows = sum(task.rows for task in tasks)
    if stage.name == "codebook":  # its work and its reading are those of the sample
        rows = min(rows, project.params["codebook"]["sample_images"])
    out = rows if stage.name == "codebook" else manifest.totals["rows"]
    return Sample(
        rows=rows,
        out=out,
        padded=padded(project, stage.name, out),
        seconds=seconds,
        core_seconds=cores,
        flops=sum(operations),
        bytes=by_kind(files),
        files=len(files) + len(manifest.rows),
        val_files=sum(PurePosixPath(name).suffix in IMAGES for name, _ in files) if stage.name == "scenes" else 0,
    )


def padded(project: Project, stage: str, rows: int) -> int:
    """Rows of the whole chunks that a shard of `rows` takes; `rows` where the stage has no chunks."""
    block = "codebook" if stage == "groups" else stage
    chunk = project.params[block].get("chunk_rows", 1) if stage not in ("index", "codebook") else 1
    return -(-rows // chunk) * chunk


def optimisations(block: Any) -> Iterator[dict[str, Any]]:
    """Every `optimisation` block below a block of params.yaml, as it stands there."""
    for name, value in block.items() if isinstance(block, dict) else ():
        if name == "optimisation":
            yield value
        else:
            yield from optimisations(value)


def block_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The block of params.yaml that holds a training's `optimisation`: `train.sseg`, `selftrain.sseg.scenes`."""
    if name.startswith(f"{scoring.STUDENT}.transfer-"):
        return values[scoring.STUDENT]["transfer"]
    if name.startswith(f"{scoring.STUDENT}."):
        return {"optimisation": values[scoring.STUDENT]["optimisation"]}
    for part in name.split("."):
        values = values[part]
    return values


def places(project: Project, name: str) -> tuple[str, Path]:
    """What the logs of a training's phases begin with, and its model's folder."""
    kind, _, label = name.partition(".")
    folders = {"encoders": project.encoder(label), "train": project.model(label)}
    folder = folders.get(kind, project.model(kind).joinpath(*label.split(".")))
    return label if kind == "train" else name.replace(".", "-"), folder


def _batch_sizes(values: dict[str, Any], name: str) -> list[int]:
    return [settings["batch_size"] // settings["micro_batches"] for settings in optimisations(block_of(values, name))]


def _short(project: Project, name: str, batch: int) -> Project:
    """The checkout with every phase of that training cut to a few steps of `batch` images, in one part."""
    values = copy.deepcopy(project.params)
    for settings in optimisations(block_of(values, name)):
        settings["batch_size"] = min(batch, settings["batch_size"] // settings["micro_batches"])
        settings["micro_batches"] = 1
        images = STEPS * settings["batch_size"]
        settings |= {"images": images, "warmup_images": 0, "checkpoint_images": images, "log_images": images // 2}
    return Project(project.root, values, project.machine)


def _training_sample(
    project: Project,
    real: dict[str, Any],
    name: str,
    spent: tuple[float, float],
    flops: float,
    batch: int,
    files: list[tuple[str, int]],
) -> Sample:
    """Rows, and the seconds that they take at the pace of the second half of every phase, as the budget weighs them."""
    label, _ = places(project, name)
    block = block_of(project.params, name)
    images = budget = paced = 0.0
    for path in sorted(project.logs.glob(f"{label}*.jsonl")):
        phase = path.stem.removeprefix(label).removeprefix("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if line["event"] == "row"]
        share = next(optimisations(block_of(real, f"{name}.{phase}" if phase in block else name)))["images"]
        images, budget, paced = images + STEPS * batch, budget + share, paced + share / rates[-1]
    paced *= images / budget
    busy = min(1.0, paced / spent[0])  # what the model's making took is not the images'
    return Sample(
        rows=round(images),
        out=round(images),
        padded=round(images),
        seconds=paced,
        core_seconds=spent[1] * busy,
        flops=flops,
        bytes=by_kind(files),
        files=len(files),
    )


def _train(method: str, project: Project) -> None:
    from pipeline.trainer import train

    train(project, method)


def _student(job: Job, project: Project) -> None:
    obtain(replace(job, config=project.config(scoring.STUDENT, type(job.config))), project)


def _train_encoder(name: Any, project: Project) -> None:
    from pipeline.encoders.providing import provide

    provide(project, name)
