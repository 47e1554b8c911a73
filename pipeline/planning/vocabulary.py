"""The table of text tokens of a model with `vocabulary: seen`, which grows with the captions."""

from itertools import chain, islice
from pathlib import Path

from safetensors import safe_open

from pipeline.artifacts.files import BadInput
from pipeline.project import Project
from pipeline.sources import download
from pipeline.sources.annotations import read_slice
from pipeline.text.tokenizers import BytePairTokenizer

CONTEXT = 77  # tokens of a caption that count: CLIP's
# Of a saved model (see `pipeline.methods`): each token's row of the table, where the last is for those never seen; and
# the table, as `pipeline.nn.text` and `pipeline.nn.bert` name it.
ROWS = "text.vocabulary.rows"
TABLES = {"text.embedding.weight", "text.model.embeddings.word_embeddings.weight"}


def count(project: Project, share: float) -> int:
    """Distinct tokens in the first `share` of all captions.

    0 where they cannot be read: of lists that are not here, and of generated scenes, whose few words a rehearsal saw.
    """
    if project.params["download"]["source"] == "scenes":
        return 0
    try:
        tasks = download.tasks(project)
    except BadInput:
        return 0
    tokenizer, seen = BytePairTokenizer(CONTEXT), set[int]()
    rows = chain.from_iterable(read_slice(task.args.annotations, task.args.part) for task in tasks)
    for row in islice(rows, round(share * sum(task.rows for task in tasks))):
        for caption in row.caption.split("\n"):
            seen.update(tokenizer.encode(caption))
    return len(seen)


def table(file: Path) -> tuple[int, int] | None:
    """Tokens that a model's table knows, and the bytes of one of its rows; None where there is none that grows."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "pt") as model:
        if ROWS not in model.keys():
            return None
        (name,) = TABLES.intersection(model.keys())
        found = model.get_tensor(name)
    return len(found) - 1, found[0].nbytes
