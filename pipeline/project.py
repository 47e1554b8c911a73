"""A checkout with its parameters and machine: where every file of the chain lies."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline import params, remote
from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.manifest import Manifest, Row
from pipeline.machine import Machine
from pipeline.store import Store, repair_command

T = TypeVar("T")


class MissingPayload(BadInput):
    """A payload that a manifest names is not in the store, or not whole."""


@dataclass(frozen=True, slots=True)
class Project:
    """Paths and parameters of one checkout; nothing is read before it is asked for.

    Attributes:
        root: the folder with params.yaml.
        params: its blocks as plain dicts.
        machine: runner and resources.
    """

    root: Path
    params: dict[str, Any]
    machine: Machine

    @property
    def store(self) -> Store:
        """The payloads, data/store."""
        return Store(self.root / "data" / "store")

    def config(self, block: str, cls: type[T]) -> T:
        """The block at a dotted name (`features`, `train.sseg`) as its dataclass."""
        return params.build(cls, params.block(self.params, block), block)

    def path(self, relative: str) -> Path:
        """A path of params.yaml: relative to the checkout, or absolute."""
        return self.root / relative

    def manifest_path(self, stage: str) -> Path:
        """Where a stage's manifest lies."""
        return self.root / "data" / "manifests" / f"{stage}.json"

    def manifest(self, stage: str) -> Manifest:
        """A stage's manifest."""
        return Manifest.read(self.manifest_path(stage))

    def broken(
        self, stage: str, keys: Iterable[str], outs: Mapping[str, str] | None = None
    ) -> dict[str, CorruptPayload]:
        """Payloads that are not whole, and what is wrong; those that `machine.remote` has were pulled before.

        `outs`: digests of contents by key, from a manifest; what is pulled is held against them.
        """
        found = self.store.problems(stage, keys)
        if found and self.machine.remote:
            names = [remote.Name(stage, key, (outs or {}).get(key, "")) for key in found]
            remote.pull_through(self.store, self.machine.remote, names)
            found = self.store.problems(stage, found)
        return found

    @property
    def offline(self) -> "Project":
        """The same without a remote: for those who only look at what is here."""
        return replace(self, machine=replace(self.machine, remote=""))

    def inputs(self, stage: str) -> list[tuple[Row, Path]]:
        """Every shard of an upstream stage with its payload folder, checked for existence and size; see `broken`.

        Raises:
            MissingPayload: the first payload that is not whole, with the repair command.
        """
        rows = self.manifest(stage).rows
        for problem in self.broken(stage, outs := {row.key: row.out for row in rows}, outs).values():
            raise MissingPayload(problem.file, problem.problem, repair_command(stage))
        return [(row, self.store.folder(stage, row.key)) for row in rows]

    def places(self, stage: str) -> list[tuple[Row, Path | str]]:
        """As `inputs`; with `machine.stream`, what is not whole here stays in the remote, and its URL there is given.

        Raises:
            MissingPayload: the first payload that is neither here nor there.
        """
        if not (self.machine.stream and self.machine.remote):
            return [*self.inputs(stage)]
        rows = self.manifest(stage).rows
        absent = self.store.problems(stage, outs := {row.key: row.out for row in rows})
        names = [remote.Name(stage, key, outs[key]) for key in absent]
        urls = {name.key: url for name, url in remote.located(self.machine.remote, names).items()}
        for key, problem in absent.items():
            if key not in urls:
                raise MissingPayload(problem.file, problem.problem, repair_command(stage))
        return [(row, urls.get(row.key) or self.store.folder(stage, row.key)) for row in rows]

    def require_shards(self, found: Mapping[str, Collection[str]]) -> None:
        """That every stage of `found`, which names each one's shards, has those of download and filter.

        Raises:
            BadInput: its manifest lacks one.
        """
        wanted = {*found["download"], *found["filter"]}
        for stage, shards in found.items():
            if lacking := wanted.difference(shards):
                raise BadInput(self.manifest_path(stage), f"has no shard {min(lacking)}", f"Run `dvc repro {stage}`")

    def encoder(self, name: str) -> Path:
        """Folder of a frozen tower, `dino` or `clip`."""
        return self.root / "models" / "encoders" / name

    def model(self, method: str) -> Path:
        """Folder of a trained method."""
        return self.root / "models" / method

    def checkpoints(self, run: str, key: str) -> Path:
        """Folder of a training's checkpoints; another key has another folder, so nothing foreign is resumed."""
        return self.root / "data" / "checkpoints" / run / key

    @property
    def logs(self) -> Path:
        """Times, hosts and retries: what is true of a run, not of its results."""
        return self.root / "logs"
