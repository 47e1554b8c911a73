"""From a name to something to score.

A trained model's folder, `untrained:<method>`, `baseline:<name>`; and of one benchmark each, with its class list,
`selftrained:<teacher>` and `transfer:<encoder>` (`pipeline.selftraining`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline import baselines, methods
from pipeline.artifacts.files import BadInput, digest
from pipeline.artifacts.weights import CONFIG, REMEDY, load_config, model_digest
from pipeline.caching import features
from pipeline.caching import pseudo_masks as pseudo_masks_stage
from pipeline.datasets.benchmarks import Benchmark
from pipeline.evaluation.regions import Regions
from pipeline.evaluation.scoring import Candidate
from pipeline.evaluation.whole_images import whole_labels, whole_pixels, whole_regions
from pipeline.inference import Geometry
from pipeline.nn.group_stages import groups_by_stages, stage_groups
from pipeline.project import Project
from pipeline.selftraining import students

BASELINE, UNTRAINED = "baseline:", "untrained:"
SELFTRAINED, TRANSFER = "selftrained:", "transfer:"


def is_student(spec: str) -> bool:
    """Whether it learned one benchmark's class list."""
    return spec.startswith((SELFTRAINED, TRANSFER))


def folder_name(spec: str) -> str:
    """The metrics folder of a candidate: `baseline-oracle`, `sseg-untrained`, `sseg`, `selftrained-sseg`."""
    if spec.startswith(SELFTRAINED):
        return f"selftrained-{folder_name(spec.removeprefix(SELFTRAINED))}"
    if spec.startswith(TRANSFER):
        return f"transfer-{spec.removeprefix(TRANSFER)}"
    if spec.startswith(BASELINE):
        return f"baseline-{spec.removeprefix(BASELINE)}"
    if spec.startswith(UNTRAINED):
        return f"{Path(spec.removeprefix(UNTRAINED)).name}-untrained"
    return Path(spec).name


def rules_name(spec: str, project: Project) -> str:
    """The name under which protocols look for a candidate: `sseg-untrained`, and `groupvit-NAME` for models/NAME when
    that is a GroupViT, trained or imported. See `evaluation.config.Rules`.

    Raises:
        BadInput: its weights are absent.
    """
    name = folder_name(spec)
    if spec.startswith(BASELINE) or is_student(spec):
        return name
    method = load_config(model_folder(spec.removeprefix(UNTRAINED), project)).get("method", name)
    return name if name.split("-")[0] == method else f"{method}-{name}"


def digests(spec: str, project: Project, benchmark: Benchmark | None = None) -> dict[str, str]:
    """What the candidate's answers depend on beside code, without building it; see `load`.

    Raises:
        BadInput: its weights are absent.
        ParamsError: no such baseline.
    """
    if is_student(spec):
        return {"model": model_digest(_own_student(spec, project, benchmark))}
    if spec.startswith(BASELINE):
        return baselines.get(spec.removeprefix(BASELINE)).digests(project)
    if spec.startswith(UNTRAINED):
        config = load_config(model_folder(spec.removeprefix(UNTRAINED), project))
        return {"start": digest({key: value for key, value in config.items() if key not in ("digest", "trained")})}
    return {"model": model_digest(model_folder(spec, project))}


def module(spec: str, project: Project) -> str:
    """The module whose code, with all that it imports, makes the candidate's answers.

    Raises:
        BadInput: its weights are absent.
    """
    if is_student(spec):
        return students.__name__
    if spec.startswith(BASELINE):
        return f"{baselines.__name__}.{spec.removeprefix(BASELINE)}"
    config = load_config(model_folder(spec.removeprefix(UNTRAINED), project))
    return f"{methods.__name__}.{config['method']}"


def load(spec: str, project: Project, geometry: Geometry, benchmark: Benchmark | None = None) -> Candidate:
    """Build the candidate on the machine's device. Students are of the `benchmark` that they will answer.

    Raises:
        BadInput: its weights are absent or broken, or a student was trained for other classes.
        ParamsError: no such baseline.
    """
    known, device = digests(spec, project, benchmark), project.machine.device
    if is_student(spec):
        model = students.load(_own_student(spec, project, benchmark), project, geometry)
    elif spec.startswith(BASELINE):
        model = baselines.get(spec.removeprefix(BASELINE)).build(project)
    else:
        read = methods.load_untrained if spec.startswith(UNTRAINED) else methods.load
        model = read(model_folder(spec.removeprefix(UNTRAINED), project), project.encoder("dino").parent).to(device)
    geometry = geometry.fitting(model)
    return Candidate(
        name=folder_name(spec),
        model=model,
        digests=known,
        regions=_regions(model, geometry, device),
        stages=_stages(model, geometry, device),
        precision=_precision(known, project),
    )


