"""The frozen towers: released weights resolved, or small ones trained: `python -m stages.encoders [dino|clip]`."""

import argparse

from pipeline.encoders.providing import NAMES, provide
from stages import open_project, report_errors


def main() -> None:
    """Provide the towers named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    chosen = parser.parse_args().names or NAMES
    if unknown := sorted(set(chosen) - set(NAMES)):
        parser.error(f"no encoder is called {unknown[0]!r}")
    project = open_project()
    for name in chosen:
        provide(project, name)


if __name__ == "__main__":
    report_errors(main)
