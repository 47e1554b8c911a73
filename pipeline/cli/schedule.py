"""`tessera schedule CRON`: the whole chain by the clock, as a Prefect flow that publishes its scores as an artifact.

It stays in the foreground and runs until it is stopped. A Prefect server that PREFECT_API_URL names is used, else one
is started with it and keeps its database in logs/prefect, so that the scores of earlier nights stay.
"""

import argparse
import os
import sys

from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.serving import found_server

NOW = "now"
NAME = "schedule"  # of the deployment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "when", metavar="CRON", help=f'such as "0 3 * * *" (every night at 3, UTC); {NOW}: once, at once'
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Serve the flow until a signal, or run it once.

    Raises:
        ParamsError: no cron line. BadInput: the server did not start.
    """
    with found_server(project.logs / "prefect", os.environ) as address:
        from prefect.client.schemas.schedules import CronSchedule
        from prefect.types.entrypoint import EntrypointType

        from pipeline.scheduling import SCORES, reproduce  # Prefect reads its settings when it is imported

        root = str(project.root.resolve())
        print(f"tessera: Prefect at {address}, scores in its artifact {SCORES}", file=sys.stderr)
        if arguments.when == NOW:
            reproduce(root)
            return 0
        try:
            CronSchedule(cron=arguments.when)
        except ValueError as error:
            raise ParamsError(f"tessera schedule: {arguments.when!r} is no cron line, such as '0 3 * * *'") from error
        os.chdir(root)
        reproduce.serve(
            name=NAME,
            cron=arguments.when,
            parameters={"root": root},
            limit=1,
            entrypoint_type=EntrypointType.MODULE_PATH,
            print_starting_message=False,
        )
        return 0