def pseudo_mask_digests(project: Project) -> dict[str, str] | None:
    """What the pseudo-masks of a benchmark's images depend on; None where there is no encoder to make them."""
    try:
        return digests(f"{BASELINE}oracle", project)
    except BadInput:
        return None


def pseudo_masks(project: Project) -> Regions | None:
    """The oracle's regions of an image, for the pictures; None where there is no encoder to make them."""
    if pseudo_mask_digests(project) is None:
        return None
    return baselines.get("oracle").build(project).image_regions


def model_folder(name: str, project: Project) -> Path:
    """A model's folder: a path, a path below the checkout, or a name below models/.

    Raises:
        BadInput: none of them has a config.json.
    """
    tried = (Path(name), project.path(name), project.model(name))
    for folder in tried:
        if (folder / CONFIG).is_file():
            return folder
    raise BadInput(project.model(name) if "/" not in name else Path(name), f"no model folder (no {CONFIG})", REMEDY)


def student_folder(spec: str, benchmark: str, project: Project) -> Path:
    """Where a student lies: models/selftrain/<teacher>/<benchmark>, models/selftrain/transfer-<encoder>/<benchmark>."""
    return project.model("selftrain") / folder_name(spec).removeprefix("selftrained-") / benchmark


def _own_student(spec: str, project: Project, benchmark: Benchmark | None) -> Path:
    """The folder of the student that was trained for exactly these classes.

    Raises:
        BadInput: there is none.
    """
    if benchmark is None:
        raise ValueError(f"{spec} is a student of one benchmark: name it")
    folder = student_folder(spec, benchmark.name, project)
    if not (folder / CONFIG).is_file():
        remedy = "It answers only benchmarks that it was trained for: name its teacher or encoder under `selftrain` in "
        raise BadInput(folder, f"no {spec} for {benchmark.name}", f"{remedy}params.yaml and run `dvc repro selftrain`")
    known = tuple(load_config(folder)["classes"])
    if known != benchmark.classes:
        differing = sorted(set(known) ^ set(benchmark.classes)) or ["in another order"]
        problem = f"knows another class list than {benchmark.name} under the {benchmark.protocol} protocol"
        raise BadInput(folder, f"{problem} ({', '.join(differing[:4])})", "Train it under this protocol")
    return folder


def _stages(
    model: object, geometry: Geometry, device: str
) -> Callable[[UInt8[np.ndarray, "height width 3"]], list[Int64[Tensor, "height width"]]] | None:
    """The groups of each stage, of the whole image (`whole_pixels`)."""
    regions: Callable[[Tensor], Tensor] | None = getattr(model, "regions", None)
    if regions is None or not isinstance(model, torch.nn.Module) or not groups_by_stages(model):
        return None

    def stages(image: UInt8[np.ndarray, "height width 3"]) -> list[Int64[Tensor, "height width"]]:
        found = stage_groups(model, regions, whole_pixels(image, geometry, device))
        return [whole_labels(labels, image.shape[:2], geometry).cpu() for labels in found]

    return stages


def _precision(known: dict[str, str], project: Project) -> str:
    """Of a candidate's products: float32, but for pseudo-masks, which are made as their stages make them."""
    used = set()
    if "pseudo_masks" in known:
        used.add(project.config("features", features.Config).precision)
        if torch.device(project.machine.device).type == "cuda":  # a CPU's clustering is float32
            used.add(project.config("pseudo_masks", pseudo_masks_stage.Config).precision)
    return "float32, its regions bfloat16" if "bfloat16" in used else "float32"


def _regions(model: object, geometry: Geometry, device: str) -> Regions | None:
    if isinstance(model, baselines.RegionModel):
        return model.image_regions
    masks: Callable[[torch.Tensor], torch.Tensor] | None = getattr(model, "regions", None)
    if masks is None:
        return None
    return lambda image: whole_regions(masks, image, geometry, device)
