"""Score every model and baseline of `evaluate.models` on every benchmark: `python -m stages.evaluate`."""

from pipeline.engine import interruptible
from pipeline.evaluation.stage import evaluate_all
from stages import open_project, report_errors


def main() -> None:
    """Run the stage with the parameters that are there."""
    with interruptible():
        evaluate_all(open_project())


if __name__ == "__main__":
    report_errors(main)
