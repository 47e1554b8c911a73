"""Manifests: the small, sorted, timeless tables by which stages and commits name the payloads they mean.

A manifest is what DVC tracks in place of terabytes: one row per shard with the payload's key, its row and byte counts
and the digest of its contents.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts.files import BadInput, atomic_json, digest, read_json


@dataclass(frozen=True, slots=True)
class Row:
    """One shard's payload.

    Attributes:
        shard: name, such as `00000`.
        key: sha256 of what decided the payload's bytes; also its address in the store.
        rows_in: rows read; `rows_in - rows` stand in the payload's failure table.
        rows: rows written.
        bytes: size of the payload's files.
        out: digest of the payload's contents.
    """

    shard: str
    key: str
    rows_in: int
    rows: int
    bytes: int
    out: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All shards of a stage, sorted by name."""

    stage: str
    rows: list[Row]

    @property
    def totals(self) -> dict[str, int]:
        """Sums over the shards: shards, in, rows, failed, bytes."""
        rows_in, rows = sum(r.rows_in for r in self.rows), sum(r.rows for r in self.rows)
        size = sum(r.bytes for r in self.rows)
        return {"shards": len(self.rows), "in": rows_in, "rows": rows, "failed": rows_in - rows, "bytes": size}

    @property
    def digest(self) -> str:
        """Digest of what the manifest says, as it stands in the stage's marker."""
        return digest(self._plain())

    def _plain(self) -> dict:
        shards = [
            {"shard": r.shard, "key": r.key, "in": r.rows_in, "rows": r.rows, "bytes": r.bytes, "out": r.out}
            for r in sorted(self.rows, key=lambda row: row.shard)
        ]
        return {"stage": self.stage, "totals": self.totals, "shards": shards}

    def write(self, path: Path) -> None:
        """Write the manifest; the same shards give the same bytes."""
        atomic_json(path, self._plain())

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            BadInput: absent, not JSON, or not a manifest.
        """
        remedy = "Run `dvc repro` to make it"
        values = read_json(path, remedy)
        try:
            rows = [Row(s["shard"], s["key"], s["in"], s["rows"], s["bytes"], s["out"]) for s in values["shards"]]
            return cls(values["stage"], rows)
        except (KeyError, TypeError) as error:
            raise BadInput(path, f"not a manifest ({error!r})", remedy) from error
