"""Released BERTs in the hub's format: a folder with config, weights and vocab.txt, or a name to fetch."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.artifacts.files import BadInput
from pipeline.encoders.files import first_line

NEEDED = ("config.json", "model.safetensors")


def read_released(source: str, root: Path = Path()) -> dict[str, Tensor]:
    """The encoder's tensors, named as in transformers' `BertModel` without its pooler.

    `source`: `file:<folder>` (relative to `root`) or `transformers:<name>`, such as transformers:bert-base-uncased.
    Heads of pre-training and the pooler are left out. Nothing is unpickled.

    Raises:
        BadInput: an unknown source, an absent or damaged folder, no BERT, or not reachable, with the remedy.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest:
        folder = root / rest
        for name in NEEDED:
            if not (folder / name).is_file():
                raise BadInput(folder / name, "no such file", how_to_bring("bert-base-uncased"))
        return _read(str(folder), source, local=True)
    if scheme == "transformers" and rest:
        return _read(rest, source, local=False)
    raise BadInput(source, "unknown source of BERT", "Known: none, file:<folder> or transformers:<name>")


def _read(name: str, source: str, *, local: bool) -> dict[str, Tensor]:
    from transformers.models.bert import BertModel

    try:
        loaded: Any = BertModel.from_pretrained(
            name, add_pooling_layer=False, local_files_only=local, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # hub clients raise anything from OSError to their own types
        raise BadInput(source, f"could not be read ({first_line(error)})", how_to_bring(name)) from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise BadInput(source, f"is not a whole BERT: lacks {missing[0]}", how_to_bring("bert-base-uncased"))
    return dict(model.state_dict())


def how_to_bring(name: str) -> str:
    """What to do on a machine without a network."""
    name = "bert-base-uncased" if Path(name).is_dir() else name
    folder = name.rsplit("/", 1)[-1]
    return (
        f"Where there is a network, run `hf download {name} {' '.join(NEEDED)} vocab.txt --local-dir {folder}`, copy "
        f"the folder here (for example to models/released/{folder}) and set "
        f"`train.ovsegmentor.text.init: file:models/released/{folder}` and `text.vocab_file` in params.yaml"
    )
