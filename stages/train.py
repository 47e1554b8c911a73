"""Train a method on the pairs and its cached targets: `python -m stages.train METHOD`, or `torchrun -m` the same."""

import argparse

from pipeline import methods
from pipeline.trainer import train
from stages import open_project, report_errors

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=methods.names())
    chosen = parser.parse_args().method
    report_errors(lambda: train(open_project(), chosen))
