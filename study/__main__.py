"""The command line: `maskstudy ...`, the same as `python -m study ...`.

What a command does is imported when it is called, so that none waits for what others need.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ClusterError
from trainables.errors import StorageError, UserError

EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How should I mask? Studies of masked-autoencoder pretraining on your own images.",
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="the study file")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a study's name, folder or file")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="of studies: a folder, or a URI such as s3://bucket/prefix; default: "
        "$MASKSTUDY_STORAGE, else ./studies"
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="of the cluster's dashboard, such as http://127.0.0.1:8265"),
]


@app.command()
def check(study: StudyFile) -> None:
    """Validate a study file and print the plan: arms, trials, tokens, FLOPs, memory, hours."""
    from study.commands.check import check_study

    check_study(study)


@app.command(name="try")
def try_(
    study: StudyFile,
    images: Annotated[int, typer.Option(help="of each split that are used")] = 16,
) -> None:
    """Run one tiny trial in this process, without Ray: a breakpoint works."""
    from study.commands.trial import try_trial

    try_trial(study, images)


@app.command()
def bench(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY.yaml]", help="whose trial; default: tiny at 64 pixels"),
    ] = None,
    strategies: Annotated[str, typer.Option(help="names with commas between, or all")] = "all",
    seconds: Annotated[float, typer.Option(min=0, help="of measuring for each")] = 2.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="default: the study's cpus_per_worker")
    ] = None,
) -> None:
    """Time a training step under every masking strategy, relative to random masking."""
    from study.commands.bench import bench_strategies

    bench_strategies(study, strategies, seconds, threads)


@app.command()
def masks(
    study: StudyFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="the HTML file")] = Path(
        "masks.html"
    ),
    images: Annotated[int, typer.Option(min=1, max=16, help="validation images")] = 4,
    steps: Annotated[
        int, typer.Option(min=4, help="of training for strategies that ask a model")
    ] = 60,
    every: Annotated[
        bool, typer.Option("--all", help="every strategy there is, not only the study's")
    ] = False,
) -> None:
    """Show what each masking of the study hides of its images: one HTML file, no cluster."""
    from analysis.atlas import build_atlas
    from study.commands.masks import show_masks

    show_masks(study, output, images=images, steps=steps, every=every, write_page=build_atlas)


@app.command()
def run(
    study: StudyFile,
    report: Annotated[bool, typer.Option(help="write the report at the end")] = True,
) -> None:
    """Run a study, or go on where it stopped: here, or on the cluster at $RAY_ADDRESS."""
    from study.commands.run import run_study

    raise typer.Exit(run_study(study, build_report=_build_report if report else None))


@app.command()
def submit(
    study: StudyFile,
    address: Annotated[str, typer.Option(help="of the cluster's dashboard")],
    storage: Annotated[
        str | None,
        typer.Option(help="a folder that every node of the cluster sees, or s3://bucket/prefix"),
    ] = None,
) -> None:
    """Run a study as a Ray job; prints the job, the link to it, and how to resume."""
    from study.commands.jobs import submit_study

    submit_study(study, address, storage)


@app.command()
def resume(name: Name, address: Address = None, storage: Storage = None) -> None:
    """Go on with a study by name: here, or as a new job of the cluster at --address."""
    if address:
        from study.commands.jobs import resume_job

        resume_job(name, address, storage)
    else:
        from study.commands.run import resume_study

        raise typer.Exit(resume_study(name, storage, build_report=_build_report))


@app.command()
def stop(name: Name, address: Address = None, storage: Storage = None) -> None:
    """Ask a running study to stop; nothing is lost."""
    if address:
        from study.commands.jobs import stop_job

        stop_job(name, address, storage)
    else:
        from study.commands.ask import ask_to_stop

        ask_to_stop(name, storage)


@app.command()
def extend(
    name: Name,
    trials: Annotated[int, typer.Option(help="how many more searched trials")],
    storage: Storage = None,
) -> None:
    """Give a study more searched trials, while it runs or afterwards."""
    from study.commands.ask import ask_for_trials

    ask_for_trials(name, trials, storage)


@app.command()
def enqueue(
    name: Name,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="searched settings; others as in the trial"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="a YAML file with `path: value` lines instead")
    ] = None,
    storage: Storage = None,
) -> None:
    """Have a study try one arm next, all its seeds, while it runs or afterwards."""
    from study.commands.ask import ask_for_arm

    ask_for_arm(name, settings or [], file, storage)


@app.command()
def logs(
    name: Name,
    address: Annotated[str, typer.Option(help="of the cluster's dashboard")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the job ends")] = False,
) -> None:
    """Print the log of a study's newest job on a cluster."""
    from study.commands.jobs import print_log

    print_log(name, address, follow=follow)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    address: Address = None,
    storage: Storage = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="refresh until it ends")] = False,
) -> None:
    """Show where a study stands, or every study of the storage or of the cluster at --address."""
    if address:
        from study.commands.jobs import show_jobs

        show_jobs(name, address)
    else:
        from study.commands.status import show_status

        show_status(name, storage, follow=follow)


@app.command()
def report(
    name: Name,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the HTML file")] = None,
    storage: Storage = None,
) -> None:
    """Write the interactive report: one HTML file that needs nothing else."""
    from analysis.report import build_report
    from study import mirror
    from study.commands.finding import find_study

    folder = find_study(name, storage)
    mirror.pull_pictures(folder)
    typer.echo(build_report(folder.root, output))


@app.command()
def export(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="a new folder")] = Path("encoder"),
    arm: Annotated[
        str | None, typer.Option(help="an arm's id; default: the best searched one")
    ] = None,
    storage: Storage = None,
) -> None:
    """Hand over a pretrained encoder as safetensors + JSON that timm loads."""
    from study.commands.export import copy_encoder

    copy_encoder(name, output, arm, storage)


@app.command()
def doctor(address: Address = None, storage: Storage = None) -> None:
    """Judge whether this machine, or the cluster at --address, is sound and safe for studies."""
    from study.commands.doctor import show_verdicts

    raise typer.Exit(show_verdicts(address, storage))


@app.command()
def console(
    storage: Storage = None,
    address: Address = None,
    host: Annotated[
        str, typer.Option(help="that it listens at; others than this machine only in token mode")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="let it resume, stop, extend and enqueue")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="a further name that it is reached by")
    ] = None,
) -> None:
    """Show all studies of a storage in the browser: on the cluster at --address, or from here."""
    from study.commands.finding import storage_of
    from study.console.server import start

    start(
        storage_of(storage),
        address=address,
        host=host,
        port=port,
        allow_changes=allow_changes,
        allow_hosts=allow_host or [],
        say=lambda line: print(line, flush=True),
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files, for editors."""
    from study.spec import schema as study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


def _build_report(folder: Path) -> Path:
    from analysis.report import build_report

    return build_report(folder)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that are the user's to mend become one message and an exit code."""
    try:
        app(args=arguments, standalone_mode=True)
    except (UserError, StorageError, ClusterError) as error:
        print(f"maskstudy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; nothing is lost: the same command goes on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
